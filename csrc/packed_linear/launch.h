// The packed form of weights, and the interface to the host side (op.cpp): raw pointers and sizes, nothing of torch.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "rounding.h"

namespace rrt::packed_linear {

// A matrix [N, K] is packed for kernels that read every weight once: into panels of kPanel outputs, each
// [steps, kPanel, step] with step = 2 adjacent columns for bfloat16 (as dot-product instructions take them), else 1;
// steps = ceil(K / step). Missing outputs and columns are zeros.
constexpr int64_t kPanel = 32;

static constexpr int64_t pack_step(Dtype dtype) { return dtype == Dtype::kBFloat16 ? 2 : 1; }
static constexpr int64_t pack_steps(Dtype dtype, int64_t k) { return ceil_div(k, pack_step(dtype)); }
static constexpr int64_t num_panels(int64_t n) { return ceil_div(n, kPanel); }
static constexpr int64_t packed_size(Dtype dtype, int64_t n, int64_t k) {
  return num_panels(n) * kPanel * pack_steps(dtype, k) * pack_step(dtype);
}

// `count` contiguous matrices [n, k] into their packed forms, one after the other.
void pack_cpu(Dtype dtype, const void* from, int64_t count, int64_t n, int64_t k, void* to, ParallelFor parallel_for);

// The normaliser and the argmax of a softmax over the logits x W^T [m, n], which never lie in memory.
struct StatisticsParams {
  Dtype dtype;
  int64_t m, n, k;
  int64_t x_row_stride;  // elements from one row of x to the next; columns are adjacent
  const void* x;
  const void* weight;  // packed; n is at least 1
  void* log_sum_exp;   // [m] float (double for float64): the logarithm of the sum of a row's exponentials
  int64_t* argmax;     // [m]: the first of a row's largest
};

// Bitwise the same for a row in any batch.
void statistics_cpu(const StatisticsParams& params, ParallelFor parallel_for);

}  // namespace rrt::packed_linear
