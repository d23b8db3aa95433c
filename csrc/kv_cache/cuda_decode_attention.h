// Bodies of the CUDA kernels of loop_kv_attention; cuda_attention.h has what they share with prefill.
//
// As in FlashDecoding, a context is split into pieces, one for each thread block. Its 4 warps share the slots, 16 in
// turn, and their results are merged in order; then combine_body merges the pieces. Both splits are at slots that
// depend on the context alone, so a row has the same bits in any batch.
//
// Keys and values alternate in a warp's ring of stages, which leaves a multiprocessor room for two thread blocks: one
// streams while the other begins or ends. The pages of two turns are looked up at once, by a lane per slot, and ahead.
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

constexpr int kTurnSlots = kWarps * kMmaSlots;  // of a thread block
static_assert(kShortPiece == 2 * kTurnSlots, "one look-up is of a short piece's turns");

// So that a multiprocessor of an H100 holds as many blocks as its shared memory allows, three (head dim 256: two, and
// beside them two of combine_body, which can be launched early then); and of these, those of queries, sums and scores.
template <int HEAD_DIM>
constexpr int kDecodeRegisters = HEAD_DIM <= 128 ? 168 : 200;
constexpr int kOperandRegisters = 192;

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
RRT_DEVICE int clamp_context(const CudaAttentionArgs& args, int context) {
  const int room = args.max_pages * args.page_size.value;
  return context < room ? context : room;
}

// The number of pieces of a context; at most that of its length for which the caller has room.
RRT_DEVICE int num_pieces(int context) {
  return piece_slots(context) == kShortPiece ? ceil_div<kShortPiece>(context) : ceil_div<kLongPiece>(context);
}

// Asks the second-level cache for the keys and values of a warp's first turn while the kernels before this one may
// still run. What it finds in the tables may be about to change: all is looked up again after the wait, and no result
// depends on it. On a page, slots with all their heads lie side by side: each head's thread block asks for a share.
template <class Storage, int HEAD_DIM>
RRT_DEVICE void prefetch_first_turn(const CudaAttentionArgs& args, int row, int piece, int kv_head, int first_slot) {
  const int32_t* table = block_table(args, row);
  const int of_short = piece * kShortPiece + first_slot, of_long = piece * kLongPiece + first_slot;
  const int page_of_short = load_page<true>(args, table, of_short);
  const int page_of_long = load_page<true>(args, table, of_long);
  const int context = clamp_context(args, device::load_hint(args.context_lens + row));
  const bool is_short = piece_slots(context) == kShortPiece;
  const int slot = is_short ? of_short : of_long;
  const auto number = slot_on<int64_t>(args, is_short ? page_of_short : page_of_long, slot);
  if (slot >= context || number < 0) return;
  const int on_page = args.page_size.value - args.page_size.remainder(slot), seen = context - slot;
  const int others = on_page < seen ? on_page : seen, slots = others < kMmaSlots ? others : kMmaSlots;
  const int64_t share = (number * args.num_kv_heads + kv_head * slots) * HEAD_DIM;
  const int lane = device::thread_index() % 32;
  const void* cache = lane == 0 ? args.k_cache : args.v_cache;
  if (lane < 2) device::prefetch(static_cast<const Storage*>(cache) + share, slots * HEAD_DIM * 2);
}

// Thread block (x: row; y: key/value head and tile of its query heads; z: piece).
template <class Half, int HEAD_DIM, int STAGES>
RRT_DEVICE void decode_attention_body(const CudaAttentionArgs& args) {
  using Storage = typename Half::Storage;
  using Shared = DecodeShared<HEAD_DIM, STAGES>;
  const device::Index block = device::block_index();
  const int thread = device::thread_index(), warp = thread / 32, lane = thread % 32;
  const int kv_head = args.head_tiles.divide(block.y), first = args.head_tiles.remainder(block.y) * kMmaRows;
  const int in_layer = block.x + args.num_queries * block.y;
  const int blocks_before = args.num_queries * args.num_kv_heads * args.head_tiles.value * block.z;
  if (first == 0 && in_layer + blocks_before < args.first_wave) {  // of several tiles of heads, the first
    prefetch_first_turn<Storage, HEAD_DIM>(args, block.x, block.z, kv_head, warp * kMmaSlots);
  }
  // Of the piece, that this lane looks up: of the warp's first turn or its second.
  const int first_slot = lane / kMmaSlots * kTurnSlots + warp * kMmaSlots + lane % kMmaSlots;
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
  const int length = device::load_global(args.context_lens + block.x), context = clamp_context(args, length);
  const int piece = piece_slots(context), begin = block.z * piece;
  if (begin >= context && !(context <= 0 && block.z == 0)) return;
  const int end = context < begin + piece ? context : begin + piece;
  int page = piece == kShortPiece ? page_of_short : page_of_long;
  const auto slot_of = [&](int even_turn) { return begin + kTurnSlots * even_turn + first_slot; };

  char* shared = device::shared_memory();
  auto* queries = reinterpret_cast<Storage*>(shared);
  char* stages = shared + Shared::kQueryBytes + warp * Shared::kWarpBytes;
  const auto cache = [&](const void* of) { return static_cast<const Storage*>(of) + kv_head * HEAD_DIM; };
  const int slot_stride = args.num_kv_heads * HEAD_DIM;

  // Turns of the warp; steps 2 i and 2 i + 1 copy the keys and the values of turn i.
  const int turns = (ceil_div<kMmaSlots>(end - begin) - warp + kWarps - 1) / kWarps;
  int fetched = 0, fetch_stage = 0, stage = 0;  // turns whose keys have been fetched; byte offsets
  int number = -1;                              // of the lane's slot in the cache
  bool is_missing = false;                      // a page of the lane's slots
  SlotCopies<Storage, HEAD_DIM, kMmaSlots> copies;
  const auto advance = [](int& of) {
    of = of + Shared::kStageBytes == Shared::kWarpBytes ? 0 : of + Shared::kStageBytes;
  };
  const auto fetch_keys = [&] {
    if (fetched < turns) {
      const bool is_even = fetched % 2 == 0;
      if (is_even) {
        const int slot = slot_of(fetched);
        number = slot < end ? slot_on<int>(args, page, slot) : -1;
        is_missing |= slot < end && number < 0;
      }
      copies.share(number, is_even ? 0 : kMmaSlots);
      copies.copy(reinterpret_cast<Storage*>(stages + fetch_stage), cache(args.k_cache), slot_stride);
      if (!is_even && fetched + 1 < turns) page = load_page(args, table, slot_of(fetched + 1));
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

  AttentionWarp<Half, HEAD_DIM, 1, kMmaSlots, kOperandRegisters> attention;
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
  const float none = length > context ? NAN : 0.0f;
  const int64_t head = static_cast<int64_t>(block.x) * args.num_heads + tile.head(0);
  auto* out = static_cast<Storage*>(args.out) + head * HEAD_DIM;
  float* partial = args.partial + (head * args.pieces + block.z) * (HEAD_DIM + kPartialEnds);
  constexpr int kVectors = HEAD_DIM / 4, kBatch = HEAD_DIM / 64;  // a thread's, which are merged side by side
  for (int first_vector = thread; first_vector < tile.rows * kVectors; first_vector += kBatch * kThreads) {
    FloatVector sums[kBatch];
    FloatPair ends[kBatch];
    const auto row_at = [&](int j) { return (first_vector + j * kThreads) / kVectors; };
    const auto column_at = [&](int j) { return (first_vector + j * kThreads) % kVectors * 4; };
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int row = row_at(j) < tile.rows ? row_at(j) : 0;
      FloatPair of_warp[kWarps];
      float largest = -INFINITY, weights = 0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        of_warp[w] = device::load_shared(reinterpret_cast<const FloatPair*>(row_of(w, row) + HEAD_DIM));
        largest = fmaxf(largest, of_warp[w].low);
      }
#pragma unroll
      for (float& sum : sums[j].value) sum = none;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        const auto part = device::load_shared(reinterpret_cast<const FloatVector*>(row_of(w, row) + column_at(j)));
        const float factor = device::exp2(of_warp[w].low - largest);
        weights += factor * of_warp[w].high;
#pragma unroll
        for (int k = 0; k < 4; ++k) sums[j].value[k] += factor * part.value[k];
      }
      ends[j] = {largest, weights};
    }
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      if (row_at(j) >= tile.rows) continue;
      if (is_whole) {
        const float unit = context > 0 ? 1 / ends[j].high : 1.0f;
        const auto pair = [&](int k) { return Half::pair(sums[j].value[k] * unit, sums[j].value[k + 1] * unit); };
        auto* to = out + row_at(j) * HEAD_DIM + column_at(j);
        device::store_global(reinterpret_cast<HalfPairs*>(to), HalfPairs{{pair(0), pair(2)}});
      } else {
        float* to = partial + row_at(j) * (args.pieces * (HEAD_DIM + kPartialEnds));
        device::store_floats(to + column_at(j), sums[j].value);
        if (column_at(j) == 0) device::store_global(reinterpret_cast<FloatPair*>(to + HEAD_DIM), ends[j]);
      }
    }
  }
}

// Of combine_body: each thread has two columns.
template <int HEAD_DIM>
constexpr int kCombineThreads = round_up<32>(HEAD_DIM / 2);

// How many pieces combine_body may load in one trip. Many take registers that its blocks don't find while decode's run,
// so they only pay where the tables have room for contexts of many trips (beyond 8192 slots).
constexpr int kFewPieces = 8, kManyPieces = 32;
constexpr bool combines_many(int pieces) { return pieces > kManyPieces; }

// Thread block (x: row; y: head). Merges the pieces of a long context in order; the result of a context that is one
// piece is final already. The first batch comes together with the context's length, whether it has so many pieces or
// not; then AT_ONCE pieces a trip, which changes no bit.
template <class Half, int HEAD_DIM, int AT_ONCE>
RRT_DEVICE void combine_body(const CudaAttentionArgs& args) {
  using Storage = typename Half::Storage;
  constexpr int kBatch = 8;  // pieces with which sums are rescaled once
  static_assert(AT_ONCE % kBatch == 0 && AT_ONCE <= 32, "each lane has the ends of a piece");
  const device::Index block = device::block_index();
  const int thread = device::thread_index(), column = 2 * thread < HEAD_DIM ? 2 * thread : 0;
  const int64_t head = static_cast<int64_t>(block.x) * args.num_heads + block.y;
  const float* partial = args.partial + head * args.pieces * (HEAD_DIM + kPartialEnds);
  device::launch_dependents();
  device::dependency_wait();
  const int length = device::load_global(args.context_lens + block.x);
  FloatPair sums[AT_ONCE], ends;  // ends: of piece `first` + lane
  const auto load_pair = [&](int piece, int at) {
    return device::load_global(reinterpret_cast<const FloatPair*>(partial + piece * (HEAD_DIM + kPartialEnds) + at));
  };
  const auto load_ends = [&](int first, int limit) {
    const int piece = first + thread % AT_ONCE;
    ends = load_pair(piece < limit ? piece : first, HEAD_DIM);
  };
  const auto load_batch = [&](int first, int batch, int limit) {
#pragma unroll
    for (int j = batch; j < batch + kBatch; ++j) sums[j] = load_pair(first + j < limit ? first + j : first, column);
  };
  load_ends(0, args.pieces);
  load_batch(0, 0, args.pieces);
  const int pieces = num_pieces(clamp_context(args, length));

  FloatPair sum{0, 0};
  float largest = -INFINITY, weights = 0;
  // Whatever the number of pieces, the first are taken, lest the compiler put their loads behind that of the length.
  int first = 0;
  do {
    if (first > 0) {
      load_ends(first, pieces);
      load_batch(first, 0, pieces);
    }
    if (first + kBatch < pieces) {
#pragma unroll
      for (int batch = kBatch; batch < AT_ONCE; batch += kBatch) load_batch(first, batch, pieces);
    }
#pragma unroll
    for (int batch = 0; batch < AT_ONCE; batch += kBatch) {
      if (batch > 0 && first + batch >= pieces) break;
      FloatPair end[kBatch];
      float next = largest;
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        end[j] = {device::shuffle_from(ends.low, batch + j), device::shuffle_from(ends.high, batch + j)};
        next = first + batch + j < pieces ? fmaxf(next, end[j].low) : next;
      }
      const float shrink = device::exp2(largest - next);
      largest = next;
      weights *= shrink;
      sum = {sum.low * shrink, sum.high * shrink};
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        if (first + batch + j >= pieces) continue;
        const float factor = device::exp2(end[j].low - largest);
        weights = fmaf(factor, end[j].high, weights);
        sum = {fmaf(factor, sums[batch + j].low, sum.low), fmaf(factor, sums[batch + j].high, sum.high)};
      }
    }
    first += AT_ONCE;
  } while (first < pieces);
  if (pieces <= 1 || 2 * thread >= HEAD_DIM) return;
  const float unit = 1 / weights;
  device::store_global(reinterpret_cast<uint32_t*>(static_cast<Storage*>(args.out) + head * HEAD_DIM + column),
                       Half::pair(sum.low * unit, sum.high * unit));
}

}  // namespace rrt::kv_cache
