// rrt::loop_lora_linear, rrt::loop_lora_prefill, rrt::packed_linear and rrt::packed_gated_linear on torch's stable ABI:
// schemas, argument checks, host planning. The kernels lie behind raw-pointer launch functions and know nothing of torch.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <numeric>
#include <optional>
#include <string>
#include <vector>

#include "checks.h"
#include "elementwise/check_activation.h"
#include "loop_lora/cuda_launch.h"
#include "loop_lora/launch.h"
#include "packed_linear/launch.h"

namespace rrt {
namespace {

void check_segment_lists(const Checks& check, const std::vector<int64_t>& out, const std::vector<int64_t>& rank,
                         bool packed) {
  if (packed && out.empty()) {
    check.fail("segment_out: found []; expected the packed weight's segments (one of all its rows, if there is one)");
  }
  if (out.size() != rank.size()) {
    check.fail("segment_rank: found ", rank.size(), " entries; expected ", out.size(), " as in segment_out");
  }
  if (out.size() > loop_lora::kMaxSegments) {
    check.fail("segment_out: found ", out.size(), " entries; expected at most ", loop_lora::kMaxSegments);
  }
  // Larger sizes than any tensor has could overflow the sums.
  const auto huge = [](int64_t value) { return value > INT32_MAX; };
  if (std::any_of(out.begin(), out.end(), huge)) {
    check.fail("segment_out: found ", ints_text(out), "; expected no entry above ", INT32_MAX);
  }
  if (std::any_of(rank.begin(), rank.end(), huge)) {
    check.fail("segment_rank: found ", ints_text(rank), "; expected no entry above ", INT32_MAX);
  }
  const auto negative = [](int64_t value) { return value < 0; };
  if (std::any_of(out.begin(), out.end(), negative)) {
    check.fail("segment_out: found ", ints_text(out), "; expected no negative entry");
  }
  if (std::any_of(rank.begin(), rank.end(), negative)) {
    check.fail("segment_rank: found ", ints_text(rank), "; expected no negative entry");
  }
}

std::vector<loop_lora::Segment> check_segments(const Checks& check, const std::vector<int64_t>& out,
                                               const std::vector<int64_t>& rank, int64_t n, int64_t a_rank,
                                               int64_t b_rank) {
  if (out.empty()) {
    if (a_rank != b_rank) check.fail("lora_b: found rank ", b_rank, "; expected ", a_rank, " as in lora_a");
    return {{0, n, 0, a_rank}};
  }
  std::vector<loop_lora::Segment> segments;
  int64_t out_begin = 0, rank_begin = 0, max_rank = 0;
  for (size_t s = 0; s < out.size(); ++s) {
    segments.push_back({out_begin, out[s], rank_begin, rank[s]});
    out_begin += out[s];
    rank_begin += rank[s];
    max_rank = std::max(max_rank, rank[s]);
  }
  if (out_begin != n) {
    check.fail("segment_out: found ", ints_text(out), "; expected a sum of ", n, ", the weight's rows");
  }
  if (rank_begin != a_rank) {
    check.fail("lora_a: found rank ", a_rank, "; expected ", rank_begin, ", the sum of segment_rank");
  }
  if (max_rank != b_rank) {
    check.fail("lora_b: found rank ", b_rank, "; expected ", max_rank, ", the largest of segment_rank");
  }
  return segments;
}

int64_t sum(const std::vector<int64_t>& values) {
  int64_t total = 0;
  for (int64_t value : values) total += value;
  return total;
}

int64_t max(const std::vector<int64_t>& values) {
  return values.empty() ? 0 : *std::max_element(values.begin(), values.end());
}

// x [M, K] with the elements of a row adjacent. CUDA's matrix kernels read 16 bytes at a time: if only x does
// not allow that, it is copied (clone alone may make columns of rows that overlap). So the kernel, and with it the
// order of sums, is chosen by the layer and not by x.
Tensor with_dense_rows(const Tensor& x, Dtype dtype) {
  const int64_t m = x.size(0), k = x.size(1);
  const Tensor dense = with_dense_last_dim(x);
  if (x.is_cpu() || bytes_of(dtype) != 2 || k % 8 != 0) return dense;
  const bool vectors =
      reinterpret_cast<uintptr_t>(dense.const_data_ptr()) % 16 == 0 && (m <= 1 || dense.stride(0) % 8 == 0);
  return vectors ? dense : torch::stable::contiguous(torch::stable::clone(dense));
}

// A call whose arguments have been checked, but for the loops' values, and the tensors that it points into.
struct Call {
  loop_lora::Params params;
  Tensor x, y;
};

// `loops` is null if all rows are of one loop; packed weights are then refused.
Call prepare(const Checks& check, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
             const Tensor& lora_a, const Tensor& lora_b, const Tensor* loops, const std::vector<int64_t>& segment_out,
             const std::vector<int64_t>& segment_rank) {
  const Dtype dtype = check.float_dtype("x", x);
  check.dtype("weight", weight, x.scalar_type());
  if (bias) check.dtype("bias", *bias, x.scalar_type());
  check.dtype("lora_a", lora_a, x.scalar_type());
  check.dtype("lora_b", lora_b, x.scalar_type());
  if (loops) check.dtype("loops", *loops, ScalarType::Int);
  check.same_device("weight", weight, x, "x");
  if (bias) check.same_device("bias", *bias, x, "x");
  check.same_device("lora_a", lora_a, x, "x");
  check.same_device("lora_b", lora_b, x, "x");
  if (loops) check.same_device("loops", *loops, x, "x");

  check.shape("x", x, {{"M"}, {"K"}});
  const int64_t m = x.size(0), k = x.size(1);
  const bool packed = loops && weight.sizes().size() == 3;
  check_segment_lists(check, segment_out, segment_rank, packed);
  const int64_t n = packed ? sum(segment_out) : weight.size(0);
  const int64_t step = packed_linear::pack_step(dtype), steps = packed_linear::pack_steps(dtype, k);
  const int64_t panel_step = packed_linear::kPanel * step;
  if (packed) {
    check.shape("weight", weight, {{"panels", packed_linear::num_panels(n)}, {"steps", steps}, {"values", panel_step}});
  } else {
    check.shape("weight", weight, {{"N"}, {"K", k}});
  }
  if (bias && bias->sizes().size() != 2) check.shape("bias", *bias, {{"N", n}});
  int64_t total_rank = packed ? sum(segment_rank) : -1, b_stride = packed ? max(segment_rank) : -1;
  if (packed) {
    check.shape("lora_a", lora_a,
                {{"loops"},
                 {"panels", packed_linear::num_panels(total_rank)},
                 {"steps", steps},
                 {"values", panel_step}});
  } else {
    check.shape("lora_a", lora_a, {{"loops"}, {"R"}, {"K", k}});
    total_rank = lora_a.size(1);
  }
  const int64_t num_loops = lora_a.size(0);
  if (bias && bias->sizes().size() == 2) check.shape("bias", *bias, {{"loops", num_loops}, {"N", n}});
  if (packed) {
    check.shape("lora_b", lora_b,
                {{"loops", num_loops},
                 {"panels", packed_linear::num_panels(n)},
                 {"steps", packed_linear::pack_steps(dtype, b_stride)},
                 {"values", panel_step}});
  } else {
    check.shape("lora_b", lora_b, {{"loops", num_loops}, {"N", n}, {"R"}});
    b_stride = lora_b.size(2);
  }
  if (loops) check.shape("loops", *loops, {{"M", m}});
  auto segments = check_segments(check, segment_out, segment_rank, n, total_rank, b_stride);
  check.contiguous("weight", weight);
  if (bias) check.contiguous("bias", *bias);
  check.contiguous("lora_a", lora_a);
  check.contiguous("lora_b", lora_b);

  const int64_t y_size[] = {m, n};
  Call call{{}, with_dense_rows(x, dtype), torch::stable::new_empty(x, y_size)};
  loop_lora::Params& params = call.params;
  params.dtype = dtype;
  params.packed = packed;
  params.m = m;
  params.n = n;
  params.k = k;
  params.num_loops = num_loops;
  params.total_rank = total_rank;
  params.b_stride = b_stride;
  params.bias_loop_stride = bias && bias->sizes().size() == 2 ? n : 0;
  params.x_row_stride = m > 1 ? call.x.stride(0) : k;
  params.x = call.x.const_data_ptr();
  params.weight = weight.const_data_ptr();
  params.bias = bias ? bias->const_data_ptr() : nullptr;
  params.lora_a = lora_a.const_data_ptr();
  params.lora_b = lora_b.const_data_ptr();
  params.y = call.y.mutable_data_ptr();
  params.segments = std::move(segments);
  return call;
}

constexpr Checks rows_check{"loop_lora_linear"};

Tensor loop_lora_linear_cpu(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                            const Tensor& lora_a, const Tensor& lora_b, const Tensor& loops,
                            const std::vector<int64_t>& segment_out, const std::vector<int64_t>& segment_rank) {
  const Call call = prepare(rows_check, x, weight, bias, lora_a, lora_b, &loops, segment_out, segment_rank);
  const Tensor adjacent = torch::stable::contiguous(loops);
  const int32_t* loop_of_row = adjacent.const_data_ptr<int32_t>();
  const loop_lora::LoopGroups groups =
      loop_lora::group_rows_by_loop(loop_of_row, call.params.m, call.params.num_loops);
  if (!groups.ok()) {
    rows_check.fail("loops[", groups.bad_row, "]: found ", loop_of_row[groups.bad_row], "; expected a loop in [0, ",
                    call.params.num_loops, ")");
  }
  loop_lora::run_cpu(call.params, groups, torch_parallel);
  return call.y;
}

void check_packed(const Checks& check, const char* name, const Tensor& weight, const char* bias_name,
                  const std::optional<Tensor>& bias, const Tensor& x, int64_t n) {
  const Dtype dtype = check.float_dtype("x", x);
  check.dtype(name, weight, x.scalar_type());
  check.same_device(name, weight, x, "x");
  check.shape(name, weight,
              {{"panels", packed_linear::num_panels(n)},
               {"steps", packed_linear::pack_steps(dtype, x.size(-1))},
               {"values", packed_linear::kPanel * packed_linear::pack_step(dtype)}});
  check.contiguous(name, weight);
  if (!bias) return;
  check.dtype(bias_name, *bias, x.scalar_type());
  check.same_device(bias_name, *bias, x, "x");
  check.shape(bias_name, *bias, {{"N", n}});
  check.contiguous(bias_name, *bias);
}

// The parameters of y [..., n] = weight x for x [..., K] with packed weights that no loop has a part in.
loop_lora::Params packed_params(const Checks& check, const Tensor& x, int64_t n) {
  loop_lora::Params params{};
  params.dtype = check.float_dtype("x", x);
  if (x.dim() == 0) check.fail("x: found shape []; expected [..., K]");
  if (n < 0 || n > INT32_MAX) check.fail("out_features: found ", n, "; expected 0 to ", INT32_MAX);
  params.packed = true;
  params.n = n;
  params.k = params.x_row_stride = x.size(-1);
  params.m = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) params.m *= x.size(i);
  params.num_loops = 1;
  params.segments = {{0, n, 0, 0}};
  return params;
}

Tensor run_packed(loop_lora::Params& params, const Tensor& x) {
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = params.n;
  Tensor y = torch::stable::new_empty(x, sizes);
  const Tensor dense = torch::stable::contiguous(x);
  params.x = dense.const_data_ptr();
  params.y = y.mutable_data_ptr();
  loop_lora::LoopGroups groups;
  groups.order.resize(params.m);
  std::iota(groups.order.begin(), groups.order.end(), 0);
  groups.offsets = {0, params.m};
  loop_lora::run_cpu(params, groups, torch_parallel);
  return y;
}

Tensor packed_linear_cpu(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                         int64_t out_features) {
  constexpr Checks check{"packed_linear"};
  loop_lora::Params params = packed_params(check, x, out_features);
  check_packed(check, "weight", weight, "bias", bias, x, out_features);
  params.weight = weight.const_data_ptr();
  params.bias = bias ? bias->const_data_ptr() : nullptr;
  return run_packed(params, x);
}

Tensor packed_gated_linear_cpu(const Tensor& x, const Tensor& gate, const Tensor& up,
                               const std::optional<Tensor>& gate_bias, const std::optional<Tensor>& up_bias,
                               int64_t out_features, std::string activation) {
  constexpr Checks check{"packed_gated_linear"};
  loop_lora::Params params = packed_params(check, x, out_features);
  check_packed(check, "gate", gate, "gate_bias", gate_bias, x, out_features);
  check_packed(check, "up", up, "up_bias", up_bias, x, out_features);
  params.activation = check_activation(check, activation);
  params.gate_weight = gate.const_data_ptr();
  params.gate_bias = gate_bias ? gate_bias->const_data_ptr() : nullptr;
  params.weight = up.const_data_ptr();
  params.bias = up_bias ? up_bias->const_data_ptr() : nullptr;
  return run_packed(params, x);
}

#ifdef RRT_CUDA
// The loops' values stay on the device: a row whose loop lies outside [0, num_loops) becomes NaN.
Tensor launch_rows(const Checks& check, const Call& call, const Tensor& loops) {
  const Tensor adjacent = torch::stable::contiguous(loops);
  const int32_t device = call.x.get_device_index();
  const int64_t scratch_size[] = {loop_lora::cuda_scratch_bytes(call.params, device) /
                                  static_cast<int64_t>(sizeof(int32_t))};
  const Tensor scratch = torch::stable::new_empty(adjacent, scratch_size);
  const char* error =
      loop_lora::run_cuda({&call.params, adjacent.const_data_ptr<int32_t>(), scratch.mutable_data_ptr()}, device,
                          current_cuda_stream(device));
  if (error != nullptr) check.fail("CUDA: ", error);
  return call.y;
}

Tensor loop_lora_linear_cuda(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                             const Tensor& lora_a, const Tensor& lora_b, const Tensor& loops,
                             const std::vector<int64_t>& segment_out, const std::vector<int64_t>& segment_rank) {
  const Call call = prepare(rows_check, x, weight, bias, lora_a, lora_b, &loops, segment_out, segment_rank);
  if (call.params.packed) rows_check.fail("weight: found a packed one; expected [N, K]: packing is for CPUs");
  return launch_rows(rows_check, call, loops);
}

Tensor loop_lora_prefill_cuda(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                              const Tensor& lora_a, const Tensor& lora_b, int64_t loop,
                              const std::vector<int64_t>& segment_out, const std::vector<int64_t>& segment_rank) {
  constexpr Checks check{"loop_lora_prefill"};
  const Call call = prepare(check, x, weight, bias, lora_a, lora_b, nullptr, segment_out, segment_rank);
  const loop_lora::Params& params = call.params;
  if (loop < 0 || loop >= params.num_loops) {
    check.fail("loop: found ", loop, "; expected a loop in [0, ", params.num_loops, ")");
  }
  if (!loop_lora::fits_cuda_prefill(params)) {
    const int64_t size[] = {params.m};
    const Tensor loops = torch::stable::new_empty(x, size, ScalarType::Int);
    return launch_rows(check, call, torch::stable::fill_(loops, static_cast<double>(loop)));
  }
  const int64_t shrunk_size[] = {params.m, params.total_rank};
  const Tensor shrunk = torch::stable::new_empty(x, shrunk_size);
  const int32_t device = x.get_device_index();
  const char* error =
      loop_lora::run_cuda_prefill(params, loop, shrunk.mutable_data_ptr(), device, current_cuda_stream(device));
  if (error != nullptr) check.fail("CUDA: ", error);
  return call.y;
}
#endif

}  // namespace
}  // namespace rrt

STABLE_TORCH_LIBRARY_FRAGMENT(rrt, library) {
  library.def(
      "loop_lora_linear(Tensor x, Tensor weight, Tensor? bias, Tensor lora_a, Tensor lora_b, Tensor loops, "
      "int[] segment_out=[], int[] segment_rank=[]) -> Tensor");
  library.def(
      "loop_lora_prefill(Tensor x, Tensor weight, Tensor? bias, Tensor lora_a, Tensor lora_b, int loop, "
      "int[] segment_out=[], int[] segment_rank=[]) -> Tensor");
  library.def("packed_linear(Tensor x, Tensor weight, Tensor? bias, int out_features) -> Tensor");
  library.def(
      "packed_gated_linear(Tensor x, Tensor gate, Tensor up, Tensor? gate_bias, Tensor? up_bias, int out_features, "
      "str activation) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(rrt, CPU, library) {
  library.impl("loop_lora_linear", TORCH_BOX(&rrt::loop_lora_linear_cpu));
  library.impl("packed_linear", TORCH_BOX(&rrt::packed_linear_cpu));
  library.impl("packed_gated_linear", TORCH_BOX(&rrt::packed_gated_linear_cpu));
}

#ifdef RRT_CUDA
STABLE_TORCH_LIBRARY_IMPL(rrt, CUDA, library) {
  library.impl("loop_lora_linear", TORCH_BOX(&rrt::loop_lora_linear_cuda));
  library.impl("loop_lora_prefill", TORCH_BOX(&rrt::loop_lora_prefill_cuda));
}
#endif
