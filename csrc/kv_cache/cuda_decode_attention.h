// Bodies of the CUDA kernels of loop_kv_attention; cuda_attention.h has what they share with prefill.
//
// As in FlashDecoding, a context is split into pieces, one for each thread block. Its 4 warps share the slots, 16 in
// turn, and their results are merged in order; then combine_body merges the pieces. Both splits are at slots that
// depend on the context alone, so a row has the same bits in any batch.
//
// Keys and values alternate in a warp's ring of stages, which leaves a multiprocessor room for two thread blocks: one
// streams while the other begins or ends. A turn's pages are looked up once, by one lane per slot, a turn ahead.
#pragma once

#include "kv_cache/cuda_attention.h"

namespace rrt::kv_cache {

// Slots of a piece: of short contexts few, so that some tens of rows occupy the GPU; of long ones more, since each
// piece costs a trip of its results through memory.
constexpr int kShortPiece = 128, kLongPiece = 256, kMaxShortContext = 2048;
RRT_DEVICE constexpr int piece_slots(int context) { return context <= kMaxShortContext ? kShortPiece : kLongPiece; }

// The most pieces of contexts up to `room`.
constexpr int64_t most_pieces(int64_t room) {
  const int64_t of_short = ceil_div<kShortPiece>(room < kMaxShortContext ? room : kMaxShortContext);
  const int64_t of_long = ceil_div<kLongPiece>(room);
  const int64_t most = of_short > of_long ? of_short : of_long;
  return most > 1 ? most : 1;
}

// How a thread block uses shared memory. A stage is the keys or the values of a turn.
template <int HEAD_DIM, int STAGES>
struct DecodeShared {
  static constexpr int kHeadDim = HEAD_DIM;
  static constexpr int kStages = STAGES;
  static constexpr int kQueryBytes = kMmaRows * kRowStride<HEAD_DIM> * 2;
  static constexpr int kStageBytes = kMmaSlots * kRowStride<HEAD_DIM> * 2;
  static constexpr int kWarpBytes = STAGES * kStageBytes;
  static constexpr int kMergeStride = HEAD_DIM + 8;  // floats: rows that are stored at once lie in different banks
  static constexpr int kMergeBytes = kWarps * kMmaRows * kMergeStride * 4;
  static constexpr int kWorkBytes = kQueryBytes + kWarps * kWarpBytes;
  static constexpr int kBytes = kWorkBytes > kMergeBytes ? kWorkBytes : kMergeBytes;
};

// As many stages as let two thread blocks share a multiprocessor: an A100's, but for head dim 256 an H100's.
using DecodeInstances = TypeList<DecodeShared<64, 7>, DecodeShared<80, 6>, DecodeShared<128, 4>, DecodeShared<256, 3>>;

// The number of slots that a decode row sees: at most as many as its block table has, since only for these are there
// pieces.
template <bool HINT = false>
RRT_DEVICE int decode_context(const CudaAttentionArgs& args, int row) {
  const int32_t* of_row = args.context_lens + row;
  const int context = HINT ? device::load_hint(of_row) : device::load_global(of_row);
  const int room = args.max_pages * args.page_size.value;
  return context < room ? context : room;
}

// Asks the second-level cache for the keys of a warp's first turn while the kernels before this one may still run. What
// it finds in the tables may be about to change: all is looked up again after the wait, and no result depends on it.
template <class Storage, int HEAD_DIM>
RRT_DEVICE void prefetch_first_keys(const CudaAttentionArgs& args, int row, int piece, int kv_head, int first_slot) {
  const int32_t* table = block_table(args, row);
  const int of_short = piece * kShortPiece + first_slot, of_long = piece * kLongPiece + first_slot;
  const int page_of_short = load_page<true>(args, table, of_short), page_of_long = load_page<true>(args, table, of_long);
  const int context = decode_context<true>(args, row);
  const bool is_short = piece_slots(context) == kShortPiece;
  const int slot = is_short ? of_short : of_long;
  const auto number = slot_on<int64_t>(args, is_short ? page_of_short : page_of_long, slot);
  if (slot >= context || number < 0) return;
  const auto* key = static_cast<const Storage*>(args.k_cache) + (number * args.num_kv_heads + kv_head) * HEAD_DIM;
  // Two lanes have the slot, and take every other line of it.
  constexpr int kLineElements = 64;
#pragma unroll
  for (int first = 0; first < HEAD_DIM; first += 2 * kLineElements) {
    const int column = first + device::thread_index() % 32 / kMmaSlots * kLineElements;
    if (column < HEAD_DIM) device::prefetch_line(key + column);
  }
}

// Thread block (x: row; y: key/value head and tile of its query heads; z: piece).
template <class Half, int HEAD_DIM, int STAGES>
RRT_DEVICE void decode_attention_body(const CudaAttentionArgs& args) {
  using Storage = typename Half::Storage;
  using Shared = DecodeShared<HEAD_DIM, STAGES>;
  const device::Index block = device::block_index();
  const int thread = device::thread_index(), warp = thread / 32, lane = thread % 32;
  const int tiles = ceil_div<kMmaRows>(args.group.value);
  const int kv_head = block.y / tiles, first = block.y % tiles * kMmaRows;
  const int first_slot = warp * kMmaSlots + lane % kMmaSlots;  // of the piece, that this lane looks up
  if (args.prefetches) prefetch_first_keys<Storage, HEAD_DIM>(args, block.x, block.z, kv_head, first_slot);
  device::dependency_wait();
  device::launch_dependents();
  const int32_t* table = block_table(args, block.x);
  // Both pages that the first slot may be on, while the context's length is on its way.
  const int page_of_short = load_page(args, table, block.z * kShortPiece + first_slot);
  const int page_of_long = load_page(args, table, block.z * kLongPiece + first_slot);
  // Queries and their positions, too.
  const int heads = args.group.value - first;
  const QueryTile tile{block.x, block.x, first, heads < kMmaRows ? heads : kMmaRows, kv_head, 0, args.group};
  QueryVectors<Half, HEAD_DIM, kMmaRows, kThreads> vectors;
  static_assert(vectors.kBatch == vectors.kOfThread, "all of a thread's queries are on their way at once");
  if (args.vector_queries) vectors.load(args, tile, thread);
  const int context = decode_context(args, block.x);
  const int piece = piece_slots(context), begin = block.z * piece;
  if (begin >= context && !(context <= 0 && block.z == 0)) return;
  const int end = context < begin + piece ? context : begin + piece;
  int page = piece == kShortPiece ? page_of_short : page_of_long;
  const auto slot_of = [&](int turn) { return begin + kWarps * kMmaSlots * turn + first_slot; };

  char* shared = device::shared_memory();
  auto* queries = reinterpret_cast<Storage*>(shared);
  char* stages = shared + Shared::kQueryBytes + warp * Shared::kWarpBytes;
  const auto cache = [&](const void* of) { return static_cast<const Storage*>(of) + kv_head * HEAD_DIM; };
  const int slot_stride = args.num_kv_heads * HEAD_DIM;

  // Turns of the warp; steps 2 i and 2 i + 1 copy the keys and the values of turn i.
  const int turns = (ceil_div<kMmaSlots>(end - begin) - warp + kWarps - 1) / kWarps;
  int fetched = 0, fetch_stage = 0, stage = 0;  // turns whose keys have been fetched; byte offsets
  bool is_missing = false;                      // a page of the lane's slots
  SlotCopies<Storage, HEAD_DIM, kMmaSlots> copies;
  const auto advance = [](int& of) {
    of = of + Shared::kStageBytes == Shared::kWarpBytes ? 0 : of + Shared::kStageBytes;
  };
  const auto fetch_keys = [&] {
    if (fetched < turns) {
      const int slot = slot_of(fetched);
      const int number = slot < end ? slot_on<int>(args, page, slot) : -1;
      is_missing |= slot < end && number < 0;
      copies.share(number);
      copies.copy(reinterpret_cast<Storage*>(stages + fetch_stage), cache(args.k_cache), slot_stride);
      page = load_page(args, table, slot_of(fetched + 1));  // behind the copies, which nothing then holds up
    }
    ++fetched;
  };
  const auto fetch = [&](bool of_keys) {
    if (of_keys) {
      fetch_keys();
    } else if (fetched <= turns) {
      copies.copy(reinterpret_cast<Storage*>(stages + fetch_stage), cache(args.v_cache), slot_stride);
    }
    advance(fetch_stage);
    device::copy_commit();
  };
  // After this, every lane's copies of the step are there, and the stage that the next fetch fills has been read.
  const auto next_step = [] {
    device::copy_wait<STAGES - 2>();
    device::warp_barrier();
  };
#pragma unroll
  for (int step = 0; step < STAGES - 1; ++step) fetch(step % 2 == 0);
  if (context > 0 && args.vector_queries) {
    vectors.rotate(args, tile, thread, queries);
  } else if (context > 0) {
    load_query_elements<Half, HEAD_DIM, kMmaRows, kThreads>(args, tile, queries);
  }
  device::block_barrier();

  AttentionWarp<Half, HEAD_DIM, 1, kMmaSlots> attention;
  attention.begin(queries);
  const float scale = static_cast<float>(args.scale) * kLog2E;
  const int limits[1][2] = {{end, end}};
  for (int turn = 0; turn < turns; ++turn) {
    const int first_of_turn = begin + (warp + kWarps * turn) * kMmaSlots;
    next_step();
    fetch(STAGES % 2 == 1);
    attention.score(reinterpret_cast<const Storage*>(stages + stage), scale, first_of_turn + kMmaSlots > end,
                    first_of_turn, limits);
    advance(stage);
    next_step();
    fetch(STAGES % 2 == 0);
    attention.add_values(reinterpret_cast<const Storage*>(stages + stage));
    advance(stage);
  }
  device::copy_wait<0>();
  attention.finish(scale);
  // All query heads see all slots.
  const float poison = device::any_lane(is_missing) ? NAN : 0.0f;

  const bool is_too_long = device::load_global(args.context_lens + block.x) > context;

  // [warp, row, kMergeStride]: sums, the largest score, the weights.
  device::block_barrier();
  float* merged = reinterpret_cast<float*>(shared);
  const auto row_of = [&](int of_warp, int row) { return merged + (of_warp * kMmaRows + row) * Shared::kMergeStride; };
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (lane / 4 + 8 * half >= tile.rows) continue;
    float* row = row_of(warp, lane / 4 + 8 * half);
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 8; ++i) {
      const float(&sum)[4] = attention.sums[0][i];
      device::store_shared(reinterpret_cast<FloatPair*>(row + 8 * i + lane % 4 * 2),
                           FloatPair{sum[2 * half], sum[2 * half + 1]});
    }
    if (lane % 4 == 0) {
      device::store_shared(reinterpret_cast<FloatPair*>(row + HEAD_DIM),
                           FloatPair{attention.largest[0][half], attention.weights[0][half] + poison});
    }
  }
  device::block_barrier();
  const bool is_whole = context <= piece;
  for (int row = warp; row < tile.rows; row += kWarps) {
    const auto of = [&](int of_warp, int column) {
      return device::load_shared(reinterpret_cast<const FloatPair*>(row_of(of_warp, row) + column));
    };
    FloatPair ends[kWarps];
    float largest = -INFINITY, weights = 0, factors[kWarps];
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      ends[w] = of(w, HEAD_DIM);
      largest = fmaxf(largest, ends[w].low);
    }
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      factors[w] = device::exp2(ends[w].low - largest);
      weights += factors[w] * ends[w].high;
    }
    const float none = is_too_long ? NAN : 0.0f;
    const float unit = is_whole && context > 0 ? 1 / weights : 1.0f;
    const int64_t head = static_cast<int64_t>(block.x) * args.num_heads + tile.head(row);
    float* partial = args.partial + (head * args.pieces + block.z) * (HEAD_DIM + 2);
#pragma unroll
    for (int first_column = 0; first_column < HEAD_DIM; first_column += 64) {
      const int column = first_column + 2 * lane;
      if (first_column + 64 > HEAD_DIM && column >= HEAD_DIM) continue;
      FloatPair sum{none, none};
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        const FloatPair part = of(w, column);
        sum.low += factors[w] * part.low;
        sum.high += factors[w] * part.high;
      }
      if (is_whole) {
        device::store_global(reinterpret_cast<uint32_t*>(static_cast<Storage*>(args.out) + head * HEAD_DIM + column),
                             Half::pair(sum.low * unit, sum.high * unit));
      } else {
        device::store_global(reinterpret_cast<FloatPair*>(partial + column), sum);
      }
    }
    if (!is_whole && lane == 0) {
      device::store_global(reinterpret_cast<FloatPair*>(partial + HEAD_DIM), FloatPair{largest, weights});
    }
  }
}

// Shared memory of combine_body.
template <int HEAD_DIM>
constexpr int kCombineBytes = kWarps * (HEAD_DIM + 2) * 4;

// Thread block (x: row; y: head). Merges the pieces of a long context, every fourth in order by each warp and then
// these; the result of a context that is one piece is final already.
template <class Half, int HEAD_DIM>
RRT_DEVICE void combine_body(const CudaAttentionArgs& args) {
  using Storage = typename Half::Storage;
  constexpr int kStride = HEAD_DIM + 2, kPairs = HEAD_DIM / 2, kLanePairs = ceil_div<32>(kPairs);
  const device::Index block = device::block_index();
  const int thread = device::thread_index(), warp = thread / 32, lane = thread % 32;
  device::launch_dependents();
  device::dependency_wait();
  const int context = decode_context(args, block.x), piece = piece_slots(context);
  if (context <= piece) return;
  const int pieces = piece == kShortPiece ? ceil_div<kShortPiece>(context) : ceil_div<kLongPiece>(context);
  const int64_t head = static_cast<int64_t>(block.x) * args.num_heads + block.y;
  const float* partial = args.partial + head * args.pieces * kStride;
  const auto of = [&](int index, int column) {
    const float* from = partial + static_cast<int64_t>(index) * kStride + column;
    return device::load_global(reinterpret_cast<const FloatPair*>(from));
  };

  float largest = -INFINITY;
  for (int i = lane; i < pieces; i += 32) largest = fmaxf(largest, of(i, HEAD_DIM).low);
#pragma unroll
  for (int mask = 1; mask < 32; mask *= 2) largest = fmaxf(largest, device::shuffle_xor(largest, mask));
  FloatPair sums[kLanePairs] = {};
  float weights = 0;
#pragma unroll 4
  for (int i = warp; i < pieces; i += kWarps) {
    const FloatPair ends = of(i, HEAD_DIM);
    const float factor = device::exp2(ends.low - largest);
    weights += factor * ends.high;
#pragma unroll
    for (int j = 0; j < kLanePairs; ++j) {
      if (lane + 32 * j >= kPairs) continue;
      const FloatPair pair = of(i, 2 * (lane + 32 * j));
      sums[j].low += factor * pair.low;
      sums[j].high += factor * pair.high;
    }
  }

  auto* merged = reinterpret_cast<float*>(device::shared_memory());
  const auto at = [&](int of_warp, int column) {
    return reinterpret_cast<FloatPair*>(merged + of_warp * kStride + column);
  };
#pragma unroll
  for (int j = 0; j < kLanePairs; ++j) {
    if (lane + 32 * j < kPairs) device::store_shared(at(warp, 2 * (lane + 32 * j)), sums[j]);
  }
  if (lane == 0) device::store_shared(at(warp, HEAD_DIM), FloatPair{weights, 0});
  device::block_barrier();
  if (thread >= kPairs) return;
  FloatPair sum{0, 0};
  weights = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    const FloatPair part = device::load_shared(at(w, 2 * thread));
    sum.low += part.low;
    sum.high += part.high;
    weights += device::load_shared(at(w, HEAD_DIM)).low;
  }
  device::store_global(reinterpret_cast<uint32_t*>(static_cast<Storage*>(args.out) + head * HEAD_DIM + 2 * thread),
                       Half::pair(sum.low / weights, sum.high / weights));
}

}  // namespace rrt::kv_cache
