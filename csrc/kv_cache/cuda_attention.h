// What the CUDA kernels of loop_kv_attention and loop_kv_prefill for bfloat16 and float16 share: where queries, keys
// and values lie, and a warp's work on them. cuda_decode_attention.h and cuda_prefill_attention.h have the kernels.
//
// 16 query rows that share a key/value head are the mma's M: in decode the query heads of one row, in prefill also
// those of neighbouring tokens. Queries, keys and values lie in shared memory as in the cache, a slot a row, and come
// from there as fragments by ldmatrix; values transposed. Rows are 16 bytes longer than a head: head dims are multiples
// of 16 elements, so eight rows' vectors at one column, which ldmatrix reads at once, lie in different banks.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "device/primitives.h"
#include "rounding.h"
#include "type_list.h"

namespace rrt::kv_cache {

struct CudaRope {
  const int32_t* positions;  // null: nothing is rotated
  const void* cos_sin;       // [max_positions, rotary_dim] of float (double for float64)
  int max_positions, rotary_dim;
};

// Division of numbers below 2^31 by a number that the host knows, in three instructions.
struct Divisor {
  uint32_t multiplier;
  int shift;
  int value;

  RRT_DEVICE int divide(int number) const {
    const auto n = static_cast<uint32_t>(number);
    const auto high = static_cast<uint32_t>(static_cast<uint64_t>(multiplier) * n >> 32);
    return static_cast<int>((high + n) >> shift);
  }
  RRT_DEVICE int remainder(int number) const { return number - divide(number) * value; }
};

// With s the least exponent for which 2^s >= value, n / value is n (1 + multiplier / 2^32) / 2^s, rounded down.
inline Divisor make_divisor(int64_t value) {
  int shift = 0;
  while (int64_t{1} << shift < value) ++shift;
  const uint64_t excess = (uint64_t{1} << shift) - value;
  return {static_cast<uint32_t>((excess << 32) / value + 1), shift, static_cast<int>(value)};
}

struct CudaAttentionArgs {
  const void* q;  // [queries, num_heads, head_dim]; a head's elements are adjacent
  int64_t q_row_stride, q_head_stride;
  bool vector_queries;  // heads are at 16-byte addresses, and so are the cosines and sines of each 8 elements
  const void* k_cache;  // [num_pages, page_size, num_kv_heads, head_dim]
  const void* v_cache;
  const int32_t* block_tables;  // [sequences, max_pages] at table_stride
  int64_t table_stride;
  const int32_t* query_start;   // null: decode
  const int32_t* context_lens;
  double scale;
  CudaRope rope;
  void* out;       // [queries, num_heads, head_dim]
  float* partial;  // decode, of contexts of several pieces: [queries, num_heads, pieces, head_dim + kPartialEnds]
  int num_queries, num_sequences, num_heads, num_kv_heads, head_dim;
  Divisor group;       // query heads per key/value head
  Divisor head_tiles;  // decode: of kMmaRows query heads, per key/value head
  Divisor page_size;
  int num_pages, max_pages;
  int pieces;      // decode: that the block tables have room for
  int first_wave;  // decode: thread blocks that prefetch before they wait for the kernels before this one; later ones
                   // find that wait over
  int tiles;       // prefill: of query rows, at least as many as there are
};

// Whether load_queries may load 16 bytes at once: for `vector_queries`.
inline bool has_vector_queries(const CudaAttentionArgs& args) {
  const auto aligned = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; };
  if (!aligned(args.q) || args.q_row_stride % 8 != 0 || args.q_head_stride % 8 != 0) return false;
  const CudaRope& rope = args.rope;
  return rope.positions == nullptr ||
         (aligned(rope.cos_sin) && rope.rotary_dim % 16 == 0 && rope.rotary_dim > 0 && rope.max_positions > 0);
}

constexpr int kMmaRows = 16, kMmaSlots = 16, kMmaColumns = 16;
constexpr int kWarps = 4, kThreads = 32 * kWarps;
constexpr float kLog2E = 1.44269504088896341f;

// Floats of a piece's results beside a head's sums: the largest score, the sum of weights, and two for alignment.
constexpr int kPartialEnds = 4;

// Elements between rows of queries, keys and values in shared memory.
template <int HEAD_DIM>
constexpr int kRowStride = HEAD_DIM + 8;

struct alignas(8) FloatPair {
  float low, high;
};
struct alignas(16) FloatVector {
  float value[4];
};
struct alignas(8) HalfPairs {  // four numbers in 16 bits
  uint32_t word[2];
};

// Consecutive query rows of a thread block. Rows of a sequence's queries are numbered query by query, head by head of
// the group.
struct QueryTile {
  int sequence;
  int token_begin;  // the sequence's first query
  int first;        // number of the tile's first row
  int rows;
  int kv_head;
  int seen;  // slots that the sequence's first query sees
  Divisor group;

  RRT_DEVICE int token(int row) const { return token_begin + group.divide(first + row); }
  RRT_DEVICE int head(int row) const { return kv_head * group.value + group.remainder(first + row); }
  RRT_DEVICE int limit(int row) const { return seen + group.divide(first + row); }
};

RRT_DEVICE const int32_t* block_table(const CudaAttentionArgs& args, int sequence) {
  return args.block_tables + sequence * args.table_stride;
}

// The page that a sequence's block table has for a slot; -1 if the table is shorter.
template <bool HINT = false>
RRT_DEVICE int load_page(const CudaAttentionArgs& args, const int32_t* table, int slot) {
  const int column = args.page_size.divide(slot);
  if (column >= args.max_pages) return -1;
  return HINT ? device::load_hint(table + column) : device::load_global(table + column);
}

// The number in the cache of a slot on this page; -1 if there is no such page.
template <class Int>
RRT_DEVICE Int slot_on(const CudaAttentionArgs& args, int page, int slot) {
  if (page < 0 || page >= args.num_pages) return -1;
  return static_cast<Int>(page) * args.page_size.value + args.page_size.remainder(slot);
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

// Number `i` of the values of this type that a vector holds.
template <class T>
RRT_DEVICE T value_of(const device::Vector& vector, int i) {
  T values[sizeof(device::Vector) / sizeof(T)];
  memcpy(values, vector.word, sizeof(values));
  return values[i];
}

RRT_DEVICE device::Vector load_vector(const void* from) {
  return device::load_global(static_cast<const device::Vector*>(from));
}

// A row of a tile's queries.
template <class Storage>
RRT_DEVICE const Storage* query_head(const CudaAttentionArgs& args, const QueryTile& tile, int row) {
  return static_cast<const Storage*>(args.q) + tile.token(row) * args.q_row_stride + tile.head(row) * args.q_head_stride;
}

// A thread's vectors of a tile's queries, up to four, on their way to `to` [ROWS, kRowStride] in shared memory, where they
// come rotated, with zeros beyond the tile's rows. load() and rotate() send out all their loads before one is waited for.
template <class Half, int HEAD_DIM, int ROWS, int THREADS>
struct QueryVectors {
  using Storage = typename Half::Storage;
  static constexpr int kVectors = HEAD_DIM / 8, kOfThread = ceil_div<THREADS>(ROWS * kVectors);
  static constexpr int kBatch = kOfThread < 4 ? kOfThread : 4;

  device::Vector own[kBatch], other[kBatch];  // `other`: what `own` is rotated with
  int position[kBatch] = {};

  // Of vectors first, first + THREADS, ...
  RRT_DEVICE void load(const CudaAttentionArgs& args, const QueryTile& tile, int first) {
    const int half = args.rope.rotary_dim / 2;
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int row = row_of(first, j), column = column_of(first, j), read_row = row < tile.rows ? row : 0;
      const Storage* head = query_head<Storage>(args, tile, read_row);
      own[j] = load_vector(head + column);
      if (args.rope.positions == nullptr) continue;
      const bool is_rotated = column < args.rope.rotary_dim;
      other[j] = load_vector(head + (!is_rotated ? 0 : column < half ? column + half : column - half));
      position[j] = device::load_global(args.rope.positions + tile.token(read_row));
    }
  }

  RRT_DEVICE void rotate(const CudaAttentionArgs& args, const QueryTile& tile, int first, Storage* to) const {
    const CudaRope& rope = args.rope;
    const bool rotates = rope.positions != nullptr;
    const int half = rope.rotary_dim / 2;
    device::Vector cosines[kBatch][2], sines[kBatch][2];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      if (!rotates) continue;
      const int column = column_of(first, j);
      const float* angles = static_cast<const float*>(rope.cos_sin) +
                            static_cast<int64_t>(is_valid(rope, j) ? position[j] : 0) * rope.rotary_dim +
                            (column >= rope.rotary_dim ? 0 : column < half ? column : column - half);
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        cosines[j][k] = load_vector(angles + 4 * k);
        sines[j][k] = load_vector(angles + half + 4 * k);
      }
    }
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int row = row_of(first, j), column = column_of(first, j);
      if (row >= ROWS) continue;
      device::Vector vector = own[j];
      if (rotates && column < rope.rotary_dim) {
        const float sign = column < half ? -1.0f : 1.0f;
        float values[8];
#pragma unroll
        for (int k = 0; k < 8; ++k) {
          const float cosine = value_of<float>(cosines[j][k / 4], k % 4);
          const float sine = value_of<float>(sines[j][k / 4], k % 4);
          values[k] = Half::widen(value_of<Storage>(own[j], k)) * cosine +
                      sign * Half::widen(value_of<Storage>(other[j], k)) * sine;
          if (!is_valid(rope, j)) values[k] = NAN;
        }
#pragma unroll
        for (int k = 0; k < 4; ++k) vector.word[k] = Half::pair(values[2 * k], values[2 * k + 1]);
      }
      if (row >= tile.rows) vector = {};
      device::store_shared(reinterpret_cast<device::Vector*>(to + row * kRowStride<HEAD_DIM> + column), vector);
    }
  }

 private:
  RRT_DEVICE static int row_of(int first, int j) { return (first + j * THREADS) / kVectors; }
  RRT_DEVICE static int column_of(int first, int j) { return (first + j * THREADS) % kVectors * 8; }
  RRT_DEVICE bool is_valid(const CudaRope& rope, int j) const {
    return position[j] >= 0 && position[j] < rope.max_positions;
  }
};

// The same one element at a time, for queries that lie in no vectors.
template <class Half, int HEAD_DIM, int ROWS, int THREADS>
RRT_DEVICE void load_query_elements(const CudaAttentionArgs& args, const QueryTile& tile, typename Half::Storage* to) {
  for (int i = device::thread_index(); i < ROWS * HEAD_DIM; i += THREADS) {
    const int row = i / HEAD_DIM, column = i % HEAD_DIM;
    float value = 0;
    if (row < tile.rows) {
      const auto* head = query_head<typename Half::Storage>(args, tile, row);
      value = rotated<float>(args.rope, tile.token(row), column,
                             [&](int k) { return Half::widen(device::load_global(head + k)); });
    }
    device::store_shared(to + row * kRowStride<HEAD_DIM> + column, Half::narrow(value));
  }
}

// Fills `to` with a tile's queries; a barrier must follow.
template <class Half, int HEAD_DIM, int ROWS, int THREADS>
RRT_DEVICE void load_queries(const CudaAttentionArgs& args, const QueryTile& tile, typename Half::Storage* to) {
  using Vectors = QueryVectors<Half, HEAD_DIM, ROWS, THREADS>;
  if (!args.vector_queries) return load_query_elements<Half, HEAD_DIM, ROWS, THREADS>(args, tile, to);
  for (int first = device::thread_index(); first < ROWS * Vectors::kVectors; first += Vectors::kBatch * THREADS) {
    Vectors vectors;
    vectors.load(args, tile, first);
    vectors.rotate(args, tile, first, to);
  }
}

// Copies of the keys or values of SLOTS slots by a warp. Eight lanes copy 128 adjacent bytes: lane l those of slots
// l / 8, l / 8 + 4, ... Of head dim 80, lane l also copies one of the two vectors that are left of slot l / 2.
template <class Storage, int HEAD_DIM, int SLOTS>
struct SlotCopies {
  static constexpr int kLines = HEAD_DIM / 64, kGroups = SLOTS / 4;
  static constexpr bool kHasRest = HEAD_DIM % 64 != 0;
  static_assert(SLOTS % 4 == 0 && (!kHasRest || (HEAD_DIM % 64 == 16 && SLOTS == 16)), "a warp copies all vectors");

  int slots[kGroups + kHasRest] = {};  // numbers in the cache; negative: zeros are copied

  // `mine`: the number that this lane knows; lane `first` knows that of the first slot, and so on.
  RRT_DEVICE void share(int mine, int first = 0) {
    const int lane = device::thread_index() % 32;
#pragma unroll
    for (int i = 0; i < kGroups; ++i) slots[i] = device::shuffle_from(mine, first + lane / 8 + 4 * i);
    if (kHasRest) slots[kGroups] = device::shuffle_from(mine, first + lane / 2);
  }

  // `from`: the cache at the key/value head, its slots at `stride`.
  RRT_DEVICE void copy(Storage* to, const Storage* from, int stride) const {
    const int lane = device::thread_index() % 32;
    const auto copy_lines = [&](int slot, int number, int column, int lines) {
      const bool valid = number >= 0;
      const Storage* line = from + static_cast<int64_t>(valid ? number : 0) * stride + column;
#pragma unroll
      for (int i = 0; i < lines; ++i) {
        device::copy_async(reinterpret_cast<device::Vector*>(to + slot * kRowStride<HEAD_DIM> + column + 64 * i),
                           line + 64 * i, valid);
      }
    };
#pragma unroll
    for (int i = 0; i < kGroups; ++i) copy_lines(lane / 8 + 4 * i, slots[i], lane % 8 * 8, kLines);
    if (kHasRest) copy_lines(lane / 2, slots[kGroups], 64 * kLines + lane % 2 * 8, 1);
  }
};

// A warp's 16 * ROW_TILES query rows, which take SLOTS slots a turn: first their scores, which become weights, then the
// weighted values. Lane l has rows l / 4 and l / 4 + 8 of each 16. Queries stay in registers if together with the sums
// and scores they take no more than REGISTERS.
template <class Half, int HEAD_DIM, int ROW_TILES, int SLOTS, int REGISTERS>
struct AttentionWarp {
  using Storage = typename Half::Storage;
  static constexpr int kStride = kRowStride<HEAD_DIM>;
  static constexpr int kColumnTiles = HEAD_DIM / 8, kSlotTiles = SLOTS / 8, kSteps = HEAD_DIM / kMmaColumns;
  // A sum over the head's columns in two halves, where too few mmas are independent to hide their latency.
  static constexpr int kChains = ROW_TILES * kSlotTiles < 4 ? 2 : 1;
  static constexpr bool kHoldsQueries = ROW_TILES * 4 * (kSteps + kColumnTiles + kSlotTiles) <= REGISTERS;

  const Storage* shared_queries;
  uint32_t queries[kHoldsQueries ? ROW_TILES : 1][kHoldsQueries ? kSteps : 1][4];
  float sums[ROW_TILES][kColumnTiles][4];     // of weighted values
  float largest[ROW_TILES][2];                // the largest score so far, not scaled
  float weights[ROW_TILES][2];                // the lane's part of the sum of weights, relative to it
  uint32_t turn[ROW_TILES][SLOTS / 16][4];    // the turn's weights, as left operands over 16 slots

  // Before the first turn. `of_warp`: the warp's queries.
  RRT_DEVICE void begin(const Storage* of_warp) {
    const int lane = device::thread_index() % 32;
    shared_queries = of_warp + lane % 16 * kStride + lane / 16 * 8;
#pragma unroll
    for (int r = 0; r < ROW_TILES; ++r) {
#pragma unroll
      for (int step = 0; kHoldsQueries && step < kSteps; ++step) load_query(queries[r][step], r, step);
#pragma unroll
      for (int i = 0; i < kColumnTiles; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[r][i][j] = 0;
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        largest[r][half] = -1e30f;  // finite, or a row that has seen nothing yet would become NaN
        weights[r][half] = 0;
      }
    }
  }

  // Columns 16 `step` and on of 16 rows, as a left operand.
  RRT_DEVICE void load_query(uint32_t (&to)[4], int row_tile, int step) const {
    device::load_matrices(to, shared_queries + row_tile * kMmaRows * kStride + step * kMmaColumns);
  }

  // Takes the scores of slots [first, first + SLOTS), whose keys are at `keys`, into the weights. A row sees the
  // slots below its limit; `masks`: some row not all of these. The weight of a score is 2^(scale * score), and the
  // scale positive.
  RRT_DEVICE void score(const Storage* keys, float scale, bool masks, int first, const int (&limits)[ROW_TILES][2]) {
    const int lane = device::thread_index() % 32;
    const Storage* k = keys + (lane % 8 + lane / 16 * 8) * kStride + lane / 8 % 2 * 8;
    float scores[kChains][ROW_TILES][kSlotTiles][4] = {};
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      uint32_t loaded[ROW_TILES][4];
#pragma unroll
      for (int r = 0; !kHoldsQueries && r < ROW_TILES; ++r) load_query(loaded[r], r, step);
#pragma unroll
      for (int i = 0; i < kSlotTiles; i += 2) {
        uint32_t b[4];  // of slots 8 i to 8 i + 7 and the next 8
        device::load_matrices(b, k + 8 * i * kStride + step * kMmaColumns);
#pragma unroll
        for (int next = 0; next < 2; ++next) {
          const uint32_t pair[2] = {b[2 * next], b[2 * next + 1]};
#pragma unroll
          for (int r = 0; r < ROW_TILES; ++r) {
            const uint32_t(&a)[4] = kHoldsQueries ? queries[r][step] : loaded[r];
            Half::multiply(scores[step % kChains][r][i + next], a, pair);
          }
        }
      }
    }
#pragma unroll
    for (int r = 0; r < ROW_TILES; ++r) {
#pragma unroll
      for (int i = 0; i < kSlotTiles; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if (kChains == 2) scores[0][r][i][j] += scores[kChains - 1][r][i][j];
        }
      }
    }
    if (masks) {
#pragma unroll
      for (int r = 0; r < ROW_TILES; ++r) {
#pragma unroll
        for (int i = 0; i < kSlotTiles; ++i) {
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            if (first + 8 * i + lane % 4 * 2 + j % 2 >= limits[r][j / 2]) scores[0][r][i][j] = -INFINITY;
          }
        }
      }
    }
    weigh(scores[0], scale);
  }

  // The scores of a lane's rows, of slots 8 i + lane % 4 * 2 and the next.
  RRT_DEVICE void weigh(const float (&scores)[ROW_TILES][kSlotTiles][4], float scale) {
    float shrink[ROW_TILES][2];
    bool changes = false;
#pragma unroll
    for (int r = 0; r < ROW_TILES; ++r) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float next = largest[r][half];
#pragma unroll
        for (int i = 0; i < kSlotTiles; ++i) {
          next = fmaxf(next, fmaxf(scores[r][i][2 * half], scores[r][i][2 * half + 1]));
        }
#pragma unroll
        for (int mask = 1; mask < 4; mask *= 2) next = fmaxf(next, device::shuffle_xor(next, mask));
        shrink[r][half] = device::exp2(scale * (largest[r][half] - next));
        changes |= shrink[r][half] != 1;
        largest[r][half] = next;
      }
    }
    // Rarely, after the first turns; and multiplying by 1 would change no bit.
    if (device::any_lane(changes)) {
#pragma unroll
      for (int r = 0; r < ROW_TILES; ++r) {
#pragma unroll
        for (int i = 0; i < kColumnTiles; ++i) {
#pragma unroll
          for (int j = 0; j < 4; ++j) sums[r][i][j] *= shrink[r][j / 2];
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) weights[r][half] *= shrink[r][half];
      }
    }
#pragma unroll
    for (int r = 0; r < ROW_TILES; ++r) {
#pragma unroll
      for (int i = 0; i < kSlotTiles; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float offset = -scale * largest[r][half];
          const float low = device::exp2(fmaf(scale, scores[r][i][2 * half], offset));
          const float high = device::exp2(fmaf(scale, scores[r][i][2 * half + 1], offset));
          weights[r][half] += low + high;
          turn[r][i / 2][i % 2 * 2 + half] = Half::pair(low, high);
        }
      }
    }
  }

  // Adds the turn's values with its weights.
  RRT_DEVICE void add_values(const Storage* values) {
    const int lane = device::thread_index() % 32;
    const Storage* v = values + lane % 16 * kStride + lane / 16 * 8;
#pragma unroll
    for (int i = 0; i < SLOTS / kMmaSlots; ++i) {
#pragma unroll
      for (int column = 0; column < kColumnTiles; column += 2) {
        // Matrices of 8 slots x 8 columns: slots 0 and 8, then the same of the next 8 columns.
        uint32_t b[4];
        device::load_matrices_transposed(b, v + i * kMmaSlots * kStride + 8 * column);
#pragma unroll
        for (int next = 0; next < 2; ++next) {
          const uint32_t pair[2] = {b[2 * next], b[2 * next + 1]};
#pragma unroll
          for (int r = 0; r < ROW_TILES; ++r) Half::multiply(sums[r][column + next], turn[r][i], pair);
        }
      }
    }
  }

  // After the last turn: makes every lane's weights its rows' sums, and scales the largest scores.
  RRT_DEVICE void finish(float scale) {
#pragma unroll
    for (int r = 0; r < ROW_TILES; ++r) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        largest[r][half] *= scale;
#pragma unroll
        for (int mask = 1; mask < 4; mask *= 2) weights[r][half] += device::shuffle_xor(weights[r][half], mask);
      }
    }
  }
};

}  // namespace rrt::kv_cache
