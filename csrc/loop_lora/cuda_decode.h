// The common part of the decode kernels, which compute y = W x + b + B_l (A_l x) for tokens of mixed loops and read W
// once for all of them. The kernels themselves are in cuda_column_kernel.h and cuda_row_kernel.h.
//
//   token      A row of x. Rows of W are the mma's M, tokens its N.
//   shrink     The kernel that writes T = A_l x, as Punica and vLLM call it. The product that follows adds B_l T to
//              W x, for which they launch a kernel of its own ("expand").
//   tile       The outputs (rows of W) and tokens of one thread block.
//   part       One of kParts shares of the columns of W, and of the ranks of B_l. A part is summed by itself, first
//              over W, then over the B_l of each loop in the tile, with zeros for the T of tokens of other loops; then
//              the parts' sums are added in order.
//   slice      Some of the parts of a tile, as the work of one thread block of the row kernel: split-K. With several
//              slices, the parts' sums go to memory and a third kernel adds them. Shrink may be split likewise.
//   k-step     32 columns of W and x, or 32 ranks of B_l and T.
//   turn       Two k-steps: what a stage of the pipeline holds, and a warp multiplies at a time. In W they are
//              adjacent, so that a turn has whole lines of memory; the last turn of a part may have one k-step only.
//   stage      A place for one turn in the ring of asynchronous copies in shared memory.
//   loop mask  Bit l: some token of the tile is of loop l.
//   segment    Consecutive outputs with a LoRA of their own (launch.h).
//
// The order of every sum depends on the layer's shape alone: not on the other tokens of the batch, nor on how they are
// tiled and sliced, nor on which of the two kernels runs. So a token's result has the same bits in any batch.
//
// Kernels are chained by programmatic dependent launch: each lets the next one start, and before it reads what the
// kernels before it wrote, or writes anything, it waits for them to end. Every thread block waits, since the kernel
// after the next relies on it. Shrink fills its ring with A_l before it waits, unless too much of that might be of loops
// that no token has (`prefetches`). The product fetches W before it waits, in one of two orders:
//   early   Shrink lets it start at once. It fills its ring with W, perhaps while the operator before still runs, waits
//           until T is there, reads x, and streams the rest.
//   late    Shrink waits first, and then lets what follows start. So x and the loops are there for the product, which
//           streams W beside shrink, and waits before it reads T or writes. A long shrink is hidden this way. Before it
//           waits, shrink asks the second-level cache for some of W.
#pragma once

#include <cmath>
#include <cstdint>

#include "device/primitives.h"
#include "loop_lora/launch.h"
#include "rounding.h"
#include "type_list.h"

namespace rrt::loop_lora {

// All pointers are to device memory and aligned to 16 bytes, as every row of a matrix is.
struct DecodeArgs {
  const void* x;           // [m, k], rows at x_stride
  int64_t x_stride;
  const int32_t* loops;    // [m]; a row outside [0, num_loops) gets NaN: finding it on the host would wait
  const void* weight;      // [n, k]
  const void* bias;        // [n], or [num_loops, n] at bias_loop_stride n; null: none
  int64_t bias_loop_stride;
  const void* lora_a;      // [num_loops, total_rank, k]
  const void* lora_b;      // [num_loops, n, b_stride]
  void* shrunk;            // T [num_loops, padded_m, total_rank], written by shrink
  float* shrink_sums;      // [kParts, m, total_rank], written by shrink if it is split
  float* part_sums;        // [kParts, m, n], written by the row kernel if there are several slices
  void* y;                 // [m, n]
  int m, n, k;
  int num_loops;
  int total_rank;
  int b_stride;
  int padded_m;
  int parts_per_block;  // of the row kernel: kParts / slices
  bool starts_early;    // the product, whose x may still be written when it starts
  bool prefetches;      // shrink, of A_l for every loop, before it knows which of them there are
  // Of W, by shrink: `hint_columns` columns, whole vectors, of every hint_row_step-th of the first hint_rows rows (0:
  // none), from the begin of every hint_parts-th part on.
  int hint_rows, hint_row_step, hint_parts, hint_columns;
  int num_segments;
  int segment_out[kMaxSegments];   // first output row of each; a multiple of a tile's rows
  int segment_rank[kMaxSegments];  // first rank of each, a multiple of 8
  int segment_size[kMaxSegments];  // its rank, a multiple of 8
};

constexpr int kParts = 8;
constexpr int kStepColumns = 32;    // of a k-step
constexpr int kTurnSteps = 2;       // k-steps of a turn
constexpr int kVectorElements = 8;  // of 16 bits each, in 16 bytes
constexpr int kMaxLoops = 32;       // bits of a loop mask
constexpr int kAddThreads = 256;    // of the kernels that add parts' sums

// Where the tile of a thread block lies.
struct DecodeTile {
  int row_begin, token_begin, tokens;
};

// Tile `index` of those of ROWS outputs and up to TOKENS tokens. Tiles of the same outputs are neighbours, to find W in
// the second-level cache.
template <int ROWS, int TOKENS>
RRT_DEVICE DecodeTile find_tile(const DecodeArgs& args, int index) {
  const int token_tiles = ceil_div<TOKENS>(args.m);
  int row_tile = index, token_tile = 0;
  if (token_tiles > 1) {  // a division takes as long as half a trip to the cache
    row_tile = index / token_tiles;
    token_tile = index % token_tiles;
  }
  const int token_begin = token_tile * TOKENS, left = args.m - token_begin;
  return {row_tile * ROWS, token_begin, left < TOKENS ? left : TOKENS};
}

// The loops of two tokens of a tile, which lanes share such that a warp has all of them; -1 if there is none.
struct LanesLoops {
  int first, second;
};
RRT_DEVICE LanesLoops load_lanes_loops(const DecodeArgs& args, const DecodeTile& tile) {
  const int lane = device::thread_index() % 32;
  const int32_t* loops = args.loops + tile.token_begin + lane;
  return {lane < tile.tokens ? device::load_global(loops) : -1,
          lane + 32 < tile.tokens ? device::load_global(loops + 32) : -1};
}

// The loop mask of a tile. Every lane of the warp takes part.
RRT_DEVICE uint32_t find_loop_mask(const DecodeArgs& args, const DecodeTile& tile) {
  const LanesLoops loops = load_lanes_loops(args, tile);
  uint32_t mask = 0;
  if (0 <= loops.first && loops.first < args.num_loops) mask |= 1u << loops.first;
  if (0 <= loops.second && loops.second < args.num_loops) mask |= 1u << loops.second;
#pragma unroll
  for (int step = 16; step > 0; step /= 2) mask |= device::shuffle_xor(mask, step);
  return mask;
}

// The sums [kParts, m, columns] of a token and column, added in order.
RRT_DEVICE float add_parts(const float* sums, int m, int columns, int token, int column) {
  const float* of_part = sums + static_cast<int64_t>(token) * columns + column;
  const int64_t size = static_cast<int64_t>(m) * columns;
  float sum = 0;
#pragma unroll
  for (int part = 0; part < kParts; ++part) sum += device::load_global(of_part + part * size);
  return sum;
}

// What the sum of an output gets added for a token of this loop: the bias; NaN if the loop lies outside [0, num_loops).
template <class Half>
RRT_DEVICE float load_bias(const DecodeArgs& args, int loop, int row) {
  if (loop < 0 || loop >= args.num_loops) return NAN;
  if (args.bias == nullptr) return 0;
  const auto* bias = static_cast<const typename Half::Storage*>(args.bias) + loop * args.bias_loop_stride;
  return Half::widen(device::load_global(bias + row));
}

template <class Half>
RRT_DEVICE void store_result(const DecodeArgs& args, int token, int row, float result) {
  device::store_global(static_cast<typename Half::Storage*>(args.y) + static_cast<int64_t>(token) * args.n + row,
                       Half::narrow(result));
}

}  // namespace rrt::loop_lora
