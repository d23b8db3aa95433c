// The interface to the host side (op.cpp): raw pointers and sizes, nothing of torch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "dtype.h"
#include "elementwise/launch.h"
#include "loop_lora/plan.h"

namespace rrt::loop_lora {

// Output rows [out_begin, out_begin + out_size) of the weight have adapters of their own: rows
// [rank_begin, rank_begin + rank) of lora_a and the first `rank` columns of lora_b.
struct Segment {
  int64_t out_begin;
  int64_t out_size;
  int64_t rank_begin;
  int64_t rank;
};
constexpr size_t kMaxSegments = 8;

// y[m] = weight x[m] + bias + lora_b[l(m)] lora_a[l(m)] x[m]; every tensor of one dtype and, but for x,
// contiguous. The caller has checked shapes and loops.
struct Params {
  Dtype dtype;
  bool packed;  // weight, lora_a and lora_b are as packed_linear/launch.h packs them, loop after loop
  int64_t m, n, k;
  int64_t num_loops;
  int64_t total_rank;        // R of lora_a [num_loops, R, k]: the sum of the segments' ranks
  int64_t b_stride;          // columns of lora_b [num_loops, n, b_stride]: the largest of the segments' ranks
  int64_t x_row_stride;      // elements from one row of x to the next; columns are adjacent
  int64_t bias_loop_stride;  // elements from one loop's bias to the next: n, or 0 for one that all share
  const void* x;
  const void* weight;
  const void* bias;  // null: none
  const void* lora_a;
  const void* lora_b;
  void* y;  // [m, n], contiguous
  std::vector<Segment> segments;  // in order, covering [0, n) and [0, total_rank)
  // If not null, y is activation(gate_weight x + gate_bias) * y, with both factors rounded to the dtype first; then there
  // is no LoRA, and the weights are packed.
  const void* gate_weight;
  const void* gate_bias;  // [n], or null
  elementwise::Activation activation;
  // On the CPU, panels of the outputs and of the ranks (packed_linear/launch.h) that are left out: y keeps what it has
  // in those outputs. Segments with an output that is computed have none of their ranks left out.
  int64_t first_panel = 0, first_rank_panel = 0;
};

// The result of a row depends on that row and its loop alone: bitwise the same in any batch.
void run_cpu(const Params& params, const LoopGroups& groups, ParallelFor parallel_for);

}  // namespace rrt::loop_lora
