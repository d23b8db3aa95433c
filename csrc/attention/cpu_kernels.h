// The CPU kernels' inner parts, compiled once per instruction set and chosen at run time (cpu.cpp).
#pragma once

#include "attention/launch.h"
#include "cpu_isa.h"
#include "rounding.h"

namespace rrt::attention {

constexpr int64_t kTile = 64;  // keys that are laid out at a time; queries, and keys, that the backward multiplies
constexpr int64_t kSegment = 64;  // keys that the forward's running softmax takes at a time
constexpr int64_t kPadDim = 32;   // no kernel's vector has more elements

static inline int64_t tiles_of(int64_t length) { return ceil_div(length, kTile); }
static inline int64_t padded_dim(const Shape& shape) { return round_up(shape.head_dim, kPadDim); }

// One thread's memory, in elements of the accumulation type (double for float64, else float); operands of products
// take at most as much, as the instruction set wants them. Matrices of tiles have dim x kTile elements each. The
// columns of the forward's matrices are queries of several heads, at most kTile.
struct ForwardScratch {
  void* keys;           // tiles of [kTile, dim]
  void* values;         // tiles of [kTile, dim], or where products run on tiles (AMX) [dim, kTile]
  void* q;              // [dim, columns]
  void* scores;         // [kSegment keys, columns]
  void* probabilities;  // the same
  void* max;            // [columns]
  void* sum;            // [columns]
  void* out;            // [dim, columns]
  void* seen_until;     // tiles of [kTile] integers
  void* block_sight;    // at most as many
};

struct BackwardScratch {
  // Of one tile of keys.
  void* k_rows;     // [kTile, dim]
  void* k_columns;  // [dim, kTile]
  void* v_rows;     // [kTile, dim]
  void* k_grad;     // [kTile, dim]
  void* v_grad;     // [kTile, dim]
  // Of all tiles of queries.
  void* q_columns;    // tiles of [dim, kTile]
  void* q_rows;       // tiles of [kTile, dim]
  void* out_columns;  // the same of the output's gradient
  void* out_rows;
  void* lse;    // tiles of [kTile]
  void* delta;  // tiles of [kTile]: output . its gradient
  void* q_grad;  // tiles of [dim, kTile]
  // Of one tile of keys and one of queries: [kTile keys, kTile queries].
  void* scores;
  void* probability_grads;
  void* probabilities;  // as a left operand
  void* score_rows;     // the scores' gradient as a left operand
  void* score_pairs;    // and as a right one
  void* seen_until;     // tiles of [kTile] integers
};

struct CpuKernels {
  // All are indexed by Dtype.
  // Queries [first, end) of all query heads of one key/value head; `first` begins a tile.
  void (*forward[4])(const ForwardParams& params, int64_t batch, int64_t kv_head, int64_t first, int64_t end,
                     const ForwardScratch& scratch);
  // One query head.
  void (*backward[4])(const BackwardParams& params, int64_t batch, int64_t head, const BackwardScratch& scratch);
  // The sum of the shares in one key/value head.
  void (*sum_shares[4])(const BackwardParams& params, int64_t batch, int64_t kv_head);
};

RRT_DECLARE_CPU_KERNELS(CpuKernels);

}  // namespace rrt::attention
