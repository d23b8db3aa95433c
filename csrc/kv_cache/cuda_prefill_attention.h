// Body of the CUDA kernel of loop_kv_prefill; cuda_attention.h has what it shares with decode.
//
// A thread block has up to 128 query rows of one key/value head and goes through all the slots that the last of them
// sees, SLOTS in turn. All warps copy a turn's keys and values, which alternate in a ring of stages with one barrier
// each, and all use them: they come from memory once per tile of rows. Turns begin at the same slots for every row, and
// slots that a row does not see change none of its bits while they are finite, so a row has the same in any tile.
#pragma once

#include "kv_cache/cuda_attention.h"

namespace rrt::kv_cache {

// Thread blocks of WARPS warps with 16 * ROW_TILES query rows each. A stage is the keys or the values of a turn.
template <int HEAD_DIM, int WARPS, int ROW_TILES, int SLOTS, int STAGES>
struct PrefillShared {
  static constexpr int kHeadDim = HEAD_DIM, kPrefillWarps = WARPS, kRowTiles = ROW_TILES, kSlots = SLOTS;
  static constexpr int kStages = STAGES;
  static constexpr int kPrefillThreads = 32 * WARPS;
  static constexpr int kWarpRows = kMmaRows * ROW_TILES;
  static constexpr int kRows = WARPS * kWarpRows;
  static constexpr int kWarpSlots = SLOTS / WARPS;  // that a warp copies
  static constexpr int kQueryBytes = kRows * kRowStride<HEAD_DIM> * 2;
  static constexpr int kStageBytes = SLOTS * kRowStride<HEAD_DIM> * 2;
  static constexpr int kBytes = kQueryBytes + STAGES * kStageBytes;

  // Each sequence's last tile may have few rows.
  static int tiles(const CudaAttentionArgs& args) {
    return args.num_queries * args.group.value / kRows + args.num_sequences;
  }
};

using PrefillInstances = TypeList<PrefillShared<64, 4, 2, 64, 4>, PrefillShared<80, 4, 2, 64, 4>,
                                  PrefillShared<128, 4, 2, 32, 4>, PrefillShared<256, 8, 1, 32, 4>>;

// Number `index` of the tiles of at most ROWS rows, counted sequence by sequence; with 0 rows if there is none.
template <int ROWS>
RRT_DEVICE QueryTile find_prefill_tile(const CudaAttentionArgs& args, int index, int kv_head) {
  int begin = device::load_global(args.query_start);
  for (int s = 0; s < args.num_sequences; ++s) {
    const int end = device::load_global(args.query_start + s + 1);
    const int rows = (end - begin) * args.group.value, tiles = ceil_div<ROWS>(rows);
    if (index < tiles) {
      const int first = index * ROWS, seen = device::load_global(args.context_lens + s) - (end - begin) + 1;
      return {s, begin, first, rows - first < ROWS ? rows - first : ROWS, kv_head, seen, args.group};
    }
    index -= tiles;
    begin = end;
  }
  return {0, 0, 0, 0, kv_head, 0, args.group};
}

// Thread block (x: tile of query rows, the last one first; y: key/value head). Later rows of a prompt see more slots:
// were they last, they would end long after the others.
template <class Half, int HEAD_DIM, int WARPS, int ROW_TILES, int SLOTS, int STAGES>
RRT_DEVICE void prefill_attention_body(const CudaAttentionArgs& args) {
  using Storage = typename Half::Storage;
  using Shared = PrefillShared<HEAD_DIM, WARPS, ROW_TILES, SLOTS, STAGES>;
  constexpr int kStride = kRowStride<HEAD_DIM>, kWarpSlots = Shared::kWarpSlots;
  const device::Index block = device::block_index();
  const QueryTile tile = find_prefill_tile<Shared::kRows>(args, args.tiles - 1 - block.x, block.y);
  if (tile.rows == 0) return;
  const int warp = device::thread_index() / 32, lane = device::thread_index() % 32;
  char* shared = device::shared_memory();
  char* stages = shared + Shared::kQueryBytes;
  const auto cache = [&](const void* of) { return static_cast<const Storage*>(of) + tile.kv_head * HEAD_DIM; };
  const int slot_stride = args.num_kv_heads * HEAD_DIM;
  // A context that is longer than its table has NaN for a result, without a walk through all of it.
  const int limit = tile.limit(tile.rows - 1), room = args.max_pages * args.page_size.value;
  const int end = limit < room ? limit : room;
  const int turns = ceil_div<SLOTS>(end);

  // The slot that this lane looks up for a turn.
  const auto slot_of = [&](int turn) { return turn * SLOTS + warp * kWarpSlots + lane % kWarpSlots; };
  const int32_t* table = block_table(args, tile.sequence);
  int page = load_page(args, table, slot_of(0));
  int fetched = 0, fetch_stage = 0, stage = 0;  // turns whose keys have been fetched; byte offsets
  int first_missing = end;                      // the first of the lane's slots that has no page
  SlotCopies<Storage, HEAD_DIM, kWarpSlots> copies;
  const auto advance = [](int& of) {
    of = of + Shared::kStageBytes == STAGES * Shared::kStageBytes ? 0 : of + Shared::kStageBytes;
  };
  const auto fetch = [&](bool of_keys) {
    if (of_keys) {
      if (fetched < turns) {
        const int slot = slot_of(fetched);
        const int number = slot < end ? slot_on<int>(args, page, slot) : -1;
        if (number < 0 && slot < first_missing) first_missing = slot;
        page = load_page(args, table, slot_of(fetched + 1));
        copies.share(number);
      }
      ++fetched;
    }
    if (fetched <= turns) {
      auto* to = reinterpret_cast<Storage*>(stages + fetch_stage) + warp * kWarpSlots * kStride;
      copies.copy(to, cache(of_keys ? args.k_cache : args.v_cache), slot_stride);
    }
    advance(fetch_stage);
    device::copy_commit();
  };
  // After this, all copies of the step are there, and the stage that the next fetch fills has been read.
  const auto next_step = [] {
    device::copy_wait<STAGES - 2>();
    device::block_barrier();
  };
#pragma unroll
  for (int step = 0; step < STAGES - 1; ++step) fetch(step % 2 == 0);
  load_queries<Half, HEAD_DIM, Shared::kRows, Shared::kPrefillThreads>(args, tile, reinterpret_cast<Storage*>(shared));

  // The warp's rows, and what they see; those that are not there see what the last one does.
  const int first_row = warp * Shared::kWarpRows, rows = tile.rows - first_row;
  Storage* queries = reinterpret_cast<Storage*>(shared) + first_row * kStride;
  int limits[ROW_TILES][2];
#pragma unroll
  for (int r = 0; r < ROW_TILES; ++r) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = kMmaRows * r + lane / 4 + 8 * half;
      limits[r][half] = row < rows ? tile.limit(first_row + row) : end;
    }
  }
  const int last_row = rows < Shared::kWarpRows ? rows - 1 : Shared::kWarpRows - 1;
  const int least_limit = tile.limit(first_row), warp_end = rows <= 0 ? 0 : tile.limit(first_row + last_row);

  AttentionWarp<Half, HEAD_DIM, ROW_TILES, SLOTS, 208> attention;
  device::block_barrier();
  attention.begin(queries);
  const float scale = static_cast<float>(args.scale) * kLog2E;
  for (int turn = 0; turn < turns; ++turn) {
    const int first_slot = turn * SLOTS;
    const bool is_seen = first_slot < warp_end;
    next_step();
    fetch(STAGES % 2 == 1);
    if (is_seen) {
      attention.score(reinterpret_cast<const Storage*>(stages + stage), scale, first_slot + SLOTS > least_limit,
                      first_slot, limits);
    }
    advance(stage);
    next_step();
    fetch(STAGES % 2 == 0);
    if (is_seen) attention.add_values(reinterpret_cast<const Storage*>(stages + stage));
    advance(stage);
  }
  device::copy_wait<0>();
  attention.finish(scale);

  // The warps looked up different slots.
#pragma unroll
  for (int mask = 1; mask < 32; mask *= 2) {
    const int other = device::shuffle_xor(first_missing, mask);
    if (other < first_missing) first_missing = other;
  }
  device::block_barrier();
  int* missing = reinterpret_cast<int*>(stages);
  if (lane == 0) device::store_shared(missing + warp, first_missing);
  device::block_barrier();
#pragma unroll
  for (int w = 0; w < WARPS; ++w) {
    const int other = device::load_shared(missing + w);
    if (other < first_missing) first_missing = other;
  }

  // Results take the place of the queries, and leave from there 16 bytes a lane.
#pragma unroll
  for (int r = 0; r < ROW_TILES; ++r) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float unit = first_missing < limits[r][half] ? NAN : 1 / attention.weights[r][half];
      Storage* row = queries + (kMmaRows * r + lane / 4 + 8 * half) * kStride + lane % 4 * 2;
#pragma unroll
      for (int i = 0; i < HEAD_DIM / 8; ++i) {
        const float(&sum)[4] = attention.sums[r][i];
        device::store_shared(reinterpret_cast<uint32_t*>(row + 8 * i),
                             Half::pair(sum[2 * half] * unit, sum[2 * half + 1] * unit));
      }
    }
  }
  device::warp_barrier();
  constexpr int kVectors = HEAD_DIM / 8;
  for (int i = lane; i < Shared::kWarpRows * kVectors; i += 32) {
    const int row = i / kVectors, column = i % kVectors * 8;
    if (row >= rows) break;
    const int64_t head =
        static_cast<int64_t>(tile.token(first_row + row)) * args.num_heads + tile.head(first_row + row);
    device::store_global(
        reinterpret_cast<device::Vector*>(static_cast<Storage*>(args.out) + head * HEAD_DIM + column),
        device::load_shared(reinterpret_cast<const device::Vector*>(queries + row * kStride + column)));
  }
}

}  // namespace rrt::kv_cache
