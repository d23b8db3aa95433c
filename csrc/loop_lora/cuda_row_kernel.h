// Body of the row kernel, which computes the product, or shrink in large tiles with a part per thread block, and of the
// kernel that adds the product's slices; cuda_decode.h explains the terms.
//
// A tile has 128 outputs, 32 for each of the 4 warps, or 64: half as many outputs make twice as many thread blocks, for
// layers that would not fill the GPU. The warps share x. A thread block sums the parts of its slice one after another.
#pragma once

#include "loop_lora/cuda_pipeline.h"

namespace rrt::loop_lora {

constexpr int kRowThreads = 128;

// The tokens of a tile, the 16-row tiles of each warp, the stages of the ring.
template <int TOKENS, int WARP_TILES, int STAGES>
struct RowInstance {
  static constexpr int kTokens = TOKENS;
  static constexpr int kWarpTiles = WARP_TILES;
  static constexpr int kStages = STAGES;
  static constexpr int kRows = kRowThreads / 32 * 16 * WARP_TILES;
};

// As many stages as let an A100's multiprocessor hold two thread blocks.
using RowInstances =
    TypeList<RowInstance<8, 1, 8>, RowInstance<16, 1, 7>, RowInstance<32, 1, 6>, RowInstance<64, 1, 5>,
             RowInstance<8, 2, 4>, RowInstance<16, 2, 4>, RowInstance<32, 2, 4>, RowInstance<64, 2, 3>>;

// Where tokens are many, shrink would read A_l for every 16 of them, and x for every 16 ranks.
using RowShrinkInstances = TypeList<RowInstance<32, 1, 6>, RowInstance<64, 1, 5>>;

template <int TOKENS, int WARP_TILES, int STAGES>
constexpr int row_shared_bytes() {
  return Pipeline<device::BFloat16, kRowThreads, WARP_TILES, TOKENS, STAGES>::kBytes;
}

struct alignas(16) Quad {
  float value[4];
};

// Thread block (x: tile; y: slice; for shrink y: loop, z: part).
template <class Half, int TOKENS, int WARP_TILES, int STAGES, bool SHRINK>
RRT_DEVICE void row_body(const DecodeArgs& args) {
  using Storage = typename Half::Storage;
  using Turns = Pipeline<Half, kRowThreads, WARP_TILES, TOKENS, STAGES>;
  constexpr int kTokenTiles = TOKENS / 8;
  if (!SHRINK || args.starts_early) device::launch_dependents();
  const int parts = SHRINK ? 1 : args.parts_per_block;
  const bool whole = parts == kParts;
  const device::Index block = device::block_index();
  const int thread = device::thread_index(), warp = thread / 32, lane = thread % 32;
  const DecodeTile tile = find_tile<Turns::kRows, TOKENS>(args, block.x);
  const int first_part = SHRINK ? block.z : block.y * parts, outputs = SHRINK ? args.total_rank : args.n;
  const auto* matrix = static_cast<const Storage*>(SHRINK ? args.lora_a : args.weight);
  if (SHRINK) matrix += static_cast<int64_t>(block.y) * args.total_rank * args.k;
  const int segment = SHRINK ? Cursor<Storage>::kNoSegment : find_segment(args, tile.row_begin);
  Turns turns({args, tile, matrix, segment, first_part, first_part + parts}, 0, outputs - tile.row_begin);
  uint32_t of_loop = 0;  // bit: of the lane's tokens, it is of shrink's loop
  if constexpr (SHRINK) {
    const auto load_loops = [&] { of_loop = find_tokens_of_loop<kTokenTiles>(args, tile, block.y); };
    const auto prefetch = [&] { prefetch_weight<Storage, Turns::kRows, TOKENS, kRowThreads / 32, kParts>(args); };
    if (!start_shrink(turns, args, tile, block.y, load_loops, prefetch)) return;
  } else {
    turns.start(!args.starts_early, [] { device::dependency_wait(); });
  }

  typename Turns::Sums sums, total = {};
  // Of the lane's sums: the i-th of a mma's four is row i / 2 * 8 and token i % 2 from here on.
  const int first_row = tile.row_begin + 16 * warp * WARP_TILES + lane / 4;
  const int first_token = tile.token_begin + lane % 4 * 2;
  // Calls f(sum, total, row, token) for each of them, counted from the first.
  const auto for_each = [&](auto f) {
#pragma unroll
    for (int token_tile = 0; token_tile < kTokenTiles; ++token_tile) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int warp_tile = 0; warp_tile < WARP_TILES; ++warp_tile) {
          f(sums[warp_tile][token_tile][i], total[warp_tile][token_tile][i], 16 * warp_tile + i / 2 * 8,
            8 * token_tile + i % 2);
        }
      }
    }
  };
  // Of each part first the turns of W, then those of B: how many, the fetches know that are ahead by now.
#pragma unroll 1
  for (int half = 0; half < 2 * parts; ++half) {
    const int part = first_part + half / 2;
    const bool in_weight = half % 2 == 0;
    if (in_weight) for_each([](float& sum, float&, int, int) { sum = 0; });
    turns.multiply(in_weight ? turns.cursor.weight_turns(part)
                             : turns.cursor.num_loops * turns.cursor.rank_turns(part),
                   sums);
    if (in_weight) continue;
    if (whole) {
      for_each([](float sum, float& sum_of_parts, int, int) { sum_of_parts += sum; });
    } else {
      if constexpr (!SHRINK) device::dependency_wait();  // where T was not read
      float* to = (SHRINK ? args.shrink_sums : args.part_sums) +
                  (static_cast<int64_t>(part) * args.m + first_token) * outputs + first_row;
      for_each([&](float sum, float& sum_of_parts, int row, int token) {
        sum_of_parts = 0;  // as it is anyway; but said here, it takes no register meanwhile
        const bool exists = SHRINK ? (of_loop >> (token / 8 * 2 + token % 8) & 1) != 0
                                   : lane % 4 * 2 + token < tile.tokens;
        if (first_row + row < outputs && exists) {
          device::store_global(to + static_cast<int64_t>(outputs) * token + row, sum);
        }
      });
    }
  }
  device::copy_wait<0>();
  if (!whole) return;
  device::dependency_wait();  // where T was not read

  // The sums [token, row] go where the ring was. Then every thread stores eight adjacent outputs, of one token after the
  // other: 16 bytes at a time, and a warp whole lines of memory.
  constexpr int kVectors = Turns::kRows / kVectorElements, kTokensAtOnce = kRowThreads / kVectors;
  constexpr int kResults = ceil_div<kTokensAtOnce>(TOKENS), kStride = Turns::kRows + 4;
  static_assert(TOKENS * kStride * 4 <= Turns::kBytes, "the ring has room for the sums");
  const int row = thread % kVectors * kVectorElements, output = tile.row_begin + row;
  int loops[kResults];
#pragma unroll
  for (int i = 0; i < kResults; ++i) {
    const int token = thread / kVectors + i * kTokensAtOnce;
    loops[i] = token < tile.tokens ? device::load_global(args.loops + tile.token_begin + token) : -1;
  }
  float* results = reinterpret_cast<float*>(device::shared_memory());
  device::block_barrier();
  for_each([&](float, float sum_of_parts, int of_row, int token) {
    device::store_shared(results + (lane % 4 * 2 + token) * kStride + 16 * warp * WARP_TILES + lane / 4 + of_row,
                         sum_of_parts);
  });
  device::block_barrier();
  if (output >= args.n) return;
  const auto* bias = static_cast<const Storage*>(args.bias);
  const bool is_whole =
      args.n % kVectorElements == 0 && reinterpret_cast<uintptr_t>(bias) % sizeof(device::Vector) == 0;
  if (!is_whole) {  // not all eight exist, or are aligned
#pragma unroll 1
    for (int token = thread / kVectors; token < tile.tokens; token += kTokensAtOnce) {
      const int of_all = tile.token_begin + token, loop = device::load_global(args.loops + of_all);
#pragma unroll 1
      for (int j = 0; j < kVectorElements && output + j < args.n; ++j) {
        const float sum = device::load_shared(results + token * kStride + row + j);
        store_result<Half>(args, of_all, output + j, sum + load_bias<Half>(args, loop, output + j));
      }
    }
    return;
  }
  const auto is_valid = [&](int loop) { return 0 <= loop && loop < args.num_loops; };
  device::Vector biases[kResults];  // all loaded at once
  if (bias != nullptr) {
#pragma unroll
    for (int i = 0; i < kResults; ++i) {
      const Storage* from = bias + (is_valid(loops[i]) ? loops[i] : 0) * args.bias_loop_stride + output;
      biases[i] = device::load_global(reinterpret_cast<const device::Vector*>(from));
    }
  }
#pragma unroll
  for (int i = 0; i < kResults; ++i) {
    const int token = thread / kVectors + i * kTokensAtOnce;
    if (token >= tile.tokens) break;
    float result[kVectorElements];
#pragma unroll
    for (int j = 0; j < kVectorElements; j += 4) {
      const Quad quad = device::load_shared(reinterpret_cast<const Quad*>(results + token * kStride + row + j));
#pragma unroll
      for (int of_quad = 0; of_quad < 4; ++of_quad) result[j + of_quad] = quad.value[of_quad];
    }
    if (bias != nullptr) {
#pragma unroll
      for (int j = 0; j < kVectorElements; j += 2) {
        float low, high;
        Half::widen_pair(biases[i].word[j / 2], low, high);
        result[j] += low;
        result[j + 1] += high;
      }
    }
    device::Vector stored;
#pragma unroll
    for (int j = 0; j < kVectorElements; j += 2) {
      stored.word[j / 2] = is_valid(loops[i]) ? Half::pair(result[j], result[j + 1]) : Half::pair(NAN, NAN);
    }
    auto* to = static_cast<Storage*>(args.y) + static_cast<int64_t>(tile.token_begin + token) * args.n + output;
    device::store_global(reinterpret_cast<device::Vector*>(to), stored);
  }
}

// Adds the sums that several slices left. Thread block (x: token; y: kAddThreads outputs).
template <class Half>
RRT_DEVICE void add_parts_body(const DecodeArgs& args) {
  const device::Index block = device::block_index();
  const int token = block.x, row = block.y * kAddThreads + device::thread_index();
  device::launch_dependents();
  device::dependency_wait();
  if (row >= args.n) return;
  const int loop = device::load_global(args.loops + token);
  const float sum = add_parts(args.part_sums, args.m, args.n, token, row);
  store_result<Half>(args, token, row, sum + load_bias<Half>(args, loop, row));
}

}  // namespace rrt::loop_lora
