// The operators of the rrt:: namespace on torch's stable ABI: schemas, argument checks, host planning.
// Kernels lie behind raw-pointer launch functions and know nothing of torch.
//
// rrt/ops.py makes the same checks with the same words for the reference; tests hold the two together.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "loop_lora/launch.h"

namespace rrt {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  message << "rrt::loop_lora_linear: ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

std::string list_text(const std::vector<std::string>& items) {
  std::string text = "[";
  for (size_t i = 0; i < items.size(); ++i) text += (i ? ", " : "") + items[i];
  return text + "]";
}

template <class Ints>
std::string ints_text(const Ints& ints) {
  std::vector<std::string> items;
  for (int64_t value : ints) items.push_back(std::to_string(value));
  return list_text(items);
}

std::string dtype_text(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    default: return torch::headeronly::toString(dtype);
  }
}

std::optional<loop_lora::Dtype> kernel_dtype(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return loop_lora::Dtype::kFloat32;
    case ScalarType::Double: return loop_lora::Dtype::kFloat64;
    case ScalarType::BFloat16: return loop_lora::Dtype::kBFloat16;
    case ScalarType::Half: return loop_lora::Dtype::kFloat16;
    default: return std::nullopt;
  }
}

// A dimension that may be anything is -1 and shown under its name.
struct Dim {
  const char* name;
  int64_t size = -1;
};

void check_shape(const char* name, const Tensor& tensor, const std::vector<Dim>& expected) {
  const auto sizes = tensor.sizes();
  bool matches = sizes.size() == expected.size();
  for (size_t i = 0; matches && i < expected.size(); ++i) {
    matches = expected[i].size < 0 || expected[i].size == sizes[i];
  }
  if (matches) return;
  std::vector<std::string> wanted;
  for (const Dim& dim : expected) wanted.push_back(dim.size < 0 ? dim.name : std::to_string(dim.size));
  fail(name, ": found shape ", ints_text(sizes), "; expected ", list_text(wanted));
}

void check_dtype(const char* name, const Tensor& tensor, ScalarType expected) {
  if (tensor.scalar_type() == expected) return;
  fail(name, ": found dtype ", dtype_text(tensor.scalar_type()), "; expected ", dtype_text(expected));
}

void check_device(const char* name, const Tensor& tensor, const Tensor& x) {
  if (tensor.is_cpu() == x.is_cpu() && tensor.get_device_index() == x.get_device_index()) return;
  fail(name, ": lies on another device than x; expected all tensors on one device");
}

void check_contiguous(const char* name, const Tensor& tensor) {
  if (tensor.is_contiguous()) return;
  fail(name, ": found strides ", ints_text(tensor.strides()),
       "; expected a contiguous tensor (call .contiguous() once, when loading)");
}

std::vector<loop_lora::Segment> check_segments(const std::vector<int64_t>& out, const std::vector<int64_t>& rank,
                                               int64_t n, int64_t a_rank, int64_t b_rank) {
  if (out.size() != rank.size()) {
    fail("segment_rank: found ", rank.size(), " entries; expected ", out.size(), " as in segment_out");
  }
  if (out.empty()) {
    if (a_rank != b_rank) fail("lora_b: found rank ", b_rank, "; expected ", a_rank, " as in lora_a");
    return {{0, n, 0, a_rank}};
  }
  std::vector<loop_lora::Segment> segments;
  int64_t out_begin = 0, rank_begin = 0, max_rank = 0;
  for (size_t s = 0; s < out.size(); ++s) {
    if (out[s] < 0) fail("segment_out: found ", ints_text(out), "; expected no negative entry");
    if (rank[s] < 0) fail("segment_rank: found ", ints_text(rank), "; expected no negative entry");
    segments.push_back({out_begin, out[s], rank_begin, rank[s]});
    out_begin += out[s];
    rank_begin += rank[s];
    max_rank = std::max(max_rank, rank[s]);
  }
  if (out_begin != n) fail("segment_out: found ", ints_text(out), "; expected a sum of ", n, ", the weight's rows");
  if (rank_begin != a_rank) fail("lora_a: found rank ", a_rank, "; expected ", rank_begin, ", the sum of segment_rank");
  if (max_rank != b_rank) fail("lora_b: found rank ", b_rank, "; expected ", max_rank, ", the largest of segment_rank");
  return segments;
}

void torch_parallel(int64_t begin, int64_t end, int64_t grain_size, void (*body)(int64_t, int64_t, void*),
                    void* context) {
  if (begin < end) STABLE_TORCH_ERROR_CODE_CHECK(torch_parallel_for(begin, end, grain_size, body, context));
}

Tensor loop_lora_linear_cpu(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                            const Tensor& lora_a, const Tensor& lora_b, const Tensor& loops,
                            const std::vector<int64_t>& segment_out, const std::vector<int64_t>& segment_rank) {
  const auto dtype = kernel_dtype(x.scalar_type());
  if (!dtype) {
    fail("x: found dtype ", dtype_text(x.scalar_type()), "; expected float32, float64, bfloat16 or float16");
  }
  check_dtype("weight", weight, x.scalar_type());
  if (bias) check_dtype("bias", *bias, x.scalar_type());
  check_dtype("lora_a", lora_a, x.scalar_type());
  check_dtype("lora_b", lora_b, x.scalar_type());
  check_dtype("loops", loops, ScalarType::Int);
  check_device("weight", weight, x);
  if (bias) check_device("bias", *bias, x);
  check_device("lora_a", lora_a, x);
  check_device("lora_b", lora_b, x);
  check_device("loops", loops, x);

  check_shape("x", x, {{"M"}, {"K"}});
  const int64_t m = x.size(0), k = x.size(1);
  check_shape("weight", weight, {{"N"}, {"K", k}});
  const int64_t n = weight.size(0);
  if (bias) check_shape("bias", *bias, {{"N", n}});
  check_shape("lora_a", lora_a, {{"loops"}, {"R"}, {"K", k}});
  const int64_t num_loops = lora_a.size(0);
  check_shape("lora_b", lora_b, {{"loops", num_loops}, {"N", n}, {"R"}});
  check_shape("loops", loops, {{"M", m}});
  auto segments = check_segments(segment_out, segment_rank, n, lora_a.size(1), lora_b.size(2));
  check_contiguous("weight", weight);
  if (bias) check_contiguous("bias", *bias);
  check_contiguous("lora_a", lora_a);
  check_contiguous("lora_b", lora_b);

  const Tensor loops_dense = torch::stable::contiguous(loops);
  const int32_t* loop_of_row = loops_dense.const_data_ptr<int32_t>();
  const loop_lora::LoopGroups groups = loop_lora::group_rows_by_loop(loop_of_row, m, num_loops);
  if (!groups.ok()) {
    fail("loops[", groups.bad_row, "]: found ", loop_of_row[groups.bad_row], "; expected a loop in [0, ", num_loops,
         ")");
  }
  const Tensor x_rows = k <= 1 || x.stride(1) == 1 ? x : torch::stable::contiguous(x);
  const int64_t y_size[] = {m, n};
  Tensor y = torch::stable::new_empty(x, y_size);
  loop_lora::Params params{};
  params.dtype = *dtype;
  params.m = m;
  params.n = n;
  params.k = k;
  params.num_loops = num_loops;
  params.total_rank = lora_a.size(1);
  params.b_stride = lora_b.size(2);
  params.x_row_stride = x_rows.stride(0);
  params.x = x_rows.const_data_ptr();
  params.weight = weight.const_data_ptr();
  params.bias = bias ? bias->const_data_ptr() : nullptr;
  params.lora_a = lora_a.const_data_ptr();
  params.lora_b = lora_b.const_data_ptr();
  params.y = y.mutable_data_ptr();
  params.segments = std::move(segments);
  loop_lora::run_cpu(params, groups, torch_parallel);
  return y;
}

}  // namespace
}  // namespace rrt

STABLE_TORCH_LIBRARY(rrt, library) {
  library.def(
      "loop_lora_linear(Tensor x, Tensor weight, Tensor? bias, Tensor lora_a, Tensor lora_b, Tensor loops, "
      "int[] segment_out=[], int[] segment_rank=[]) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(rrt, CPU, library) {
  library.impl("loop_lora_linear", TORCH_BOX(&rrt::loop_lora_linear_cpu));
}
