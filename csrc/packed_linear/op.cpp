// rrt::pack_linear and rrt::logit_statistics on torch's stable ABI: schemas and argument checks. The kernels lie behind
// raw-pointer launch functions and know nothing of torch.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>
#include <vector>

#include "checks.h"
#include "packed_linear/launch.h"

namespace rrt {
namespace {

Tensor pack_linear_cpu(const Tensor& weight) {
  constexpr Checks check{"pack_linear"};
  const Dtype dtype = check.float_dtype("weight", weight);
  const bool stacked = weight.sizes().size() == 3;
  if (!stacked) check.shape("weight", weight, {{"N"}, {"K"}});
  check.contiguous("weight", weight);
  const int64_t count = stacked ? weight.size(0) : 1, n = weight.size(-2), k = weight.size(-1);
  std::vector<int64_t> size{packed_linear::num_panels(n), packed_linear::pack_steps(dtype, k),
                            packed_linear::kPanel * packed_linear::pack_step(dtype)};
  if (stacked) size.insert(size.begin(), count);
  Tensor packed = torch::stable::new_empty(weight, size);
  packed_linear::pack_cpu(dtype, weight.const_data_ptr(), count, n, k, packed.mutable_data_ptr(), torch_parallel);
  return packed;
}

std::tuple<Tensor, Tensor> logit_statistics_cpu(const Tensor& x, const Tensor& packed, int64_t num_logits) {
  constexpr Checks check{"logit_statistics"};
  const Dtype dtype = check.float_dtype("x", x);
  check.dtype("packed", packed, x.scalar_type());
  check.same_device("packed", packed, x, "x");
  check.shape("x", x, {{"M"}, {"K"}});
  if (num_logits < 1) check.fail("num_logits: found ", num_logits, "; expected at least 1");
  const int64_t m = x.size(0), k = x.size(1);
  check.shape("packed", packed,
              {{"panels", packed_linear::num_panels(num_logits)},
               {"steps", packed_linear::pack_steps(dtype, k)},
               {"values", packed_linear::kPanel * packed_linear::pack_step(dtype)}});
  check.contiguous("packed", packed);
  const Tensor dense = with_dense_last_dim(x);
  const int64_t size[] = {m};
  Tensor log_sum_exp =
      torch::stable::new_empty(x, size, dtype == Dtype::kFloat64 ? ScalarType::Double : ScalarType::Float);
  Tensor argmax = torch::stable::new_empty(x, size, ScalarType::Long);
  packed_linear::StatisticsParams params{};
  params.dtype = dtype;
  params.m = m;
  params.n = num_logits;
  params.k = k;
  params.x_row_stride = m > 1 ? dense.stride(0) : k;
  params.x = dense.const_data_ptr();
  params.weight = packed.const_data_ptr();
  params.log_sum_exp = log_sum_exp.mutable_data_ptr();
  params.argmax = argmax.mutable_data_ptr<int64_t>();
  packed_linear::statistics_cpu(params, torch_parallel);
  return {log_sum_exp, argmax};
}

}  // namespace
}  // namespace rrt

STABLE_TORCH_LIBRARY_FRAGMENT(rrt, library) {
  library.def("logit_statistics(Tensor x, Tensor packed, int num_logits) -> (Tensor, Tensor)");
  library.def("pack_linear(Tensor weight) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(rrt, CPU, library) {
  library.impl("logit_statistics", TORCH_BOX(&rrt::logit_statistics_cpu));
  library.impl("pack_linear", TORCH_BOX(&rrt::pack_linear_cpu));
}
