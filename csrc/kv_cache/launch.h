// The interface to the host side (op.cpp): raw pointers and sizes, nothing of torch.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "kv_cache/plan.h"

namespace rrt::kv_cache {

// Row positions[i] of cos_sin [max_positions, rotary_dim]: the cosines, then the sines, of rotary_dim / 2 angles,
// in float (double for float64). Null: nothing is rotated.
struct Rope {
  const int32_t* positions;
  const void* cos_sin;
  int64_t rotary_dim;
};

// Strides are in elements; a head's elements are adjacent. Caches are [num_pages, page_size, num_kv_heads, head_dim],
// contiguous. The caller has checked every value.
struct WriteParams {
  Dtype dtype;
  int64_t m, num_kv_heads, head_dim;
  int64_t k_row_stride, k_head_stride, v_row_stride, v_head_stride;
  const void* k;  // [m, num_kv_heads, head_dim]
  const void* v;
  void* k_cache;
  void* v_cache;
  const int64_t* slots;  // [m]; -1: the row is skipped
  Rope rope;
};

struct AttentionParams {
  Dtype dtype;
  int64_t num_queries, num_heads, num_kv_heads, head_dim, page_size;
  double scale;
  int64_t q_row_stride, q_head_stride;
  const void* q;  // [num_queries, num_heads, head_dim]
  const void* k_cache;
  const void* v_cache;
  const int32_t* block_tables;  // [sequences, max_pages]; entries of a row are adjacent
  int64_t table_stride;
  Rope rope;
  void* out;  // [num_queries, num_heads, head_dim], contiguous
};

void write_cpu(const WriteParams& params, ParallelFor parallel_for);

// A sequence's results are bitwise the same whatever other sequences are in the batch.
void attention_cpu(const AttentionParams& params, const AttentionPlan& plan, ParallelFor parallel_for);

}  // namespace rrt::kv_cache
