// The CPU kernels' inner parts, compiled once per instruction set and chosen at run time (cpu.cpp).
#pragma once

#include "cpu_isa.h"
#include "elementwise/launch.h"
#include "rounding.h"

namespace rrt::elementwise {

// Rows whose shares in a weight's gradient are summed by themselves, whatever the number of threads.
constexpr int64_t kShareRows = 64;

static inline int64_t shares_of(int64_t rows) { return ceil_div(rows, kShareRows); }

// All are indexed by Dtype.
struct CpuKernels {
  // Tokens of the batch, [begin, end).
  void (*rotary[4])(const RotaryParams& params, int64_t begin, int64_t end);
  void (*norm[4])(const NormParams& params, int64_t begin, int64_t end);  // rows
  // Rows of one share, and what they give to the weight's gradient: Acc [shares, width].
  void (*norm_backward[4])(const NormBackwardParams& params, int64_t share, void* shares);
  // Columns [begin, end) of the weight's gradient from all shares.
  void (*sum_shares[4])(const NormBackwardParams& params, const void* shares, int64_t begin, int64_t end);
  void (*gate[4])(const GateParams& params, int64_t begin, int64_t end);  // elements
  void (*gate_backward[4])(const GateBackwardParams& params, int64_t begin, int64_t end);
  void (*add[4])(const AddParams& params, int64_t begin, int64_t end);  // elements
};

RRT_DECLARE_CPU_KERNELS(CpuKernels);

}  // namespace rrt::elementwise
