// rrt::causal_attention and its gradient on torch's stable ABI: schemas and argument checks. The kernels lie behind
// raw-pointer launch functions and know nothing of torch.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <tuple>

#include "attention/launch.h"
#include "checks.h"

namespace rrt {
namespace {

constexpr Checks forward_check{"causal_attention"};
constexpr Checks backward_check{"causal_attention_backward"};

attention::Shape check_shape(const Checks& check, const Tensor& q, const Tensor& k, const Tensor& v, double scale,
                             const std::optional<Tensor>& seen_until) {
  const Dtype dtype = check.float_dtype("q", q);
  check.dtype("k", k, q.scalar_type());
  check.dtype("v", v, q.scalar_type());
  check.same_device("k", k, q, "q");
  check.same_device("v", v, q, "q");
  check.shape("q", q, {{"B"}, {"T"}, {"H"}, {"D_h"}});
  const int64_t batch = q.size(0), length = q.size(1), num_heads = q.size(2), head_dim = q.size(3);
  check.shape("k", k, {{"B", batch}, {"T", length}, {"H_kv"}, {"D_h", head_dim}});
  const int64_t num_kv_heads = k.size(2);
  check.shape("v", v, {{"B", batch}, {"T", length}, {"H_kv", num_kv_heads}, {"D_h", head_dim}});
  if (num_kv_heads > 0 ? num_heads % num_kv_heads != 0 : num_heads != 0) {
    check.fail("q: found ", num_heads, " heads; expected a multiple of k's ", num_kv_heads);
  }
  if (seen_until) {
    check.dtype("seen_until", *seen_until, ScalarType::Int);
    check.same_device("seen_until", *seen_until, q, "q");
    check.shape("seen_until", *seen_until, {{"B", batch}, {"T", length}});
    check.contiguous("seen_until", *seen_until);
  }
  attention::Shape shape{};
  shape.dtype = dtype;
  shape.batch = batch;
  shape.length = length;
  shape.num_heads = num_heads;
  shape.num_kv_heads = num_kv_heads;
  shape.head_dim = head_dim;
  shape.scale = scale;
  shape.seen_until = seen_until ? seen_until->const_data_ptr<int32_t>() : nullptr;
  return shape;
}

attention::View view_of(const Tensor& x) { return {x.const_data_ptr(), x.stride(0), x.stride(1), x.stride(2)}; }

ScalarType lse_dtype(const Tensor& q) {
  return q.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

std::tuple<Tensor, Tensor> causal_attention_cpu(const Tensor& q, const Tensor& k, const Tensor& v, double scale,
                                                const std::optional<Tensor>& seen_until) {
  const attention::Shape shape = check_shape(forward_check, q, k, v, scale, seen_until);
  const Tensor dense_q = with_dense_last_dim(q), dense_k = with_dense_last_dim(k), dense_v = with_dense_last_dim(v);
  const int64_t lse_size[] = {shape.batch, shape.num_heads, shape.length};
  Tensor out = empty_as(q), lse = torch::stable::new_empty(q, lse_size, lse_dtype(q));
  attention::ForwardParams params{};
  params.shape = shape;
  params.q = view_of(dense_q);
  params.k = view_of(dense_k);
  params.v = view_of(dense_v);
  params.out = out.mutable_data_ptr();
  params.lse = lse.mutable_data_ptr();
  attention::forward_cpu(params, torch_parallel);
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> causal_attention_backward_cpu(const Tensor& out_grad, const Tensor& q,
                                                                 const Tensor& k, const Tensor& v, const Tensor& out,
                                                                 const Tensor& lse, double scale,
                                                                 const std::optional<Tensor>& seen_until) {
  const Checks& check = backward_check;
  const attention::Shape shape = check_shape(check, q, k, v, scale, seen_until);
  const auto check_like_q = [&](const char* name, const Tensor& tensor) {
    check.dtype(name, tensor, q.scalar_type());
    check.same_device(name, tensor, q, "q");
    check.shape(name, tensor,
                {{"B", shape.batch}, {"T", shape.length}, {"H", shape.num_heads}, {"D_h", shape.head_dim}});
  };
  check_like_q("out_grad", out_grad);
  check_like_q("out", out);
  check.dtype("lse", lse, lse_dtype(q));
  check.same_device("lse", lse, q, "q");
  check.shape("lse", lse, {{"B", shape.batch}, {"H", shape.num_heads}, {"T", shape.length}});
  check.contiguous("lse", lse);
  const Tensor dense_grad = with_dense_last_dim(out_grad), dense_out = with_dense_last_dim(out);
  const Tensor dense_q = with_dense_last_dim(q), dense_k = with_dense_last_dim(k), dense_v = with_dense_last_dim(v);
  Tensor q_grad = empty_as(q), k_grad = empty_as(k), v_grad = empty_as(v);
  attention::BackwardParams params{};
  params.shape = shape;
  params.out_grad = view_of(dense_grad);
  params.q = view_of(dense_q);
  params.k = view_of(dense_k);
  params.v = view_of(dense_v);
  params.out = view_of(dense_out);
  params.lse = lse.const_data_ptr();
  params.q_grad = q_grad.mutable_data_ptr();
  params.k_grad = k_grad.mutable_data_ptr();
  params.v_grad = v_grad.mutable_data_ptr();
  attention::backward_cpu(params, torch_parallel);
  return {q_grad, k_grad, v_grad};
}

}  // namespace
}  // namespace rrt

STABLE_TORCH_LIBRARY_FRAGMENT(rrt, library) {
  library.def(
      "causal_attention(Tensor q, Tensor k, Tensor v, float scale, Tensor? seen_until=None) -> (Tensor, Tensor)");
  library.def(
      "causal_attention_backward(Tensor out_grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
      "float scale, Tensor? seen_until=None) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(rrt, CPU, library) {
  library.impl("causal_attention", TORCH_BOX(&rrt::causal_attention_cpu));
  library.impl("causal_attention_backward", TORCH_BOX(&rrt::causal_attention_backward_cpu));
}
