// The decode kernel's body: y = W x + b + B_l A_l x for a tile of tokens of mixed loops, W read once for all.
//
// Weight rows are the mma's M, tokens its N. A block has TILES * 16 output rows; its 8 warps share the columns,
// each its own eighth, and their sums are added in the order of the warps. After W the same stream goes on over B_l
// of each loop present, times T_l = A_l x, in which the rows of other loops are zeros. So the order of every sum is
// the layer's, whatever tokens are in the batch and however they are tiled.
//
// Columns may be taken in any order as long as W and x agree. So a lane loads 16 adjacent bytes per row, straight
// into a ring in shared memory that is its own (no barrier), and they are its fragments of two mmas.
#pragma once

#include <cmath>
#include <cstdint>

#include "cuda/device.h"

namespace rrt::loop_lora {

// What both kernels of the op, shrink and expand, read. All pointers are to device memory, 16-byte aligned, and
// every row of a matrix is too.
struct DecodeArgs {
  const void* x;           // [m, k], rows at x_stride
  int64_t x_stride;
  const int32_t* loops;    // [m]; a row outside [0, num_loops) gets NaN: finding it on the host would wait
  const void* weight;      // [n, k]
  const void* bias;        // [n], or [num_loops, n] at bias_loop_stride n; null: none
  int64_t bias_loop_stride;
  const void* lora_a;      // [num_loops, total_rank, k]
  const void* lora_b;      // [num_loops, n, b_stride]
  void* shrunk;            // [num_loops, padded m, total_rank], written by shrink, read by expand
  void* y;                 // [m, n]
  int m, n, k;
  int num_loops;
  int total_rank;
  int b_stride;
  int padded_m;
  int num_segments;
  static constexpr int kMaxSegments = 8;
  int segment_out[kMaxSegments];   // first output row of each; a multiple of a block's rows
  int segment_rank[kMaxSegments];  // first rank of each, a multiple of 8
  int segment_size[kMaxSegments];  // its rank, a multiple of 8
};

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kBlockColumns = 32;   // columns of one turn of the stream
constexpr int kVectorElements = 8;  // of 16 bits
constexpr int kMaxLoops = 32;       // loops present are a mask

// The instances: F(TILES, TOKENS, STAGES). Few outputs want small tiles, so that every multiprocessor has some; shrink
// takes those too. Stages are as many as an A100's shared memory has room for.
#define RRT_NARROW_TILES(F) F(1, 8, 8) F(1, 16, 8) F(1, 32, 6) F(1, 64, 4)
#define RRT_WIDE_TILES(F) F(4, 8, 4) F(4, 16, 4) F(4, 32, 3) F(4, 64, 2)

// Bytes of shared memory, of which the ring takes most; the sums of the warps reuse it.
template <int TILES, int TOKENS, int STAGES>
constexpr int decode_shared_bytes() {
  const int ring = STAGES * (2 * TILES + TOKENS / 8) * kThreads * 16;
  const int sums = kWarps * 16 * TILES * TOKENS * 4;
  return ring > sums ? ring : sums;
}

// One warp's stream of [16 * TILES rows] x [32 columns] blocks through the ring.
template <class Half, int TILES, int TOKENS, int STAGES>
struct Stream {
  using Storage = typename Half::Storage;
  static constexpr int kTokenTiles = TOKENS / 8;
  static constexpr int kVectors = 2 * TILES + kTokenTiles;

  device::Vector* ring;
  int lane_row, lane_column;  // row within 8 and first column within 32 of the lane's vectors
  float (&sums)[TILES][kTokenTiles][4];

  RRT_DEVICE device::Vector* slot(int stage, int vector) const {
    return ring + (stage * kVectors + vector) * kThreads + device::thread_index();
  }

  // Rows [0, rows) x columns [0, columns) of `weight` and tokens [0, tokens) of `x`, the pointers at the block.
  RRT_DEVICE void fetch(int stage, const Storage* weight, int64_t weight_stride, int rows, const Storage* x,
                        int64_t x_stride, int tokens, int columns) const {
    const bool in_columns = lane_column < columns;
#pragma unroll
    for (int i = 0; i < 2 * TILES; ++i) {
      const int row = 8 * i + lane_row;
      const bool valid = in_columns && row < rows;
      device::copy_async(slot(stage, i), valid ? weight + row * weight_stride + lane_column : weight, valid);
    }
#pragma unroll
    for (int i = 0; i < kTokenTiles; ++i) {
      const int token = 8 * i + lane_row;
      const bool valid = in_columns && token < tokens;
      device::copy_async(slot(stage, 2 * TILES + i), valid ? x + token * x_stride + lane_column : x, valid);
    }
  }

  RRT_DEVICE void multiply(int stage) const {
    device::Vector w[2 * TILES];
#pragma unroll
    for (int i = 0; i < 2 * TILES; ++i) w[i] = device::load_shared(slot(stage, i));
#pragma unroll
    for (int token_tile = 0; token_tile < kTokenTiles; ++token_tile) {
      const device::Vector x = device::load_shared(slot(stage, 2 * TILES + token_tile));
#pragma unroll
      for (int step = 0; step < 2; ++step) {
        const uint32_t b[2] = {x.word[2 * step], x.word[2 * step + 1]};
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) {
          const device::Vector &top = w[2 * tile], &bottom = w[2 * tile + 1];
          const uint32_t a[4] = {top.word[2 * step], bottom.word[2 * step], top.word[2 * step + 1],
                                 bottom.word[2 * step + 1]};
          Half::multiply(sums[tile][token_tile], a, b);
        }
      }
    }
  }
};

// Bit l: some token of [begin, begin + count) is of loop l. The same in every thread.
RRT_DEVICE uint32_t loops_present(const int32_t* loops, int begin, int count, int num_loops) {
  uint32_t mask = 0;
  for (int i = 0; i < count; ++i) {
    const int loop = device::load_global(loops + begin + i);
    if (0 <= loop && loop < num_loops) mask |= 1u << loop;
  }
  return mask;
}

// SHRINK: block (rank tile, loop, token tile) writes T; else block (output tile, 0, token tile) writes y.
template <class Half, int TILES, int TOKENS, int STAGES, bool SHRINK>
RRT_DEVICE void decode_body(const DecodeArgs& args) {
  using Storage = typename Half::Storage;
  using WarpStream = Stream<Half, TILES, TOKENS, STAGES>;
  constexpr int kRows = 16 * TILES;
  constexpr int kTokenTiles = TOKENS / 8;
  const device::Index block = device::block_index();
  const int warp = device::thread_index() / 32, lane = device::thread_index() % 32;
  const int row_begin = block.x * kRows, token_begin = block.z * TOKENS;
  const int tokens = args.m - token_begin < TOKENS ? args.m - token_begin : TOKENS;
  const uint32_t present = loops_present(args.loops, token_begin, tokens, args.num_loops);
  if constexpr (SHRINK) {
    device::launch_dependents();
    if ((present >> block.y & 1) == 0) return;
  }

  float sums[TILES][kTokenTiles][4] = {};
  const WarpStream stream{reinterpret_cast<device::Vector*>(device::shared_memory()), lane / 4,
                          lane % 4 * kVectorElements, sums};
  const int total_rows = SHRINK ? args.total_rank : args.n;
  const int rows = total_rows - row_begin < kRows ? total_rows - row_begin : kRows;
  const Storage* weight = SHRINK ? static_cast<const Storage*>(args.lora_a) + static_cast<int64_t>(block.y) * args.total_rank * args.k
                                 : static_cast<const Storage*>(args.weight);
  weight += static_cast<int64_t>(row_begin) * args.k;
  const Storage* x = static_cast<const Storage*>(args.x) + token_begin * args.x_stride;

  // The warp's blocks of W's columns, then of each present loop its own of the segment's ranks.
  const int column_blocks = (args.k + kBlockColumns - 1) / kBlockColumns;
  const int first = column_blocks * warp / kWarps;
  const int base_turns = column_blocks * (warp + 1) / kWarps - first;
  int segment = 0;
  while (!SHRINK && segment + 1 < args.num_segments && args.segment_out[segment + 1] <= row_begin) ++segment;
  const int rank = SHRINK ? 0 : args.segment_size[segment];
  const int rank_blocks = (rank + kBlockColumns - 1) / kBlockColumns;
  const int rank_turns = rank_blocks > warp ? (rank_blocks - warp + kWarps - 1) / kWarps : 0;  // per loop
  int num_present = 0;
  for (uint32_t rest = present; rest != 0; rest &= rest - 1) ++num_present;
  const int turns = base_turns + rank_turns * num_present;

  bool waited = false;
  uint32_t rest = present;
  int rank_turn = 0;
  const auto fetch = [&](int turn) {
    if (turn < base_turns) {
      const int column = (first + turn) * kBlockColumns;
      stream.fetch(turn % STAGES, weight + column, args.k, rows, x + column, args.x_stride, tokens, args.k - column);
    } else if (turn < turns) {
      if (!waited) device::dependency_wait();
      waited = true;
      int loop = 0;
      while ((rest >> loop & 1) == 0) ++loop;
      const int column = (warp + rank_turn * kWarps) * kBlockColumns;
      const Storage* b = static_cast<const Storage*>(args.lora_b) +
                         (static_cast<int64_t>(loop) * args.n + row_begin) * args.b_stride + column;
      const Storage* t = static_cast<const Storage*>(args.shrunk) +
                         (static_cast<int64_t>(loop) * args.padded_m + token_begin) * args.total_rank +
                         args.segment_rank[segment] + column;
      stream.fetch(turn % STAGES, b, args.b_stride, rows, t, args.total_rank, tokens, rank - column);
      if (++rank_turn == rank_turns) {
        rank_turn = 0;
        rest &= rest - 1;
      }
    }
    device::copy_commit();
  };
#pragma unroll
  for (int turn = 0; turn < STAGES - 1; ++turn) fetch(turn);
  for (int turn = 0; turn < turns; ++turn) {
    device::copy_wait<STAGES - 2>();
    stream.multiply(turn % STAGES);
    fetch(turn + STAGES - 1);
  }
  device::copy_wait<0>();
  // Whatever ends after this kernel must also come after the one before it.
  if (!SHRINK && !waited) device::dependency_wait();

  // The warps' sums, over the ring: [warp, token, row].
  device::block_barrier();
  float* partial = reinterpret_cast<float*>(device::shared_memory());
#pragma unroll
  for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
    for (int token_tile = 0; token_tile < kTokenTiles; ++token_tile) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = 16 * tile + lane / 4 + i / 2 * 8, token = 8 * token_tile + lane % 4 * 2 + i % 2;
        device::store_shared(partial + (warp * TOKENS + token) * kRows + row, sums[tile][token_tile][i]);
      }
    }
  }
  device::block_barrier();
  for (int i = device::thread_index(); i < tokens * kRows; i += kThreads) {
    const int token = i / kRows, row = i % kRows;
    if (row >= rows) continue;
    float sum = 0;
    for (int w = 0; w < kWarps; ++w) sum += device::load_shared(partial + (w * TOKENS + token) * kRows + row);
    const int loop = device::load_global(args.loops + token_begin + token);
    if constexpr (SHRINK) {
      Storage* t = static_cast<Storage*>(args.shrunk) +
                   (static_cast<int64_t>(block.y) * args.padded_m + token_begin + token) * args.total_rank;
      device::store_global(t + row_begin + row, Half::narrow(loop == block.y ? sum : 0.0f));
    } else {
      const bool valid = 0 <= loop && loop < args.num_loops;
      if (valid && args.bias != nullptr) {
        sum += Half::widen(device::load_global(static_cast<const Storage*>(args.bias) + loop * args.bias_loop_stride +
                                               row_begin + row));
      }
      Storage* y = static_cast<Storage*>(args.y) + static_cast<int64_t>(token_begin + token) * args.n;
      device::store_global(y + row_begin + row, Half::narrow(valid ? sum : NAN));
    }
  }
}

}  // namespace rrt::loop_lora
