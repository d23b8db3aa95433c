// The prefill kernel's body: Y = [X | T] [W | B_l]^T + b for rows that are all of loop l, one matrix product whose
// columns run over W and then over B_l. The same kernel, launched before it with A_l for W, computes T = A_l X.
//
// Rows of x are the mma's M, weight rows its N. A thread block has a tile of both and goes through the columns in
// k-steps of 64, which all threads copy to a ring in shared memory and each warp takes from there as fragments, four
// registers at a time (ldmatrix). A sum always runs over the columns in order, 16 at a time: a row has the same bits in
// any tile and beside any neighbours.
//
// A row of a k-step is 128 bytes, all of the banks, and its 8 vectors lie in an order of their own (slot()), so that
// the same vector of 8 rows is in 8 different places. Outputs may come in any order as long as they are stored where
// they belong: so eight adjacent outputs of four mmas are one lane's, 16 bytes.
#pragma once

#include <algorithm>
#include <cstdint>
#include <iterator>

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

constexpr int kPrefillStepColumns = 64;  // of a k-step
constexpr int kRowVectors = 8;           // of 16 bytes, in a row of a k-step
constexpr int kMmaColumns = 16;

// A group of 32 outputs takes 4 mmas, of 8 each: column c of mma j is this output of the group.
RRT_DEVICE int output_of(int j, int c) { return c / 2 * 8 + 2 * j + c % 2; }

// TOKEN_WARPS x OUT_WARPS warps, each with 16 * TOKEN_TILES tokens and 32 * OUT_GROUPS outputs.
template <class Half, int TOKEN_WARPS, int OUT_WARPS, int TOKEN_TILES, int OUT_GROUPS, int STAGES>
struct PrefillTile {
  using HalfType = Half;
  using Storage = typename Half::Storage;
  static constexpr int kTokenWarps = TOKEN_WARPS, kOutWarps = OUT_WARPS;
  static constexpr int kTokenTiles = TOKEN_TILES, kOutGroups = OUT_GROUPS, kStages = STAGES;
  static constexpr int kThreads = 32 * TOKEN_WARPS * OUT_WARPS;
  static constexpr int kWarpTokens = 16 * TOKEN_TILES, kWarpOuts = 32 * OUT_GROUPS;
  static constexpr int kTokens = TOKEN_WARPS * kWarpTokens, kOuts = OUT_WARPS * kWarpOuts;
  static constexpr int kStageRows = kTokens + kOuts;
  static constexpr int kSharedBytes = STAGES * kStageRows * kRowVectors * 16;
  static constexpr int kRowsPerCopy = kThreads / kRowVectors;
  static_assert(kTokens % kRowsPerCopy == 0 && kOuts % 32 == 0 && kRowsPerCopy % 16 == 0, "whole copies");

  // Output tiles of a launch: each segment begins with one of its own.
  static int out_tiles(const PrefillArgs& args) {
    int tiles = 0;
    for (int s = 0; s < args.num_segments; ++s) {
      tiles += ceil_div<kOuts>(args.segment_out[s + 1] - args.segment_out[s]);
    }
    return tiles;
  }

  // Rows of x and of the weight that the busiest multiprocessor goes through: what its second-level cache traffic, and
  // so its time, is in proportion to, since all tiles do more operations per byte than the smallest, which is for
  // launches that larger ones would leave multiprocessors idle in.
  static int64_t cost(const PrefillArgs& args, int multiprocessors) {
    const int64_t tiles = static_cast<int64_t>(ceil_div(args.m, kTokens)) * out_tiles(args);
    return ceil_div(tiles, multiprocessors) * kStageRows;
  }

  // Vector `vector` of row `row`: rows of x, then of the weight as the mmas take them.
  static RRT_DEVICE device::Vector* slot(int stage, int row, int vector) {
    auto* vectors = reinterpret_cast<device::Vector*>(device::shared_memory());
    return vectors + (stage * kStageRows + row) * kRowVectors + (vector ^ row % kRowVectors);
  }

  // What a thread copies of each k-step: one vector of every kRowsPerCopy-th row, of x and of the weight.
  struct Source {
    const Storage* x;
    const Storage* weight;
    int64_t x_stride, weight_stride;
    int columns;  // from the vector's on
  };
  static RRT_DEVICE int copied_token() { return device::thread_index() / kRowVectors; }
  static RRT_DEVICE int copied_out() {
    const int row = device::thread_index() / kRowVectors;
    return output_of(row / 8, row % 8);
  }
  static RRT_DEVICE int copied_column() { return device::thread_index() % kRowVectors * 8; }
  // The output that the thread's copy number i is of, relative to its first.
  static RRT_DEVICE constexpr int out_offset(int i) {
    const int row = i * kRowsPerCopy;
    return row / 32 * 32 + row % 32 / 8 * 2;
  }

  // Rows [0, tokens) of x and [0, outs) of the weight, zeros beyond; both are counted from the thread's first one.
  static RRT_DEVICE void fetch(int stage, const Source& source, int tokens, int outs) {
    const int row = copied_token(), vector = device::thread_index() % kRowVectors;
    device::Vector* to = slot(stage, row, vector);
    const bool has_column = source.columns > 0;
#pragma unroll
    for (int i = 0; i < kTokens / kRowsPerCopy; ++i) {
      const bool valid = has_column && i * kRowsPerCopy < tokens;
      device::copy_async(to + i * kRowsPerCopy * kRowVectors, source.x + i * kRowsPerCopy * source.x_stride, valid);
    }
#pragma unroll
    for (int i = 0; i < kOuts / kRowsPerCopy; ++i) {
      const bool valid = has_column && out_offset(i) < outs;
      device::copy_async(to + (kTokens + i * kRowsPerCopy) * kRowVectors,
                         source.weight + out_offset(i) * source.weight_stride, valid);
    }
  }

  // A warp's operands of 16 columns.
  struct Fragments {
    uint32_t x[TOKEN_TILES][4], weight[2 * OUT_GROUPS][4];  // weight: of two mmas each

    // Columns 16 `step` and on of a k-step; the warp's tokens and outputs begin at these rows of the tile.
    RRT_DEVICE void load(int stage, int step, int token, int out) {
      const int lane = device::thread_index() % 32;
      const device::Vector* of_x = slot(stage, token + lane % 16, 2 * step + lane / 16);
      const device::Vector* of_weight =
          slot(stage, kTokens + out + lane / 16 * 8 + lane % 8, 2 * step + lane / 8 % 2);
#pragma unroll
      for (int i = 0; i < TOKEN_TILES; ++i) device::load_matrices(x[i], of_x + i * 16 * kRowVectors);
#pragma unroll
      for (int i = 0; i < 2 * OUT_GROUPS; ++i) device::load_matrices(weight[i], of_weight + i * 16 * kRowVectors);
    }

    RRT_DEVICE void multiply(float (&sums)[TOKEN_TILES][4 * OUT_GROUPS][4]) const {
#pragma unroll
      for (int j = 0; j < 4 * OUT_GROUPS; ++j) {
        const uint32_t b[2] = {weight[j / 2][j % 2 * 2], weight[j / 2][j % 2 * 2 + 1]};
#pragma unroll
        for (int tile = 0; tile < TOKEN_TILES; ++tile) Half::multiply(sums[tile][j], x[tile], b);
      }
    }
  };
};

// From the smallest tile to the largest.
template <class Half>
using PrefillTiles =
    TypeList<PrefillTile<Half, 2, 2, 2, 1, 4>, PrefillTile<Half, 2, 2, 4, 2, 3>, PrefillTile<Half, 2, 4, 4, 2, 3>>;

// The number in the list of the tile that costs least; of equals the smallest, whose blocks are the most.
template <class... Tiles>
int choose_prefill_tile(TypeList<Tiles...>, const PrefillArgs& args, int multiprocessors) {
  const int64_t costs[] = {Tiles::cost(args, multiprocessors)...};
  return static_cast<int>(std::min_element(std::begin(costs), std::end(costs)) - costs);
}

// Thread block (x: token tile, y: output tile): neighbours share a tile of the weight, the larger operand.
template <class Tile>
RRT_DEVICE void prefill_body(const PrefillArgs& args) {
  using Half = typename Tile::HalfType;
  using Storage = typename Half::Storage;
  constexpr int kStages = Tile::kStages;
  // At once, which is right because shrink itself is not launched dependent: what the product reads early was whole
  // before shrink began.
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

  const int token = token_begin + Tile::copied_token(), out = out_begin + Tile::copied_out();
  const int column = Tile::copied_column();
  typename Tile::Source source{static_cast<const Storage*>(args.x) + token * args.x_stride + column,
                               static_cast<const Storage*>(args.weight) + static_cast<int64_t>(out) * args.k + column,
                               args.x_stride, args.k, args.k - column};
  const int column_steps = ceil_div<kPrefillStepColumns>(args.k);
  const int k_steps = column_steps + ceil_div<kPrefillStepColumns>(rank);
  int fetched = 0, fetch_stage = 0;
  const auto fetch = [&] {
    if (fetched < k_steps) {
      if (fetched == column_steps) {
        device::dependency_wait();
        source = {static_cast<const Storage*>(args.shrunk) + static_cast<int64_t>(token) * args.total_rank +
                      args.segment_rank[segment] + column,
                  static_cast<const Storage*>(args.lora_b) + static_cast<int64_t>(out) * args.b_stride + column,
                  args.total_rank, args.b_stride, rank - column};
      }
      Tile::fetch(fetch_stage, source, tokens - Tile::copied_token(), outs - Tile::copied_out());
      source.x += kPrefillStepColumns;
      source.weight += kPrefillStepColumns;
      source.columns -= kPrefillStepColumns;
      ++fetched;
      fetch_stage = fetch_stage + 1 == kStages ? 0 : fetch_stage + 1;
    }
    device::copy_commit();
  };

  float sums[Tile::kTokenTiles][4 * Tile::kOutGroups][4] = {};
  const int warp = device::thread_index() / 32;
  const int warp_token = warp / Tile::kOutWarps * Tile::kWarpTokens;
  const int warp_out = warp % Tile::kOutWarps * Tile::kWarpOuts;
  for (int i = 0; i < kStages - 1; ++i) fetch();
  int stage = 0;
  for (int k_step = 0; k_step < k_steps; ++k_step) {
    device::copy_wait<kStages - 2>();
    // After this, every thread's copies of the k-step are there, and the stage that the next fetch fills has been read.
    device::block_barrier();
    typename Tile::Fragments fragments[2];  // one is loaded while the other is multiplied
    fragments[0].load(stage, 0, warp_token, warp_out);
    fetch();
#pragma unroll
    for (int step = 0; step < kPrefillStepColumns / kMmaColumns; ++step) {
      if ((step + 1) * kMmaColumns < kPrefillStepColumns) {
        fragments[(step + 1) % 2].load(stage, step + 1, warp_token, warp_out);
      }
      fragments[step % 2].multiply(sums);
    }
    stage = stage + 1 == kStages ? 0 : stage + 1;
  }
  device::copy_wait<0>();
  // A kernel that waits for this one relies on the one before this having ended too.
  if (rank == 0) device::dependency_wait();

  const int g = device::thread_index() % 32 / 4, lane_out = device::thread_index() % 4 * 8;
  const bool whole_vectors = args.n % 8 == 0 && out_begin % 8 == 0;
#pragma unroll
  for (int group = 0; group < Tile::kOutGroups; ++group) {
    const int first = warp_out + 32 * group + lane_out;
    float bias[8] = {};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (args.bias == nullptr || first + i >= outs) continue;
      bias[i] = Half::widen(device::load_global(static_cast<const Storage*>(args.bias) + out_begin + first + i));
    }
#pragma unroll
    for (int i = 0; i < 2 * Tile::kTokenTiles; ++i) {
      const int row = warp_token + 8 * i + g;
      if (row >= tokens || first >= outs) continue;
      Storage* y = static_cast<Storage*>(args.y) + static_cast<int64_t>(token_begin + row) * args.n + out_begin + first;
      float values[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) values[j] = sums[i / 2][4 * group + j / 2][i % 2 * 2 + j % 2] + bias[j];
      if (whole_vectors && first + 8 <= outs) {
        device::Vector vector;
#pragma unroll
        for (int j = 0; j < 4; ++j) vector.word[j] = Half::pair(values[2 * j], values[2 * j + 1]);
        device::store_global(reinterpret_cast<device::Vector*>(y), vector);
      } else {
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          if (first + j < outs) device::store_global(y + j, Half::narrow(values[j]));
        }
      }
    }
  }
}

}  // namespace rrt::loop_lora
