// Bodies of the column kernel, which computes both shrink and the product, and of the kernel that adds the parts of a
// split shrink; cuda_decode.h explains the terms.
//
// A tile has 16 outputs, and each warp sums one part of it. Few bytes have to arrive before a thread block is done,
// which suits small layers; but x is brought once for every 16 outputs.
#pragma once

#include "loop_lora/cuda_pipeline.h"

namespace rrt::loop_lora {

constexpr int kColumnTileRows = 16;

// The tokens of a tile, the parts (warps) of a thread block, the stages of each warp's ring.
template <int TOKENS, int PARTS, int STAGES>
struct ColumnInstance {
  static constexpr int kTokens = TOKENS;
  static constexpr int kBlockParts = PARTS;
  static constexpr int kStages = STAGES;
};

// As many stages as let an H100's multiprocessor hold two thread blocks, one with 32 tokens.
using ColumnInstances =
    TypeList<ColumnInstance<8, kParts, 4>, ColumnInstance<16, kParts, 3>, ColumnInstance<32, kParts, 3>>;

// Shrink has few outputs, so its tiles have few tokens. Split, a thread block is one warp, with a longer ring.
using ShrinkInstances = TypeList<ColumnInstance<8, kParts, 4>, ColumnInstance<16, kParts, 3>>;
using SplitShrinkInstances = TypeList<ColumnInstance<8, 1, 16>, ColumnInstance<16, 1, 16>>;

constexpr int kSumStride = kColumnTileRows + 4;  // of a token's sums: spreads tokens over the banks

template <class Half, int TOKENS, int STAGES>
using ColumnPipeline = Pipeline<Half, 32, 1, TOKENS, STAGES>;

// The rings of the warps, whose memory the sums of the parts reuse.
template <int TOKENS, int PARTS, int STAGES>
constexpr int column_shared_bytes() {
  const int ring = PARTS * ColumnPipeline<device::BFloat16, TOKENS, STAGES>::kBytes;
  const int sums = PARTS * TOKENS * kSumStride * 4;
  return ring > sums ? ring : sums;
}

// T of a token and loop: zero if the token is of another loop. Tokens of loops that don't exist have none.
template <class Half>
RRT_DEVICE void store_shrunk(const DecodeArgs& args, int loop, int token, int rank, float value) {
  device::store_global(static_cast<typename Half::Storage*>(args.shrunk) +
                           (static_cast<int64_t>(loop) * args.padded_m + token) * args.total_rank + rank,
                       Half::narrow(value));
}

// Thread block (x: tile; y: loop, for shrink; z: group of PARTS parts, of which only shrink has several).
template <class Half, int TOKENS, int PARTS, int STAGES, bool SHRINK>
RRT_DEVICE void column_body(const DecodeArgs& args) {
  using Storage = typename Half::Storage;
  using Turns = ColumnPipeline<Half, TOKENS, STAGES>;
  static_assert(SHRINK || PARTS == kParts, "only shrink is split");
  constexpr int kThreads = 32 * PARTS, kTokenTiles = TOKENS / 8;
  if (!SHRINK || args.starts_early) device::launch_dependents();
  const device::Index block = device::block_index();
  const int warp = device::thread_index() / 32, lane = device::thread_index() % 32;
  const int part = block.z * PARTS + warp;
  const DecodeTile tile = find_tile<kColumnTileRows, TOKENS>(args, block.x);
  const int total_rows = SHRINK ? args.total_rank : args.n;
  const int rows = total_rows - tile.row_begin < kColumnTileRows ? total_rows - tile.row_begin : kColumnTileRows;
  const auto* matrix = static_cast<const Storage*>(SHRINK ? args.lora_a : args.weight);
  if (SHRINK) matrix += static_cast<int64_t>(block.y) * args.total_rank * args.k;
  const int segment = SHRINK ? Cursor<Storage>::kNoSegment : find_segment(args, tile.row_begin);
  // A thread's results. The loops of their tokens and the biases are loaded all at once, as early as they may be.
  constexpr int kResults = PARTS == kParts ? ceil_div<kThreads>(TOKENS * kColumnTileRows) : 0;
  int loops[kResults + 1] = {};
  float biases[kResults + 1] = {};
  const auto for_each_result = [&](auto f) {
#pragma unroll
    for (int result = 0; result < kResults; ++result) {
      const int i = device::thread_index() + result * kThreads;
      const int token = i / kColumnTileRows, row = i % kColumnTileRows;
      if (token < tile.tokens && row < rows) f(loops[result], biases[result], token, row);
    }
  };
  const auto load_loops = [&] {
    for_each_result([&](int& loop, float&, int token, int) {
      loop = device::load_global(args.loops + tile.token_begin + token);
    });
  };
  Turns turns({args, tile, matrix, segment, part, part + 1}, warp * Turns::kBytes, rows);
  uint32_t of_loop = 0;  // bit: of the lane's tokens, it is of shrink's loop
  if constexpr (SHRINK) {
    const auto load_all_loops = [&] {
      load_loops();
      if constexpr (PARTS < kParts) of_loop = find_tokens_of_loop<kTokenTiles>(args, tile, block.y);
    };
    const auto prefetch = [&] { prefetch_weight<Storage, kColumnTileRows, TOKENS, PARTS, kParts / PARTS>(args); };
    if (!start_shrink(turns, args, tile, block.y, load_all_loops, prefetch)) {
      // The product may have these tokens in a tile with some of this loop.
      for (int i = device::thread_index(); PARTS == kParts && i < tile.tokens * rows; i += kThreads) {
        store_shrunk<Half>(args, block.y, tile.token_begin + i / rows, tile.row_begin + i % rows, 0.0f);
      }
      return;
    }
  } else {
    turns.start(!args.starts_early, [] { device::dependency_wait(); });
  }
  typename Turns::Sums sums = {};
#pragma unroll 1
  for (int half = 0; half < (SHRINK ? 1 : 2); ++half) {
    turns.multiply(half == 0 ? turns.cursor.weight_turns(part)
                             : turns.cursor.num_loops * turns.cursor.rank_turns(part),
                   sums);
  }
  device::copy_wait<0>();
  if constexpr (!SHRINK) {
    device::dependency_wait();  // where T was not read
    load_loops();
  }

  // Calls f(row, token, sum) for each of the lane's sums, counted from its first.
  const int first_row = lane / 4, first_token = lane % 4 * 2;
  const auto for_each = [&](auto f) {
#pragma unroll
    for (int token_tile = 0; token_tile < kTokenTiles; ++token_tile) {
#pragma unroll
      for (int i = 0; i < 4; ++i) f(i / 2 * 8, 8 * token_tile + i % 2, sums[0][token_tile][i]);
    }
  };
  if constexpr (PARTS < kParts) {
    float* to = args.shrink_sums + tile.row_begin + first_row +
                (static_cast<int64_t>(part) * args.m + tile.token_begin + first_token) * args.total_rank;
    for_each([&](int row, int token, float sum) {
      if (first_row + row < rows && (of_loop >> (token / 8 * 2 + token % 8) & 1) != 0) {
        device::store_global(to + static_cast<int64_t>(args.total_rank) * token + row, sum);
      }
    });
    return;
  }

  // The sums [part, token, row] go where the rings were.
  device::block_barrier();
  float* partial = reinterpret_cast<float*>(device::shared_memory());
  for_each([&](int row, int token, float sum) {
    device::store_shared(partial + (warp * TOKENS + first_token + token) * kSumStride + first_row + row, sum);
  });
  if constexpr (!SHRINK) {
    for_each_result([&](int loop, float& bias, int, int row) {
      bias = load_bias<Half>(args, loop, tile.row_begin + row);
    });
  }
  device::block_barrier();
  for_each_result([&](int loop, float bias, int token, int row) {
    const int of_all = tile.token_begin + token, output = tile.row_begin + row;
    float sum = 0;
#pragma unroll
    for (int summand = 0; summand < PARTS; ++summand) {
      sum += device::load_shared(partial + (summand * TOKENS + token) * kSumStride + row);
    }
    if constexpr (SHRINK) {
      store_shrunk<Half>(args, block.y, of_all, output, loop == block.y ? sum : 0.0f);
    } else {
      store_result<Half>(args, of_all, output, sum + bias);
    }
  });
}

// Adds the sums that a split shrink left. Thread block (x: token; y: kAddThreads ranks).
template <class Half>
RRT_DEVICE void add_shrunk_body(const DecodeArgs& args) {
  device::launch_dependents();  // in the late order, too: this kernel starts once shrink has waited
  device::dependency_wait();
  const device::Index block = device::block_index();
  const int token = block.x, rank = block.y * kAddThreads + device::thread_index();
  if (rank >= args.total_rank) return;
  const int loop = device::load_global(args.loops + token);
  float sum = 0;
  if (0 <= loop && loop < args.num_loops) sum = add_parts(args.shrink_sums, args.m, args.total_rank, token, rank);
  for (int l = 0; l < args.num_loops; ++l) store_shrunk<Half>(args, l, token, rank, l == loop ? sum : 0.0f);
}

}  // namespace rrt::loop_lora
