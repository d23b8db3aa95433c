// The interface to the host side (op.cpp): raw pointers and sizes, nothing of torch.
#pragma once

#include <cstdint>
#include <vector>

#include "dtype.h"
#include "elementwise/launch.h"
#include "kv_cache/launch.h"
#include "loop_lora/launch.h"

namespace rrt::decode_block {

// A norm's weight [width]; or [num_loops, width], where one loop's lies `loop_stride` elements after the one before.
struct NormWeight {
  const void* data;     // null: no such norm
  int64_t loop_stride;  // 0: all loops share one
};

// Of the linears, run_cpu() fills in m, x, x_row_stride and y.
struct Layer {
  NormWeight attn_norm, q_norm, k_norm, mlp_norm;
  loop_lora::Params qkv, out, gate_up, down;
  void* k_cache;  // [num_pages, page_size, num_kv_heads, head_dim]
  void* v_cache;
};

// One pass of the layers over kv-only rows, then decode rows. The caller has checked every value.
struct Params {
  Dtype dtype;
  int64_t rows, num_kv_only, hidden_size, num_heads, num_kv_heads, head_dim, inner_size;
  int64_t num_loops;
  const int32_t* loops;  // [rows]
  double norm_eps;
  bool norm_plus_one;
  elementwise::Activation activation;
  const int64_t* slots;  // [rows]
  kv_cache::Rope rope;   // positions are those of all rows
  int64_t page_size;
  double scale;
  const int32_t* block_tables;  // [rows - num_kv_only, max_pages]; entries of a row are adjacent
  int64_t table_stride;
  const int32_t* context_lens;  // [rows - num_kv_only]
  std::vector<Layer> layers;
  const void* x;  // [rows, hidden_size], contiguous
  void* out;      // the same; not x
};

// A row's result, and what it writes, are bitwise the same whatever other rows are in the pass.
void run_cpu(const Params& params, ParallelFor parallel_for);

}  // namespace rrt::decode_block
