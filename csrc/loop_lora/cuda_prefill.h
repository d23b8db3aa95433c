// The prefill kernel's body: Y = [X | T] [W | B_l]^T + b for rows that are all of loop l, one matrix product whose
// columns run over W and then over B_l. The same kernel, launched before it with A_l for W, computes T = A_l X.
//
// Rows of x are the mma's M, weight rows its N. A thread block of 2 x 2 warps has a tile of both and goes through the
// columns in k-steps of 32, which all threads copy to a ring in shared memory. A sum always runs over the k-steps in
// order: a row has the same bits in any tile and beside any neighbours.
//
// Columns may be taken in any order as long as both operands agree, and so may outputs as long as they are stored where
// they belong. So a lane's 16 adjacent bytes of a row are its fragments of two mmas, as in the decode kernel: eight
// lanes read 128 adjacent bytes, without a swizzle; and eight adjacent outputs of four mmas are one lane's, 16 bytes
// again.
#pragma once

#include <cstdint>

#include "device/primitives.h"
#include "loop_lora/launch.h"
#include "rounding.h"
#include "type_list.h"

namespace rrt::loop_lora {

// All pointers are to device memory, 16-byte aligned, and so is every row of x, weight, shrunk and lora_b.
struct PrefillArgs {
  const void* x;  // [m, k], rows at x_stride
  int64_t x_stride;
  const void* weight;  // [n, k]
  const void* bias;    // [n], the loop's; null: none
  const void* shrunk;  // [m, total_rank]: written by the kernel before, if there is a rank
  const void* lora_b;  // [n, b_stride], the loop's
  void* y;             // [m, n]
  int m, n, k;
  int total_rank;
  int b_stride;
  int num_segments;
  int segment_out[kMaxSegments + 1];  // first output row of each, and n
  int segment_rank[kMaxSegments];     // first rank of each, a multiple of 8
  int segment_size[kMaxSegments];     // its rank, a multiple of 8
};

// Arguments of the launch that computes T for `args`; `lora_a` [total_rank, k] is the loop's.
inline PrefillArgs shrink_args(const PrefillArgs& args, const void* lora_a, void* shrunk) {
  PrefillArgs shrink{};
  shrink.x = args.x;
  shrink.x_stride = args.x_stride;
  shrink.weight = lora_a;
  shrink.y = shrunk;
  shrink.m = args.m;
  shrink.n = args.total_rank;
  shrink.k = args.k;
  shrink.num_segments = 1;
  shrink.segment_out[1] = args.total_rank;
  return shrink;
}

constexpr int kPrefillThreads = 128;
constexpr int kPrefillStepColumns = 32;  // of a k-step
constexpr int kRowVectors = 4;           // of 16 bytes, in a row of a k-step
constexpr int kRowsPerCopy = kPrefillThreads / kRowVectors;

// A group of 32 outputs takes 4 mmas, of 8 each: column c of mma j is this output of the group.
RRT_DEVICE int output_of(int j, int c) { return c / 2 * 8 + 2 * j + c % 2; }

// A warp has 16 * TOKEN_TILES tokens and 32 * OUT_GROUPS outputs.
template <class Half, int TOKEN_TILES, int OUT_GROUPS, int STAGES>
struct PrefillTile {
  using Storage = typename Half::Storage;
  static constexpr int kTokenTiles = TOKEN_TILES, kOutGroups = OUT_GROUPS, kStages = STAGES;
  static constexpr int kWarpTokens = 16 * TOKEN_TILES, kWarpOuts = 32 * OUT_GROUPS;
  static constexpr int kTokens = 2 * kWarpTokens, kOuts = 2 * kWarpOuts;
  static constexpr int kStageRows = kTokens + kOuts;
  static constexpr int kSharedBytes = STAGES * kStageRows * kRowVectors * 16;

  // Output tiles of a launch: each segment begins with one of its own.
  static int out_tiles(const PrefillArgs& args) {
    int tiles = 0;
    for (int s = 0; s < args.num_segments; ++s) {
      tiles += ceil_div<kOuts>(args.segment_out[s + 1] - args.segment_out[s]);
    }
    return tiles;
  }

  static RRT_DEVICE device::Vector* slot(int stage, int row, int vector) {
    auto* vectors = reinterpret_cast<device::Vector*>(device::shared_memory());
    return vectors + (stage * kStageRows + row) * kRowVectors + vector;
  }

  // Rows [0, tokens) of x and [0, outs) of the weight, columns [0, columns) of both; the pointers are at the tile.
  static RRT_DEVICE void fetch(int stage, const Storage* x, int64_t x_stride, int tokens, const Storage* weight,
                               int64_t weight_stride, int outs, int columns) {
    const int first = device::thread_index() / kRowVectors, vector = device::thread_index() % kRowVectors;
    const int column = vector * 8;
#pragma unroll
    for (int i = 0; i < kStageRows / kRowsPerCopy; ++i) {
      const bool of_x = i < kTokens / kRowsPerCopy;
      const int row = first + i * kRowsPerCopy - (of_x ? 0 : kTokens);
      const Storage* from = of_x ? x : weight;
      const bool valid = column < columns && row < (of_x ? tokens : outs);
      device::copy_async(slot(stage, first + i * kRowsPerCopy, vector),
                         valid ? from + row * (of_x ? x_stride : weight_stride) + column : from, valid);
    }
  }

  // The warp's tokens and outputs begin at these rows of the tile.
  static RRT_DEVICE void multiply(int stage, int token, int out, float (&sums)[TOKEN_TILES][4 * OUT_GROUPS][4]) {
    const int g = device::thread_index() % 32 / 4, t = device::thread_index() % 4;
    device::Vector x[2 * TOKEN_TILES];
#pragma unroll
    for (int i = 0; i < 2 * TOKEN_TILES; ++i) x[i] = device::load_shared(slot(stage, token + 8 * i + g, t));
#pragma unroll
    for (int j = 0; j < 4 * OUT_GROUPS; ++j) {
      const int row = kTokens + out + j / 4 * 32 + output_of(j % 4, g);
      const device::Vector w = device::load_shared(slot(stage, row, t));
#pragma unroll
      for (int step = 0; step < 2; ++step) {
        const uint32_t b[2] = {w.word[2 * step], w.word[2 * step + 1]};
#pragma unroll
        for (int tile = 0; tile < TOKEN_TILES; ++tile) {
          const device::Vector &top = x[2 * tile], &bottom = x[2 * tile + 1];
          const uint32_t a[4] = {top.word[2 * step], bottom.word[2 * step], top.word[2 * step + 1],
                                 bottom.word[2 * step + 1]};
          Half::multiply(sums[tile][j], a, b);
        }
      }
    }
  }
};

// From the smallest tile to the largest.
template <class Half>
using PrefillTiles = TypeList<PrefillTile<Half, 2, 1, 4>, PrefillTile<Half, 4, 2, 4>>;

// Thread block (x: token tile, y: output tile): neighbours share a tile of the weight, the larger operand.
template <class Half, int TOKEN_TILES, int OUT_GROUPS, int STAGES>
RRT_DEVICE void prefill_body(const PrefillArgs& args) {
  using Storage = typename Half::Storage;
  using Tile = PrefillTile<Half, TOKEN_TILES, OUT_GROUPS, STAGES>;
  device::launch_dependents();
  const device::Index block = device::block_index();
  const int token_begin = block.x * Tile::kTokens;
  int segment = 0, out_begin = block.y * Tile::kOuts;
  for (; out_begin >= args.segment_out[segment + 1] - args.segment_out[segment]; ++segment) {
    const int size = args.segment_out[segment + 1] - args.segment_out[segment];
    out_begin -= round_up<Tile::kOuts>(size);
  }
  out_begin += args.segment_out[segment];
  const int tokens = args.m - token_begin, outs = args.segment_out[segment + 1] - out_begin;
  const int rank = args.segment_size[segment];

  const Storage* x = static_cast<const Storage*>(args.x) + token_begin * args.x_stride;
  const Storage* weight = static_cast<const Storage*>(args.weight) + static_cast<int64_t>(out_begin) * args.k;
  const Storage* t = static_cast<const Storage*>(args.shrunk) + static_cast<int64_t>(token_begin) * args.total_rank +
                     args.segment_rank[segment];
  const Storage* b = static_cast<const Storage*>(args.lora_b) + static_cast<int64_t>(out_begin) * args.b_stride;
  const int column_steps = ceil_div<kPrefillStepColumns>(args.k);
  const int k_steps = column_steps + ceil_div<kPrefillStepColumns>(rank);
  const auto fetch = [&](int k_step) {
    if (k_step < column_steps) {
      const int column = k_step * kPrefillStepColumns;
      Tile::fetch(k_step % STAGES, x + column, args.x_stride, tokens, weight + column, args.k, outs, args.k - column);
    } else if (k_step < k_steps) {
      if (k_step == column_steps) device::dependency_wait();
      const int column = (k_step - column_steps) * kPrefillStepColumns;
      Tile::fetch(k_step % STAGES, t + column, args.total_rank, tokens, b + column, args.b_stride, outs, rank - column);
    }
    device::copy_commit();
  };

  float sums[TOKEN_TILES][4 * OUT_GROUPS][4] = {};
  const int warp = device::thread_index() / 32;
  const int warp_token = warp / 2 * Tile::kWarpTokens, warp_out = warp % 2 * Tile::kWarpOuts;
#pragma unroll
  for (int k_step = 0; k_step < STAGES - 1; ++k_step) fetch(k_step);
  for (int k_step = 0; k_step < k_steps; ++k_step) {
    device::copy_wait<STAGES - 2>();
    // After this, every thread's copies of the k-step are there, and the stage that the next fetch fills has been read.
    device::block_barrier();
    fetch(k_step + STAGES - 1);
    Tile::multiply(k_step % STAGES, warp_token, warp_out, sums);
  }
  device::copy_wait<0>();
  // A kernel that waits for this one relies on the one before this having ended too.
  if (rank == 0) device::dependency_wait();

  const int g = device::thread_index() % 32 / 4, lane_out = device::thread_index() % 4 * 8;
  const bool whole_vectors = args.n % 8 == 0 && out_begin % 8 == 0;
#pragma unroll
  for (int group = 0; group < OUT_GROUPS; ++group) {
    const int out = warp_out + 32 * group + lane_out;
    float bias[8] = {};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (args.bias == nullptr || out + i >= outs) continue;
      bias[i] = Half::widen(device::load_global(static_cast<const Storage*>(args.bias) + out_begin + out + i));
    }
#pragma unroll
    for (int i = 0; i < 2 * TOKEN_TILES; ++i) {
      const int token = warp_token + 8 * i + g;
      if (token >= tokens || out >= outs) continue;
      Storage* y = static_cast<Storage*>(args.y) + static_cast<int64_t>(token_begin + token) * args.n + out_begin + out;
      float values[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) values[j] = sums[i / 2][4 * group + j / 2][i % 2 * 2 + j % 2] + bias[j];
      if (whole_vectors && out + 8 <= outs) {
        device::Vector vector;
#pragma unroll
        for (int j = 0; j < 4; ++j) vector.word[j] = Half::pair(values[2 * j], values[2 * j + 1]);
        device::store_global(reinterpret_cast<device::Vector*>(y), vector);
      } else {
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          if (out + j < outs) device::store_global(y + j, Half::narrow(values[j]));
        }
      }
    }
  }
}

}  // namespace rrt::loop_lora
