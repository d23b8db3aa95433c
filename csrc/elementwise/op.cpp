// rrt::rotary_embedding, rrt::rms_norm, rrt::gated_activation and their gradients on torch's stable ABI: schemas and
// argument checks. The kernels lie behind raw-pointer launch functions and know nothing of torch.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <string>
#include <tuple>

#include "checks.h"
#include "elementwise/check_activation.h"
#include "elementwise/launch.h"

namespace rrt {
namespace {

void check_like(const Checks& check, const char* name, const Tensor& tensor, const Tensor& first,
                const char* first_name) {
  check.dtype(name, tensor, first.scalar_type());
  check.same_device(name, tensor, first, first_name);
}

void check_same_shape(const Checks& check, const char* name, const Tensor& tensor, const Tensor& first) {
  std::vector<Dim> sizes;
  for (int64_t size : first.sizes()) sizes.push_back({"", size});
  check.shape(name, tensor, sizes);
}

Tensor rotary_embedding_cpu(const Tensor& x, const Tensor& cos, const Tensor& sin) {
  constexpr Checks check{"rotary_embedding"};
  const Dtype dtype = check.float_dtype("x", x);
  check_like(check, "cos", cos, x, "x");
  check_like(check, "sin", sin, x, "x");
  check.shape("x", x, {{"B"}, {"T"}, {"H"}, {"D_h"}});
  const int64_t batch = x.size(0), length = x.size(1), num_heads = x.size(2), head_dim = x.size(3);
  const bool shared = cos.sizes().size() == 3 && cos.size(0) == 1;
  check.shape("cos", cos, {{"B", shared ? 1 : batch}, {"T", length}, {"rotary_dim / 2"}});
  check_same_shape(check, "sin", sin, cos);
  const int64_t half = cos.size(2);
  if (2 * half > head_dim) check.fail("cos: found ", half, " angles; expected at most half of x's D_h, ", head_dim);
  const Tensor dense = with_dense_last_dim(x);
  const Tensor dense_cos = torch::stable::contiguous(cos), dense_sin = torch::stable::contiguous(sin);
  Tensor out = empty_as(x);
  elementwise::RotaryParams params{};
  params.dtype = dtype;
  params.batch = batch;
  params.length = length;
  params.num_heads = num_heads;
  params.head_dim = head_dim;
  params.x = dense.const_data_ptr();
  params.batch_stride = dense.stride(0);
  params.token_stride = dense.stride(1);
  params.head_stride = dense.stride(2);
  params.cos = dense_cos.const_data_ptr();
  params.sin = dense_sin.const_data_ptr();
  params.half = half;
  params.angles_batch_stride = shared ? 0 : length * half;
  params.out = out.mutable_data_ptr();
  elementwise::rotary_cpu(params, torch_parallel);
  return out;
}

ScalarType wide_dtype(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

struct NormSize {
  Dtype dtype;
  int64_t rows, width;
};

NormSize check_norm(const Checks& check, const Tensor& x, const Tensor& weight) {
  const Dtype dtype = check.float_dtype("x", x);
  check_like(check, "weight", weight, x, "x");
  if (x.sizes().size() == 0) check.fail("x: found shape []; expected [..., D]");
  const int64_t width = x.size(-1);
  check.shape("weight", weight, {{"D", width}});
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < static_cast<int64_t>(x.sizes().size()); ++i) rows *= x.size(i);
  return {dtype, rows, width};
}

std::tuple<Tensor, Tensor> rms_norm_cpu(const Tensor& x, const Tensor& weight, double eps, bool weight_plus_one) {
  constexpr Checks check{"rms_norm"};
  const auto [dtype, rows, width] = check_norm(check, x, weight);
  const Tensor dense = torch::stable::contiguous(x), dense_weight = torch::stable::contiguous(weight);
  const int64_t scale_size[] = {rows};
  Tensor out = empty_as(x), scale = torch::stable::new_empty(x, scale_size, wide_dtype(x));
  elementwise::NormParams params{};
  params.dtype = dtype;
  params.rows = rows;
  params.width = width;
  params.x = dense.const_data_ptr();
  params.weight = dense_weight.const_data_ptr();
  params.eps = eps;
  params.weight_plus_one = weight_plus_one;
  params.out = out.mutable_data_ptr();
  params.scale = scale.mutable_data_ptr();
  elementwise::norm_cpu(params, torch_parallel);
  return {out, scale};
}

std::tuple<Tensor, Tensor> rms_norm_backward_cpu(const Tensor& out_grad, const Tensor& x, const Tensor& weight,
                                                 const Tensor& scale, bool weight_plus_one) {
  constexpr Checks check{"rms_norm_backward"};
  const auto [dtype, rows, width] = check_norm(check, x, weight);
  check_like(check, "out_grad", out_grad, x, "x");
  check_same_shape(check, "out_grad", out_grad, x);
  check.dtype("scale", scale, wide_dtype(x));
  check.same_device("scale", scale, x, "x");
  check.shape("scale", scale, {{"rows", rows}});
  check.contiguous("scale", scale);
  const Tensor dense_grad = torch::stable::contiguous(out_grad), dense = torch::stable::contiguous(x),
               dense_weight = torch::stable::contiguous(weight);
  Tensor x_grad = empty_as(x), weight_grad = empty_as(weight);
  elementwise::NormBackwardParams params{};
  params.dtype = dtype;
  params.rows = rows;
  params.width = width;
  params.out_grad = dense_grad.const_data_ptr();
  params.x = dense.const_data_ptr();
  params.weight = dense_weight.const_data_ptr();
  params.weight_plus_one = weight_plus_one;
  params.scale = scale.const_data_ptr();
  params.x_grad = x_grad.mutable_data_ptr();
  params.weight_grad = weight_grad.mutable_data_ptr();
  elementwise::norm_backward_cpu(params, torch_parallel);
  return {x_grad, weight_grad};
}

struct GateKind {
  Dtype dtype;
  elementwise::Activation activation;
};

GateKind check_gate(const Checks& check, const Tensor& gate, const Tensor& up, const std::string& activation) {
  const Dtype dtype = check.float_dtype("gate", gate);
  check_like(check, "up", up, gate, "gate");
  check_same_shape(check, "up", up, gate);
  return {dtype, check_activation(check, activation)};
}

Tensor gated_activation_cpu(const Tensor& gate, const Tensor& up, std::string activation) {
  constexpr Checks check{"gated_activation"};
  const auto [dtype, kind] = check_gate(check, gate, up, activation);
  const Tensor dense_gate = torch::stable::contiguous(gate), dense_up = torch::stable::contiguous(up);
  Tensor out = empty_as(gate);
  elementwise::GateParams params{};
  params.dtype = dtype;
  params.activation = kind;
  params.size = gate.numel();
  params.gate = dense_gate.const_data_ptr();
  params.up = dense_up.const_data_ptr();
  params.out = out.mutable_data_ptr();
  elementwise::gate_cpu(params, torch_parallel);
  return out;
}

std::tuple<Tensor, Tensor> gated_activation_backward_cpu(const Tensor& out_grad, const Tensor& gate, const Tensor& up,
                                                         std::string activation) {
  constexpr Checks check{"gated_activation_backward"};
  const auto [dtype, kind] = check_gate(check, gate, up, activation);
  check_like(check, "out_grad", out_grad, gate, "gate");
  check_same_shape(check, "out_grad", out_grad, gate);
  const Tensor dense_grad = torch::stable::contiguous(out_grad), dense_gate = torch::stable::contiguous(gate),
               dense_up = torch::stable::contiguous(up);
  Tensor gate_grad = empty_as(gate), up_grad = empty_as(gate);
  elementwise::GateBackwardParams params{};
  params.dtype = dtype;
  params.activation = kind;
  params.size = gate.numel();
  params.out_grad = dense_grad.const_data_ptr();
  params.gate = dense_gate.const_data_ptr();
  params.up = dense_up.const_data_ptr();
  params.gate_grad = gate_grad.mutable_data_ptr();
  params.up_grad = up_grad.mutable_data_ptr();
  elementwise::gate_backward_cpu(params, torch_parallel);
  return {gate_grad, up_grad};
}

}  // namespace
}  // namespace rrt

STABLE_TORCH_LIBRARY_FRAGMENT(rrt, library) {
  library.def("rotary_embedding(Tensor x, Tensor cos, Tensor sin) -> Tensor");
  library.def("rms_norm(Tensor x, Tensor weight, float eps, bool weight_plus_one) -> (Tensor, Tensor)");
  library.def(
      "rms_norm_backward(Tensor out_grad, Tensor x, Tensor weight, Tensor scale, bool weight_plus_one) -> "
      "(Tensor, Tensor)");
  library.def("gated_activation(Tensor gate, Tensor up, str activation) -> Tensor");
  library.def("gated_activation_backward(Tensor out_grad, Tensor gate, Tensor up, str activation) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(rrt, CPU, library) {
  library.impl("rotary_embedding", TORCH_BOX(&rrt::rotary_embedding_cpu));
  library.impl("rms_norm", TORCH_BOX(&rrt::rms_norm_cpu));
  library.impl("rms_norm_backward", TORCH_BOX(&rrt::rms_norm_backward_cpu));
  library.impl("gated_activation", TORCH_BOX(&rrt::gated_activation_cpu));
  library.impl("gated_activation_backward", TORCH_BOX(&rrt::gated_activation_backward_cpu));
}
