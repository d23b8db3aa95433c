// Bodies of the CUDA kernels of loop_kv_attention and loop_kv_prefill for bfloat16 and float16.
//
// Up to 16 query rows that share a key/value head are the mma's M: in decode the query heads of one row, in prefill
// also those of neighbouring tokens. A warp goes through the slots 16 at a time, which is a tile. Keys are multiplied
// as they lie: a lane loads 16 adjacent bytes of a slot, which are its fragments of two mmas if queries are taken in
// the same order. Values are brought to shared memory and read transposed. Keys and values alternate in a warp's ring
// of stages, which leaves a multiprocessor room for two thread blocks: one streams while the other begins or ends.
//
// decode: as in FlashDecoding, a context is split into pieces of kCudaSplitSlots slots, one for each thread block. Its
// 4 warps share the slots, and their results are merged in order; then combine_body merges the pieces. Both splits are
// at fixed slots, so a row has the same bits in any batch. prefill: every warp has 16 query rows of its own and goes
// through all the slots that the last of them sees.
#pragma once

#include <cmath>
#include <cstdint>

#include "device/primitives.h"
#include "rounding.h"
#include "type_list.h"

namespace rrt::kv_cache {

struct CudaRope {
  const int32_t* positions;  // null: nothing is rotated
  const void* cos_sin;       // [max_positions, rotary_dim] of float (double for float64)
  int max_positions, rotary_dim;
};

struct CudaAttentionArgs {
  const void* q;  // [queries, num_heads, head_dim]; a head's elements are adjacent
  int64_t q_row_stride, q_head_stride;
  const void* k_cache;  // [num_pages, page_size, num_kv_heads, head_dim]
  const void* v_cache;
  const int32_t* block_tables;  // [sequences, max_pages] at table_stride
  int64_t table_stride;
  const int32_t* query_start;   // null: decode
  const int32_t* context_lens;
  double scale;
  CudaRope rope;
  void* out;       // [queries, num_heads, head_dim]
  float* partial;  // decode, if a context may have several pieces: [queries, num_heads, pieces, head_dim + 2]
  int num_queries, num_sequences, num_heads, num_kv_heads, head_dim;
  int num_pages, page_size, max_pages;
  int pieces;  // that the block tables have room for
};

constexpr int kCudaSplitSlots = 256;
constexpr int kMmaRows = 16, kMmaSlots = 16;
constexpr int kWarps = 4, kThreads = 32 * kWarps;
constexpr float kLog2E = 1.44269504088896341f;

// How a thread block uses shared memory. A stage is the keys or the values of a tile.
template <int HEAD_DIM, int STAGES>
struct AttentionShared {
  static constexpr int kHeadDim = HEAD_DIM;
  static constexpr int kStages = STAGES;
  static constexpr int kBlocks = ceil_div<32>(HEAD_DIM);    // of 32 elements: two mmas of keys
  static constexpr int kKeyVectors = 2 * kBlocks;           // a lane's, per tile: slots g and g + 8
  static constexpr int kQueryStride = 32 * kBlocks + 8;     // elements; the rest spreads lanes over the banks
  static constexpr int kValueStride = HEAD_DIM + 8;         // likewise
  static constexpr int kQueryBytes = kMmaRows * kQueryStride * 2;
  static constexpr int kKeyBytes = kKeyVectors * 32 * 16;
  static constexpr int kValueBytes = kMmaSlots * kValueStride * 2;
  static constexpr int kStageBytes = kKeyBytes > kValueBytes ? kKeyBytes : kValueBytes;
  static constexpr int kWarpBytes = STAGES * kStageBytes;
  static constexpr int kMergeBytes = kWarps * kMmaRows * (HEAD_DIM + 2) * 4;
  // Decode has one set of queries, prefill one per warp.
  template <bool PREFILL>
  static constexpr int bytes() {
    const int work = (PREFILL ? kWarps : 1) * kQueryBytes + kWarps * kWarpBytes;
    return work > kMergeBytes ? work : kMergeBytes;
  }
};

// As many stages as let two thread blocks of decode share a multiprocessor: an A100's, but for head dim 256 an H100's.
using AttentionInstances =
    TypeList<AttentionShared<64, 7>, AttentionShared<80, 6>, AttentionShared<128, 4>, AttentionShared<256, 3>>;

// The query rows of a warp. Rows of a sequence's queries are numbered query by query, head by head of the group.
struct QueryTile {
  int sequence;
  int token_begin;  // the sequence's first query
  int first;        // number of the warp's first row
  int rows;
  int group;        // query heads per key/value head
  int kv_head;
  int seen;         // slots that the sequence's first query sees

  RRT_DEVICE int token(int row) const { return token_begin + (first + row) / group; }
  RRT_DEVICE int head(int row) const { return kv_head * group + (first + row) % group; }
  RRT_DEVICE int limit(int row) const { return seen + (first + row) / group; }
};

// Prefill tile number `tile`, counted sequence by sequence; with 0 rows if there is none.
RRT_DEVICE QueryTile find_prefill_tile(const CudaAttentionArgs& args, int tile, int kv_head) {
  const int group = args.num_heads / args.num_kv_heads;
  int begin = device::load_global(args.query_start);
  for (int s = 0; s < args.num_sequences; ++s) {
    const int end = device::load_global(args.query_start + s + 1);
    const int rows = (end - begin) * group, tiles = ceil_div<kMmaRows>(rows);
    if (tile < tiles) {
      const int first = tile * kMmaRows;
      const int here = rows - first < kMmaRows ? rows - first : kMmaRows;
      return {s, begin, first, here, group, kv_head, device::load_global(args.context_lens + s) - (end - begin) + 1};
    }
    tile -= tiles;
    begin = end;
  }
  return {0, 0, 0, 0, 1, kv_head, 0};
}

// The number of slots that a decode row sees: at most as many as its block table has, since only for these are there
// pieces.
RRT_DEVICE int decode_context(const CudaAttentionArgs& args, int row) {
  const int context = device::load_global(args.context_lens + row), room = args.max_pages * args.page_size;
  return context < room ? context : room;
}

// The number of a slot in the cache; -1 if the block table has no valid page for it.
RRT_DEVICE int64_t find_slot(const CudaAttentionArgs& args, int sequence, int slot) {
  const int column = slot / args.page_size;
  if (column >= args.max_pages) return -1;
  const int page = device::load_global(args.block_tables + sequence * args.table_stride + column);
  if (page < 0 || page >= args.num_pages) return -1;
  return static_cast<int64_t>(page) * args.page_size + slot % args.page_size;
}

// The keys or values of slot number `row`.
template <class Storage>
RRT_DEVICE const Storage* at_slot(const CudaAttentionArgs& args, const void* cache, int kv_head, int64_t row) {
  return static_cast<const Storage*>(cache) + (row * args.num_kv_heads + kv_head) * args.head_dim;
}

// Element `i` of a head, rotated by its row's angles. `element(j)` is the head's element j.
template <class Acc, class Element>
RRT_DEVICE Acc rotated(const CudaRope& rope, int row, int i, Element element) {
  if (rope.positions == nullptr || i >= rope.rotary_dim) return element(i);
  const int position = device::load_global(rope.positions + row);
  if (position < 0 || position >= rope.max_positions) return static_cast<Acc>(NAN);
  const int half = rope.rotary_dim / 2, angle = i % half;
  const Acc* table = static_cast<const Acc*>(rope.cos_sin) + static_cast<int64_t>(position) * rope.rotary_dim;
  const Acc cosine = device::load_global(table + angle), sine = device::load_global(table + half + angle);
  return i < half ? element(i) * cosine - element(i + half) * sine : element(i) * cosine + element(i - half) * sine;
}

template <class Half, int HEAD_DIM, int STAGES>
struct AttentionWarp {
  using Storage = typename Half::Storage;
  using Shared = AttentionShared<HEAD_DIM, STAGES>;
  static constexpr int kColumnTiles = HEAD_DIM / 8;

  const CudaAttentionArgs& args;
  const QueryTile& tile;
  Storage* queries;  // [kMmaRows, kQueryStride]
  char* stages;
  int lane;

  float sums[kColumnTiles][4];   // of weighted values, rows lane / 4 and that + 8
  float largest[2], weights[2];  // per row: the largest score so far, the sum of weights relative to it

  // Fills `queries` by `threads` threads, of which this is number `thread`; a barrier must follow.
  RRT_DEVICE void load_queries(int thread, int threads) const {
    constexpr int kSize = kMmaRows * Shared::kQueryStride, kBatch = 8;
    for (int first = thread; first < kSize; first += kBatch * threads) {
      float values[kBatch];  // loaded all at once: between the stores, each load would be waited for
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        const int i = first + j * threads, row = i / Shared::kQueryStride, column = i % Shared::kQueryStride;
        values[j] = 0;
        if (row < tile.rows && column < HEAD_DIM) {
          const Storage* head = static_cast<const Storage*>(args.q) + tile.token(row) * args.q_row_stride +
                                tile.head(row) * args.q_head_stride;
          values[j] = rotated<float>(args.rope, tile.token(row), column,
                                     [&](int c) { return Half::widen(device::load_global(head + c)); });
        }
      }
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        if (first + j * threads < kSize) device::store_shared(queries + first + j * threads, Half::narrow(values[j]));
      }
    }
  }

  RRT_DEVICE device::Vector* keys(int stage, int vector) const {
    return reinterpret_cast<device::Vector*>(stages + stage * Shared::kStageBytes) + vector * 32 + lane;
  }
  RRT_DEVICE Storage* values(int stage, int slot) const {
    return reinterpret_cast<Storage*>(stages + stage * Shared::kStageBytes) + slot * Shared::kValueStride;
  }

  // find_slot of slot first + lane % 16, -1 from `end` on; the other lanes' come by shuffle_from.
  RRT_DEVICE int64_t find_slots(int first, int end) const {
    const int slot = first + lane % kMmaSlots;
    return slot < end ? find_slot(args, tile.sequence, slot) : -1;
  }

  // Slots [first, first + kMmaSlots), zeros from `end` on.
  RRT_DEVICE void fetch_keys(int stage, int first, int end) const {
    const int64_t mine = find_slots(first, end);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t row = device::shuffle_from(mine, 8 * i + lane / 4);
      const Storage* k = at_slot<Storage>(args, args.k_cache, tile.kv_head, row);
#pragma unroll
      for (int block = 0; block < Shared::kBlocks; ++block) {
        const int column = 32 * block + lane % 4 * 8;
        const bool valid = row >= 0 && column < HEAD_DIM;
        device::copy_async(keys(stage, i * Shared::kBlocks + block), valid ? k + column : args.k_cache, valid);
      }
    }
  }

  RRT_DEVICE void fetch_values(int stage, int first, int end) const {
    const int64_t mine = find_slots(first, end);
#pragma unroll
    for (int j = 0; j < kMmaSlots * kColumnTiles / 32; ++j) {
      const int i = lane + 32 * j, slot = i / kColumnTiles, column = i % kColumnTiles * 8;
      const int64_t row = device::shuffle_from(mine, slot);
      const Storage* v = at_slot<Storage>(args, args.v_cache, tile.kv_head, row);
      device::copy_async(reinterpret_cast<device::Vector*>(values(stage, slot) + column),
                         row >= 0 ? v + column : args.v_cache, row >= 0);
    }
  }

  // Scores of the slots from `first` on, whose keys are in `stage`, in units of log 2: scores[i] has slots
  // 8 i + lane % 4 * 2 and the next, and rows as in `sums`.
  RRT_DEVICE void score(float (&scores)[2][4], int stage, int first, int end) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) scores[i][j] = 0;
    }
#pragma unroll
    for (int block = 0; block < Shared::kBlocks; ++block) {
      const int column = 32 * block + lane % 4 * 8;
      const auto row = [&](int r) {
        return device::load_shared(
            reinterpret_cast<const device::Vector*>(queries + (lane / 4 + r) * Shared::kQueryStride + column));
      };
      const device::Vector top = row(0), bottom = row(8);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const device::Vector k = device::load_shared(keys(stage, i * Shared::kBlocks + block));
#pragma unroll
        for (int step = 0; step < 2; ++step) {
          const uint32_t a[4] = {top.word[2 * step], bottom.word[2 * step], top.word[2 * step + 1],
                                 bottom.word[2 * step + 1]};
          const uint32_t b[2] = {k.word[2 * step], k.word[2 * step + 1]};
          Half::multiply(scores[i], a, b);
        }
      }
    }

    const int missing = find_slots(first, end) < 0;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int slot = 8 * i + lane % 4 * 2 + j;
        const bool is_missing = device::shuffle_from(missing, slot) != 0;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = lane / 4 + 8 * half;
          float& score = scores[i][2 * half + j];
          score *= static_cast<float>(args.scale) * kLog2E;
          if (row >= tile.rows || first + slot >= tile.limit(row)) {
            score = -INFINITY;
          } else if (is_missing) {
            score = NAN;
          }
        }
      }
    }
  }

  // Turns the scores into weights and adds the values in `stage` with them.
  RRT_DEVICE void add_values(const float (&scores)[2][4], int stage) {
    float new_largest[2] = {largest[0], largest[1]};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) new_largest[j / 2] = fmaxf(new_largest[j / 2], scores[i][j]);
    }
    float shrink[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int mask = 1; mask < 4; mask *= 2) {
        new_largest[half] = fmaxf(new_largest[half], device::shuffle_xor(new_largest[half], mask));
      }
      shrink[half] = device::exp2(largest[half] - new_largest[half]);
      largest[half] = new_largest[half];
      weights[half] *= shrink[half];
    }
    uint32_t a[4];  // the weights, as the left operand over 16 slots
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float low = device::exp2(scores[i][2 * half] - largest[half]);
        const float high = device::exp2(scores[i][2 * half + 1] - largest[half]);
        weights[half] += low + high;
        a[2 * i + half] = Half::pair(low, high);
      }
    }
#pragma unroll
    for (int column = 0; column < kColumnTiles; column += 2) {
      // Matrices of 8 slots x 8 columns: slots 0 and 8, then the same of the next 8 columns.
      uint32_t b[4];
      device::load_matrices_transposed(b, values(stage, lane % 16) + 8 * (column + lane / 16));
#pragma unroll
      for (int next = 0; next < 2; ++next) {
        float(&sum)[4] = sums[column + next];
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[j] *= shrink[j / 2];
        const uint32_t pair[2] = {b[2 * next], b[2 * next + 1]};
        Half::multiply(sum, a, pair);
      }
    }
  }

  // Attends to tiles first_tile, first_tile + stride, ... of the slots [begin, end). `wait_for_queries` is called while
  // the first keys and values are on their way.
  template <class WaitForQueries>
  RRT_DEVICE void attend(int begin, int end, int first_tile, int stride, WaitForQueries wait_for_queries) {
    const auto slot_of = [&](int index) { return begin + (first_tile + index * stride) * kMmaSlots; };
    // Step 2 i copies the keys of the warp's tile number i, step 2 i + 1 its values.
    const auto fetch = [&](int step) {
      const int first = slot_of(step / 2);
      if (first < end && step % 2 == 0) fetch_keys(step % STAGES, first, end);
      if (first < end && step % 2 == 1) fetch_values(step % STAGES, first, end);
      device::copy_commit();
    };
    // After this, every lane's copies of the step are there, and the stage that the fetch fills has been read.
    const auto next = [&](int step) {
      device::copy_wait<STAGES - 2>();
      device::warp_barrier();
      fetch(step + STAGES - 1);
    };
#pragma unroll
    for (int step = 0; step < STAGES - 1; ++step) fetch(step);
    wait_for_queries();
#pragma unroll
    for (int i = 0; i < kColumnTiles; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) sums[i][j] = 0;
    }
    largest[0] = largest[1] = -1e30f;  // finite, or a row that has seen nothing yet would become NaN
    weights[0] = weights[1] = 0;
    for (int index = 0; slot_of(index) < end; ++index) {
      float scores[2][4];
      next(2 * index);
      score(scores, 2 * index % STAGES, slot_of(index), end);
      next(2 * index + 1);
      add_values(scores, (2 * index + 1) % STAGES);
    }
    device::copy_wait<0>();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int mask = 1; mask < 4; mask *= 2) weights[half] += device::shuffle_xor(weights[half], mask);
    }
  }
};

// Thread block (x: row; y: key/value head and tile of its query heads; z: piece).
template <class Half, int HEAD_DIM, int STAGES>
RRT_DEVICE void decode_attention_body(const CudaAttentionArgs& args) {
  using Storage = typename Half::Storage;
  using Shared = AttentionShared<HEAD_DIM, STAGES>;
  const device::Index block = device::block_index();
  const int thread = device::thread_index(), warp = thread / 32, lane = thread % 32;
  const int group = args.num_heads / args.num_kv_heads, tiles = ceil_div<kMmaRows>(group);
  const int first = block.y % tiles * kMmaRows;
  device::dependency_wait();
  device::launch_dependents();
  const int context = decode_context(args, block.x);
  const int begin = block.z * kCudaSplitSlots;
  if (begin >= context && !(context <= 0 && block.z == 0)) return;
  const int end = context < begin + kCudaSplitSlots ? context : begin + kCudaSplitSlots;
  const QueryTile tile{block.x, block.x, first, group - first < kMmaRows ? group - first : kMmaRows,
                       group,   block.y / tiles, context};

  char* shared = device::shared_memory();
  AttentionWarp<Half, HEAD_DIM, STAGES> attention{args,
                                                  tile,
                                                  reinterpret_cast<Storage*>(shared),
                                                  shared + Shared::kQueryBytes + warp * Shared::kWarpBytes,
                                                  lane,
                                                  {},
                                                  {},
                                                  {}};
  attention.attend(begin, end, warp, kWarps, [&] {
    if (context > 0) attention.load_queries(thread, kThreads);
    device::block_barrier();
  });

  // [warp, row, HEAD_DIM + 2]: sums, the largest score, the weights.
  device::block_barrier();
  float* merged = reinterpret_cast<float*>(shared);
  constexpr int kStride = HEAD_DIM + 2;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float* row = merged + (warp * kMmaRows + lane / 4 + 8 * half) * kStride;
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 8; ++i) {
#pragma unroll
      for (int j = 0; j < 2; ++j) device::store_shared(row + 8 * i + lane % 4 * 2 + j, attention.sums[i][2 * half + j]);
    }
    if (lane % 4 == 0) {
      device::store_shared(row + HEAD_DIM, attention.largest[half]);
      device::store_shared(row + HEAD_DIM + 1, attention.weights[half]);
    }
  }
  device::block_barrier();
  const bool whole = context <= kCudaSplitSlots;
  const bool too_long = device::load_global(args.context_lens + block.x) > context;
  for (int i = thread; i < tile.rows * HEAD_DIM; i += kThreads) {
    const int row = i / HEAD_DIM, column = i % HEAD_DIM;
    const auto of = [&](int w, int c) { return device::load_shared(merged + (w * kMmaRows + row) * kStride + c); };
    float largest = of(0, HEAD_DIM);
    for (int w = 1; w < kWarps; ++w) largest = fmaxf(largest, of(w, HEAD_DIM));
    float sum = too_long ? NAN : 0.0f, weights = 0;
    for (int w = 0; w < kWarps; ++w) {
      const float factor = device::exp2(of(w, HEAD_DIM) - largest);
      sum += factor * of(w, column);
      weights += factor * of(w, HEAD_DIM + 1);
    }
    const int64_t head = static_cast<int64_t>(block.x) * args.num_heads + tile.head(row);
    if (whole) {
      const float value = context > 0 ? sum / weights : sum;
      device::store_global(static_cast<Storage*>(args.out) + head * HEAD_DIM + column, Half::narrow(value));
    } else {
      float* to = args.partial + (head * args.pieces + block.z) * kStride;
      device::store_global(to + column, sum);
      if (column == 0) {
        device::store_global(to + HEAD_DIM, largest);
        device::store_global(to + HEAD_DIM + 1, weights);
      }
    }
  }
}

// Thread block (x: row; y: head). Merges the pieces of a long context in order; the result of a short one is final
// already.
template <class Number>
RRT_DEVICE void combine_body(const CudaAttentionArgs& args) {
  using Acc = typename Number::Acc;
  const device::Index block = device::block_index();
  device::dependency_wait();
  const int context = decode_context(args, block.x);
  if (context <= kCudaSplitSlots) return;
  const int pieces = ceil_div<kCudaSplitSlots>(context);
  const int64_t head = static_cast<int64_t>(block.x) * args.num_heads + block.y;
  const Acc* partial = reinterpret_cast<const Acc*>(args.partial) + head * args.pieces * (args.head_dim + 2);
  const auto of = [&](int piece, int column) {
    return device::load_global(partial + static_cast<int64_t>(piece) * (args.head_dim + 2) + column);
  };
  for (int column = device::thread_index(); column < args.head_dim; column += kThreads) {
    Acc largest = of(0, args.head_dim);
    for (int piece = 1; piece < pieces; ++piece) {
      const Acc other = of(piece, args.head_dim);
      largest = other > largest ? other : largest;
    }
    Acc sum = 0, weights = 0;
    for (int piece = 0; piece < pieces; ++piece) {
      const Acc factor = device::exp2(of(piece, args.head_dim) - largest);
      sum += factor * of(piece, column);
      weights += factor * of(piece, args.head_dim + 1);
    }
    device::store_global(static_cast<typename Number::Storage*>(args.out) + head * args.head_dim + column,
                         Number::narrow(sum / weights));
  }
}

// Thread block (x: 4 tiles, one per warp; y: key/value head).
template <class Half, int HEAD_DIM, int STAGES>
RRT_DEVICE void prefill_attention_body(const CudaAttentionArgs& args) {
  using Storage = typename Half::Storage;
  using Shared = AttentionShared<HEAD_DIM, STAGES>;
  const device::Index block = device::block_index();
  const int warp = device::thread_index() / 32, lane = device::thread_index() % 32;
  const QueryTile tile = find_prefill_tile(args, block.x * kWarps + warp, block.y);
  if (tile.rows == 0) return;
  char* shared = device::shared_memory();
  AttentionWarp<Half, HEAD_DIM, STAGES> attention{
      args,
      tile,
      reinterpret_cast<Storage*>(shared + warp * Shared::kQueryBytes),
      shared + kWarps * Shared::kQueryBytes + warp * Shared::kWarpBytes,
      lane,
      {},
      {},
      {}};
  attention.attend(0, tile.limit(tile.rows - 1), 0, 1, [&] {
    attention.load_queries(lane, 32);
    device::warp_barrier();
  });
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = lane / 4 + 8 * half;
    if (row >= tile.rows) continue;
    Storage* to = static_cast<Storage*>(args.out) +
                  (static_cast<int64_t>(tile.token(row)) * args.num_heads + tile.head(row)) * HEAD_DIM;
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 8; ++i) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        device::store_global(to + 8 * i + lane % 4 * 2 + j,
                             Half::narrow(attention.sums[i][2 * half + j] / attention.weights[half]));
      }
    }
  }
}

}  // namespace rrt::kv_cache
