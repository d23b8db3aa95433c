// The interface to the host side (op.cpp): raw pointers and sizes, nothing of torch.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace rrt::attention {

struct Shape {
  Dtype dtype;
  int64_t batch, length, num_heads, num_kv_heads, head_dim;
  double scale;
  // [batch, length], contiguous: a token sees itself and, of those before it, each j with seen_until[j] beyond the
  // token. Null: it sees all of them.
  const int32_t* seen_until = nullptr;
};

// [batch, length, heads, head_dim]. Strides are in elements; a head's elements are adjacent.
struct View {
  const void* data;
  int64_t batch_stride, token_stride, head_stride;
};

// Results are contiguous. lse [batch, num_heads, length] is float (double for float64): the logarithm of the sum of
// a query's exponentials.
struct ForwardParams {
  Shape shape;
  View q, k, v;
  void* out;  // as q
  void* lse;
};

struct BackwardParams {
  Shape shape;
  View out_grad, q, k, v, out;
  const void* lse;
  void* q_grad;  // as q
  void* k_grad;  // as k
  void* v_grad;
  // Set by backward_cpu: the shares of query heads in k_grad and v_grad, [2, batch, num_heads, length, padded
  // head_dim] of lse's type; null where every query head has a key/value head of its own.
  void* shares = nullptr;
};

void forward_cpu(const ForwardParams& params, ParallelFor parallel_for);
void backward_cpu(const BackwardParams& params, ParallelFor parallel_for);

}  // namespace rrt::attention
