// Body of the column kernel, which computes both shrink and the product; cuda_decode.h explains the terms.
//
// A tile has 16 outputs, and each of the 8 warps sums one part of it. Few bytes have to arrive before a thread block is
// done, which suits small layers; but x is brought once for every 16 outputs.
#pragma once

#include "loop_lora/cuda_cursor.h"

namespace rrt::loop_lora {

constexpr int kColumnTileRows = 16;
constexpr int kColumnThreads = 32 * kParts;

// As many stages as let an H100's multiprocessor hold two thread blocks.
using ColumnInstances =
    TypeList<DecodeInstance<8, 8>, DecodeInstance<16, 6>, DecodeInstance<32, 4>, DecodeInstance<64, 4>>;

constexpr int kSumStride = kColumnTileRows + 4;  // of a token's sums: spreads tokens over the banks

// The ring, whose memory the sums of the parts reuse.
template <int TOKENS, int STAGES>
constexpr int column_shared_bytes() {
  const int ring = STAGES * (2 + TOKENS / 8) * kColumnThreads * 16, sums = kParts * TOKENS * kSumStride * 4;
  return ring > sums ? ring : sums;
}

// Thread block (x: tile; y: loop, for shrink).
template <class Half, int TOKENS, int STAGES, bool SHRINK>
RRT_DEVICE void column_body(const DecodeArgs& args) {
  using Storage = typename Half::Storage;
  constexpr int kTokenTiles = TOKENS / 8, kVectors = 2 + kTokenTiles;
  const device::Index block = device::block_index();
  const int warp = device::thread_index() / 32, lane = device::thread_index() % 32;
  const int lane_row = lane / 4, lane_column = lane % 4 * kVectorElements;
  const DecodeTile tile = find_tile<kColumnTileRows, TOKENS>(args, block.x);
  if constexpr (SHRINK) {
    // The product reads x at once. So it may not start before the kernel that may have written x has ended.
    device::dependency_wait();
    device::launch_dependents();
    if ((find_loop_mask(args.loops, tile.token_begin, tile.tokens, args.num_loops) >> block.y & 1) == 0) return;
  }
  const int total_rows = SHRINK ? args.total_rank : args.n;
  const int rows = total_rows - tile.row_begin < kColumnTileRows ? total_rows - tile.row_begin : kColumnTileRows;
  const auto* matrix = static_cast<const Storage*>(SHRINK ? args.lora_a : args.weight);
  if (SHRINK) matrix += static_cast<int64_t>(block.y) * args.total_rank * args.k;
  auto cursor = make_cursor<Storage>(args, matrix, tile, warp, warp + 1, !SHRINK);

  const auto slot = [&](int stage, int vector) {
    return reinterpret_cast<device::Vector*>(device::shared_memory()) +
           (stage * kVectors + vector) * kColumnThreads + device::thread_index();
  };
  const auto fetch = [&](int k_step) {
    if (cursor.next()) {
      const bool in_columns = lane_column < cursor.columns;
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        const int row = (i < 2 ? 8 * i : 8 * (i - 2)) + lane_row;
        const Storage* from = i < 2 ? cursor.w_from : cursor.x_from;
        const bool valid = in_columns && row < (i < 2 ? rows : tile.tokens);
        const int64_t stride = i < 2 ? cursor.w_stride : cursor.x_stride;
        device::copy_async(slot(k_step % STAGES, i), valid ? from + row * stride + lane_column : from, valid);
      }
    }
    device::copy_commit();
  };

  float sums[1][kTokenTiles][4] = {};
  int k_step = 0;
  const auto multiply_next = [&] {
    device::copy_wait<STAGES - 2>();
    const int stage = k_step % STAGES;
    const device::Vector w[2] = {device::load_shared(slot(stage, 0)), device::load_shared(slot(stage, 1))};
    multiply_k_step<Half, 1, kTokenTiles>(w, [&](int i) { return device::load_shared(slot(stage, 2 + i)); }, sums);
    fetch(k_step + STAGES - 1);
    ++k_step;
  };
#pragma unroll
  for (int i = 0; i < STAGES - 1; ++i) fetch(i);
  const int column_steps = num_column_steps(warp, cursor.column_steps);
  while (k_step < column_steps) multiply_next();
  const int k_steps = cursor.k_steps(warp);
  while (k_step < k_steps) multiply_next();
  device::copy_wait<0>();
  // A kernel that waits for this one relies on the one before this having ended too.
  if (!SHRINK && !cursor.waited) device::dependency_wait();

  // The sums [part, token, row] go where the ring was.
  device::block_barrier();
  float* partial = reinterpret_cast<float*>(device::shared_memory());
#pragma unroll
  for (int token_tile = 0; token_tile < kTokenTiles; ++token_tile) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i / 2 * 8, token = 8 * token_tile + lane % 4 * 2 + i % 2;
      device::store_shared(partial + (warp * TOKENS + token) * kSumStride + row, sums[0][token_tile][i]);
    }
  }
  device::block_barrier();
  for (int i = device::thread_index(); i < tile.tokens * kColumnTileRows; i += kColumnThreads) {
    const int token = i / kColumnTileRows, row = i % kColumnTileRows;
    if (row >= rows) continue;
    float sum = 0;
    for (int part = 0; part < kParts; ++part) {
      sum += device::load_shared(partial + (part * TOKENS + token) * kSumStride + row);
    }
    const int loop = device::load_global(args.loops + tile.token_begin + token);
    if constexpr (SHRINK) {
      Storage* t = static_cast<Storage*>(args.shrunk) +
                   (static_cast<int64_t>(block.y) * args.padded_m + tile.token_begin + token) * args.total_rank;
      device::store_global(t + tile.row_begin + row, Half::narrow(loop == block.y ? sum : 0.0f));
    } else {
      store_result<Half>(args, tile.token_begin + token, loop, tile.row_begin + row, sum);
    }
  }
}

}  // namespace rrt::loop_lora
