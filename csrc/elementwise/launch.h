// The interface to the host side (op.cpp): raw pointers and sizes, nothing of torch. "Acc" is float (double for
// float64); everything else is of the dtype, and contiguous unless strides are given.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace rrt::elementwise {

// x [batch, length, num_heads, head_dim] -> out of the same shape. Strides are in elements; a head's are adjacent.
struct RotaryParams {
  Dtype dtype;
  int64_t batch, length, num_heads, head_dim;
  const void* x;
  int64_t batch_stride, token_stride, head_stride;
  // [batch or 1, length, half]: element i and element half + i of a head are turned by angle i, the rest is copied.
  const void* cos;
  const void* sin;
  int64_t half;
  int64_t angles_batch_stride;  // 0: one sequence's angles are every sequence's
  void* out;
};

// Each row of x [rows, width] over its root mean square, times the weight [width].
struct NormParams {
  Dtype dtype;
  int64_t rows, width;
  const void* x;
  const void* weight;
  double eps;
  bool weight_plus_one;  // the factor is 1 + weight, and nothing is rounded before it (Gemma)
  void* out;
  void* scale;  // Acc [rows]: 1 / sqrt(mean square + eps)
};

struct NormBackwardParams {
  Dtype dtype;
  int64_t rows, width;
  const void* out_grad;
  const void* x;
  const void* weight;
  bool weight_plus_one;
  const void* scale;
  void* x_grad;
  void* weight_grad;
};

enum class Activation { kSilu, kGeluTanh };

// out = activation(gate) * up.
struct GateParams {
  Dtype dtype;
  Activation activation;
  int64_t size;
  const void* gate;
  const void* up;
  void* out;
};

struct GateBackwardParams {
  Dtype dtype;
  Activation activation;
  int64_t size;
  const void* out_grad;
  const void* gate;
  const void* up;
  void* gate_grad;
  void* up_grad;
};

// out = a + b; out may be a or b.
struct AddParams {
  Dtype dtype;
  int64_t size;
  const void* a;
  const void* b;
  void* out;
};

void rotary_cpu(const RotaryParams& params, ParallelFor parallel_for);
void norm_cpu(const NormParams& params, ParallelFor parallel_for);
void norm_backward_cpu(const NormBackwardParams& params, ParallelFor parallel_for);
void gate_cpu(const GateParams& params, ParallelFor parallel_for);
void gate_backward_cpu(const GateBackwardParams& params, ParallelFor parallel_for);
void add_cpu(const AddParams& params, ParallelFor parallel_for);

}  // namespace rrt::elementwise
