// Body of the row kernel, which computes the product, and of the kernel that adds its slices; cuda_decode.h explains
// the terms.
//
// A tile has 128 outputs, 32 for each of the 4 warps, which share x. A thread block sums the parts of its slice one
// after the other.
#pragma once

#include "loop_lora/cuda_cursor.h"

namespace rrt::loop_lora {

constexpr int kRowWarps = 4;
constexpr int kRowThreads = 32 * kRowWarps;
constexpr int kWarpTiles = 2;  // of 16 outputs, per warp
constexpr int kWarpRows = 16 * kWarpTiles;
constexpr int kRowTileRows = kRowWarps * kWarpRows;
constexpr int kAddThreads = 256;

// As many stages as let an A100's multiprocessor hold two thread blocks.
using RowInstances =
    TypeList<DecodeInstance<8, 8>, DecodeInstance<16, 8>, DecodeInstance<32, 7>, DecodeInstance<64, 6>>;

template <int TOKENS, int STAGES>
constexpr int row_shared_bytes() {
  return STAGES * (2 * kWarpTiles * kRowThreads + TOKENS / 8 * 32) * 16;
}

// Thread block (x: tile; y: slice).
template <class Half, int TOKENS, int STAGES>
RRT_DEVICE void row_body(const DecodeArgs& args) {
  using Storage = typename Half::Storage;
  constexpr int kTokenTiles = TOKENS / 8, kWeightVectors = 2 * kWarpTiles;
  constexpr int kStageVectors = kWeightVectors * kRowThreads + kTokenTiles * 32;
  const bool whole = args.parts_per_block == kParts;
  if (!whole) device::launch_dependents();
  const device::Index block = device::block_index();
  const int thread = device::thread_index(), warp = thread / 32, lane = thread % 32;
  const int lane_row = lane / 4, lane_column = lane % 4 * kVectorElements;
  const DecodeTile tile = find_tile<kRowTileRows, TOKENS>(args, block.x);
  const int first_part = block.y * args.parts_per_block;
  auto cursor = make_cursor<Storage>(args, static_cast<const Storage*>(args.weight), tile, first_part,
                                     first_part + args.parts_per_block, true);

  const auto w_at = [&](int stage, int vector) {
    return reinterpret_cast<device::Vector*>(device::shared_memory()) + stage * kStageVectors + vector * kRowThreads +
           thread;
  };
  const auto x_at = [&](int stage, int vector) {
    return reinterpret_cast<device::Vector*>(device::shared_memory()) + stage * kStageVectors +
           kWeightVectors * kRowThreads + vector;
  };
  const auto fetch = [&](int k_step) {
    if (cursor.next()) {
      const bool in_columns = lane_column < cursor.columns;
#pragma unroll
      for (int i = 0; i < kWeightVectors; ++i) {
        const int row = warp * kWarpRows + 8 * i + lane_row;
        const bool valid = in_columns && tile.row_begin + row < args.n;
        device::copy_async(w_at(k_step % STAGES, i),
                           valid ? cursor.w_from + row * cursor.w_stride + lane_column : cursor.w_from, valid);
      }
#pragma unroll
      for (int i = 0; i < ceil_div<kRowWarps>(kTokenTiles); ++i) {
        const int token_tile = i * kRowWarps + warp, token = 8 * token_tile + lane_row;
        if (token_tile >= kTokenTiles) break;
        const bool valid = in_columns && token < tile.tokens;
        device::copy_async(x_at(k_step % STAGES, token_tile * 32 + lane),
                           valid ? cursor.x_from + token * cursor.x_stride + lane_column : cursor.x_from, valid);
      }
    }
    device::copy_commit();
  };

  float sums[kWarpTiles][kTokenTiles][4], total[kWarpTiles][kTokenTiles][4] = {};
  // Calls f(sum, total, row, token, index) for each of the lane's sums; `index` counts the lane's tokens.
  const auto for_each = [&](auto f) {
#pragma unroll
    for (int warp_tile = 0; warp_tile < kWarpTiles; ++warp_tile) {
#pragma unroll
      for (int token_tile = 0; token_tile < kTokenTiles; ++token_tile) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          f(sums[warp_tile][token_tile][i], total[warp_tile][token_tile][i],
            tile.row_begin + warp * kWarpRows + 16 * warp_tile + lane / 4 + i / 2 * 8,
            tile.token_begin + 8 * token_tile + lane % 4 * 2 + i % 2, 2 * token_tile + i % 2);
        }
      }
    }
  };
  int k_step = 0;
  const auto multiply_next = [&] {
    device::copy_wait<STAGES - 2>();
    device::block_barrier();  // every thread's copies are here, and the stage that the next fetch fills has been read
    fetch(k_step + STAGES - 1);
    const int stage = k_step % STAGES;
    device::Vector w[kWeightVectors];
#pragma unroll
    for (int i = 0; i < kWeightVectors; ++i) w[i] = device::load_shared(w_at(stage, i));
    multiply_k_step<Half, kWarpTiles, kTokenTiles>(
        w, [&](int i) { return device::load_shared(x_at(stage, i * 32 + lane)); }, sums);
    ++k_step;
  };
#pragma unroll
  for (int i = 0; i < STAGES - 1; ++i) fetch(i);
  int end = 0;
  for (int part = first_part; part < first_part + args.parts_per_block; ++part) {
    for_each([](float& sum, float&, int, int, int) { sum = 0; });
    const int column_end = end + num_column_steps(part, cursor.column_steps);
    while (k_step < column_end) multiply_next();
    end += cursor.k_steps(part);
    while (k_step < end) multiply_next();
    for_each([&](float sum, float& sum_of_parts, int row, int token, int) {
      if (whole) {
        sum_of_parts += sum;
      } else if (row < args.n && token < args.m) {
        device::store_global(args.part_sums + (static_cast<int64_t>(part) * args.m + token) * args.n + row, sum);
      }
    });
  }
  device::copy_wait<0>();
  // A kernel that waits for this one relies on the one before this having ended too.
  if (!cursor.waited) device::dependency_wait();
  if (!whole) return;
  int loops[2 * kTokenTiles];  // loaded all at once: between the stores, each load would be waited for
#pragma unroll
  for (int i = 0; i < 2 * kTokenTiles; ++i) {
    const int token = tile.token_begin + i / 2 * 8 + lane % 4 * 2 + i % 2;
    loops[i] = token < args.m ? device::load_global(args.loops + token) : -1;
  }
  for_each([&](float, float sum_of_parts, int row, int token, int i) {
    if (row < args.n && token < args.m) store_result<Half>(args, token, loops[i], row, sum_of_parts);
  });
}

// Adds the sums that several slices left. Thread block (x): kAddThreads elements of y.
template <class Half>
RRT_DEVICE void add_parts_body(const DecodeArgs& args) {
  device::dependency_wait();
  const int64_t size = static_cast<int64_t>(args.m) * args.n;
  const int64_t i = static_cast<int64_t>(device::block_index().x) * kAddThreads + device::thread_index();
  if (i >= size) return;
  float sum = 0;
#pragma unroll
  for (int part = 0; part < kParts; ++part) sum += device::load_global(args.part_sums + part * size + i);
  const int token = static_cast<int>(i / args.n);
  store_result<Half>(args, token, device::load_global(args.loops + token), static_cast<int>(i % args.n), sum);
}

}  // namespace rrt::loop_lora
