// The CPU kernels' inner parts, compiled once per instruction set and chosen at run time (cpu.cpp).
#pragma once

#include "cpu_isa.h"
#include "kv_cache/launch.h"

namespace rrt::kv_cache {

// Buffers hold the accumulation type (double for float64, else float) unless a comment says otherwise.

// The state of an online softmax, per row: the largest score, the sum of exp(score - largest), and the sum of the
// values with these weights.
struct SoftmaxState {
  void* max;  // [rows]
  void* sum;  // [rows]
  void* out;  // [rows, padded_dim]
};

struct AttentionWork {
  const AttentionParams* params;
  const AttentionTask* tasks;
  const MergeTask* merges;
  int64_t padded_dim;    // head_dim up to a multiple of kPadDim
  SoftmaxState partial;  // [num_partial * num_heads] rows: per task all queries of head 0, then of head 1, ...
};

// One thread's memory. Operands of products are in the units of the instruction set (simd_products.h).
struct Scratch {
  int64_t* offsets;       // [kTileSlots]
  int64_t* next_offsets;  // [kTileSlots]
  void* row;              // [padded_dim]
  void* q;                // [rows, padded_dim]
  void* k;                // [padded_dim, kTileSlots]: transposed
  void* v;                // [kTileSlots, padded_dim]
  void* scores;           // [rows, kTileSlots]
  void* probabilities;    // [rows, kTileSlots]
  SoftmaxState split;     // of one piece of the context
  SoftmaxState total;     // of all pieces so far
};

constexpr int64_t kPadDim = 32;     // no kernel's vector has more elements
constexpr int64_t kReadBehind = 15;  // rows of left operands that tiles (AMX) read behind the last
constexpr int64_t kTileSlots = 64;  // slots that are staged at a time; divides kSplitSlots

struct CpuKernels {
  // All are indexed by Dtype.
  void (*write[4])(const WriteParams& params, int64_t begin, int64_t end);  // over rows
  void (*attend[4])(const AttentionWork& work, int64_t task, int64_t kv_head, const Scratch& scratch);
  void (*merge[4])(const AttentionWork& work, int64_t merge, int64_t kv_head);
};

RRT_DECLARE_CPU_KERNELS(CpuKernels);

}  // namespace rrt::kv_cache
