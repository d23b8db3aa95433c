// Causal attention in tiles of keys, of which only those on and below the diagonal are computed, for the
// per-instruction-set files and under their rules (see simd.h):
//
//   S = K Q^T, the running softmax down the columns, O^T += V^T P
#pragma once

#include "attention/tiles.h"

namespace rrt::attention {
namespace {

// The logarithm of a sum of exponentials, of which the largest is 1, or of 0 or NaN.
inline F32 log_sum(F32 x) {
  // x = 2^n m with m in [sqrt(1/2), sqrt(2)), and log(m) = 2 artanh(s).
  const U32 bits = bit_cast<U32>(x) - 0x3f3504f3u;
  const F32 n = __builtin_convertvector((Register<int32_t>::Type)bits >> 23, F32);
  const F32 m = bit_cast<F32>((bits & 0x7fffffu) + 0x3f3504f3u);
  const F32 s = (m - 1) / (m + 1), square = s * s;
  F32 p = square * (1.0f / 9) + 1.0f / 7;
  p = p * square + 1.0f / 5;
  p = p * square + 1.0f / 3;
  const F32 log = n * 0.693147181f + (s * 2 + s * 2 * square * p);
  return x > 0 ? log : (x == 0 ? F32{} + kUnseen<float> : x);
}

inline F64 log_sum(F64 x) {
  for (int i = 0; i < kNumLanes<F64>; ++i) x[i] = __builtin_log(x[i]);
  return x;
}

// The attention of VECTORS vectors of consecutive queries, of each of HEADS heads with the same keys, to the blocks
// of keys that any of these queries sees. A column is a query of a head; columns are a head's queries, then the next
// head's.
template <class D, int HEADS, int VECTORS>
struct Forward {
  using Acc = typename D::Acc;
  using Vec = typename D::Vec;
  using Storage = typename D::Storage;
  using Op = Operands<D>;
  using Unit = typename Op::Unit;
  using Index = typename Sight<D>::Index;
  using IndexVec = typename Sight<D>::IndexVec;
  static constexpr int C = HEADS * VECTORS;
  static constexpr int64_t kQueries = VECTORS * kLanes<D>;
  // From row to row; multiply_on_tiles multiplies whatever lies behind the last column too.
  static constexpr int64_t kStride = kOnTiles<D> ? round_up(C * kLanes<D>, 32) : C * kLanes<D>;
  static_assert(kStride <= kTile);
  static constexpr int64_t kPairStride = kTile / kPair<D>;  // of a tile of values
  // Rows whose sums of all columns the registers hold, beside a row of the right operand.
  static constexpr int R = RRT_VECTOR_BYTES == 64 ? (C < 4 ? 8 : 4) : (C < 4 ? 4 : 2);
  static_assert(kKeyBlock<D> % R == 0 && kPadDim % R == 0);

  // Keys one after the other; of one tile, if products run on tiles.
  struct Run {
    int64_t key, count;
  };

  const ForwardParams& params;
  const ForwardScratch& scratch;
  const Sight<D>& sight;
  const int64_t batch;
  const int64_t first_head;
  const int64_t begin;  // the first query
  const int64_t end;    // of the queries
  const Shape& shape = params.shape;
  const int64_t dim = padded_dim(shape);

  template <class T>
  static T* at(void* base, int64_t offset = 0) {
    return static_cast<T*>(base) + offset;
  }

  void run() const {
    const Stager<D> stager{shape.head_dim, dim};
    for (int h = 0; h < HEADS; ++h) {
      stager.columns({params.q, batch, first_head + h}, begin, end, at<Unit>(scratch.q, h * kQueries), kQueries,
                     kStride);
    }
    for (int c = 0; c < C; ++c) {
      const Vec lowest = Vec{} + kLowest<Acc>, zero = {};
      std::memcpy(at<Acc>(scratch.max, c * kLanes<D>), &lowest, sizeof(lowest));
      std::memcpy(at<Acc>(scratch.sum, c * kLanes<D>), &zero, sizeof(zero));
    }
    Run runs[kSegment / kKeyBlock<D>] = {};
    int num_runs = 0;
    int64_t num_keys = 0;
    bool is_first = true;
    for (int64_t key = 0; key < begin + kQueries; key += kKeyBlock<D>) {
      if (!sight.reaches_block(key / kKeyBlock<D>, begin)) continue;
      if (num_keys == kSegment) {
        add(runs, num_runs, num_keys, is_first);
        num_runs = num_keys = 0;
        is_first = false;
      }
      Run* last = num_runs > 0 ? &runs[num_runs - 1] : nullptr;
      if (last != nullptr && last->key + last->count == key && !(kOnTiles<D> && key % kTile == 0)) {
        last->count += kKeyBlock<D>;
      } else {
        runs[num_runs++] = {key, kKeyBlock<D>};
      }
      num_keys += kKeyBlock<D>;
    }
    add(runs, num_runs, num_keys, is_first);
    store();
  }

  // One segment of the keys.
  void add(const Run* runs, int num_runs, int64_t num_keys, bool is_first) const {
    Vec max[C];
    for (int c = 0; c < C; ++c) max[c] = load<Vec>(at<Acc>(scratch.max, c * kLanes<D>));
    auto* scores = at<Acc>(scratch.scores);
    for (const Run* run = runs; run < runs + num_runs; scores += run->count * kStride, ++run) {
      if constexpr (kOnTiles<D>) {
        const Blocks<D> queries{at<Unit>(scratch.q), kStride};
        multiply_rows<D, kMaxRows, false>(at<Unit>(scratch.keys, run->key * dim / kPair<D>), dim / kPair<D>, queries,
                                          dim, scores, kStride, run->count, kStride);
      }
      for (int64_t row = 0; row < run->count; row += R) score(run->key + row, scores + row * kStride, max);
    }
    shrink(max, is_first);
    exponentials(num_keys, max);
    if constexpr (kOnTiles<D>) {
      if (is_first) std::memset(scratch.out, 0, dim * kStride * sizeof(Acc));
      const auto* p = at<Unit>(scratch.probabilities);
      for (const Run* run = runs; run < runs + num_runs; p += run->count / kPair<D> * kStride, ++run) {
        const Blocks<D> probabilities{p, kStride};
        const auto* v = at<Unit>(scratch.values, run->key / kTile * (dim * kPairStride) + run->key % kTile / kPair<D>);
        multiply_rows<D, kMaxRows, true>(v, kPairStride, probabilities, run->count, at<Acc>(scratch.out), kStride, dim,
                                         kStride);
      }
    } else {
      for (int64_t row = 0; row < dim; row += R) add_values(runs, num_runs, row, is_first);
    }
  }

  // Scores of R keys; `max` follows.
  __attribute__((noinline)) void score(int64_t key, Acc* scores, Vec (&max)[C]) const {
    Vec acc[R][C];
    if constexpr (kOnTiles<D>) {
      for (int r = 0; r < R; ++r) {
        for (int c = 0; c < C; ++c) acc[r][c] = load<Vec>(scores + r * kStride + c * kLanes<D>);
      }
    } else {
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) acc[r][c] = Vec{};
      }
      const int64_t units = dim / kPair<D>;
      const Unit* k = at<Unit>(scratch.keys, key * units);
      const Unit* q = at<Unit>(scratch.q);
      for (int64_t unit = 0; unit < units; ++unit, ++k, q += kStride) multiply(k, units, q, acc);
    }
    const auto scale = static_cast<Acc>(shape.scale);
    const bool all_seen = key + R - 1 <= begin && sight.keeps_block(key / kKeyBlock<D>, begin + kQueries - 1);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) acc[r][c] *= scale;
    }
    if (!all_seen) {
      for (int v = 0; v < VECTORS; ++v) {
        IndexVec query;
        for (int i = 0; i < kLanes<D>; ++i) query[i] = static_cast<Index>(v * kLanes<D> + i);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          const auto first = static_cast<Index>(begin), from = static_cast<Index>(key + r) - first;
          const Index until = sight.until_of(key + r) - first;
          for (int h = 0; h < HEADS; ++h) {
            Vec& value = acc[r][h * VECTORS + v];
            value = query < from ? Vec{} + kUnseen<Acc> : value;
            value = query >= until ? Vec{} + kUnseen<Acc> : value;
          }
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) {
        max[c] = acc[r][c] > max[c] ? acc[r][c] : max[c];
        std::memcpy(scores + r * kStride + c * kLanes<D>, &acc[r][c], sizeof(acc[r][c]));
      }
    }
  }

  // acc[r] += a[r * stride] * a row of the right operand.
  static inline __attribute__((always_inline)) void multiply(const Unit* a, int64_t stride, const Unit* b,
                                                             Vec (&acc)[R][C]) {
    typename Op::Vec bv[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) bv[c] = load<typename Op::Vec>(b + c * kLanes<D>);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const auto av = Op::broadcast(a[r * stride]);
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) Op::multiply_add(acc[r][c], av, bv[c]);
    }
  }

  // What there is, where larger scores were found.
  void shrink(const Vec (&max)[C], bool is_first) const {
    for (int c = 0; c < C; ++c) {
      Acc* max_at = at<Acc>(scratch.max, c * kLanes<D>);
      const Vec old = load<Vec>(max_at);
      std::memcpy(max_at, &max[c], sizeof(max[c]));
      if (is_first || std::memcmp(&old, &max[c], sizeof(old)) == 0) continue;
      const Vec factor = exp_for<D>(old - max[c]);
      const auto multiply = [&](Acc* values) {
        const Vec shrunk = load<Vec>(values) * factor;
        std::memcpy(values, &shrunk, sizeof(shrunk));
      };
      multiply(at<Acc>(scratch.sum, c * kLanes<D>));
      for (int64_t i = 0; i < dim; ++i) multiply(at<Acc>(scratch.out, i * kStride + c * kLanes<D>));
    }
  }

  void exponentials(int64_t num_keys, const Vec (&max)[C]) const {
    Vec sum[C];
    for (int c = 0; c < C; ++c) sum[c] = load<Vec>(at<Acc>(scratch.sum, c * kLanes<D>));
    const Acc* scores = at<Acc>(scratch.scores);
    Unit* to = at<Unit>(scratch.probabilities);
    for (int64_t key = 0; key < num_keys; key += kPair<D>, scores += kPair<D> * kStride, to += kStride) {
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) {
        Vec p[kPair<D>];
        for (int i = 0; i < kPair<D>; ++i) {
          p[i] = exp_for<D>(load<Vec>(scores + i * kStride + c * kLanes<D>) - max[c]);
          sum[c] += p[i];
        }
        store_pairs<D>(p, to + c * kLanes<D>);
      }
    }
    for (int c = 0; c < C; ++c) std::memcpy(at<Acc>(scratch.sum, c * kLanes<D>), &sum[c], sizeof(sum[c]));
  }

  // R elements of the values of all runs, times their probabilities.
  __attribute__((noinline)) void add_values(const Run* runs, int num_runs, int64_t row, bool is_first) const {
    Acc* out = at<Acc>(scratch.out, row * kStride);
    Vec acc[R][C];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) acc[r][c] = is_first ? Vec{} : load<Vec>(out + r * kStride + c * kLanes<D>);
    }
    const Unit* p = at<Unit>(scratch.probabilities);
    for (const Run* run = runs; run < runs + num_runs; ++run) {
      const Unit* v = at<Unit>(scratch.values, run->key / kPair<D> * dim + row);
      for (int64_t unit = 0; unit < run->count / kPair<D>; ++unit, v += dim, p += kStride) multiply(v, 1, p, acc);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) {
        std::memcpy(out + r * kStride + c * kLanes<D>, &acc[r][c], sizeof(acc[r][c]));
      }
    }
  }

  void store() const {
    const int64_t count = smaller(kQueries, end - begin);
    for (int h = 0; h < HEADS; ++h) {
      const int64_t head = first_head + h;
      auto* lse = static_cast<Acc*>(params.lse) + (batch * shape.num_heads + head) * shape.length + begin;
      Vec factors[VECTORS];
      for (int v = 0; v < VECTORS; ++v) {
        const int64_t column = h * kQueries + v * kLanes<D>, left = count - v * kLanes<D>;
        const Vec sum = load<Vec>(at<Acc>(scratch.sum, column));
        factors[v] = 1 / sum;
        const Vec logarithm = load<Vec>(at<Acc>(scratch.max, column)) + log_sum(sum);
        if (left > 0) std::memcpy(lse + v * kLanes<D>, &logarithm, smaller(kLanes<D>, left) * sizeof(Acc));
      }
      auto* to = static_cast<Storage*>(params.out) +
                 ((batch * shape.length + begin) * shape.num_heads + head) * shape.head_dim;
      store_transposed<D>(at<Acc>(scratch.out, h * kQueries), kStride, factors, count, shape.head_dim,
                          shape.num_heads * shape.head_dim, to);
    }
  }
};

template <class D, int HEADS, int VECTORS>
void forward_heads(const ForwardParams& params, const ForwardScratch& scratch, const Sight<D>& sight, int64_t batch,
                   int64_t head, int64_t first, int64_t end) {
  using Tile = Forward<D, HEADS, VECTORS>;
  for (int64_t begin = first; begin < end; begin += Tile::kQueries) {
    Tile{params, scratch, sight, batch, head, begin, end}.run();
  }
}

template <class D>
void forward(const ForwardParams& params, int64_t batch, int64_t kv_head, int64_t first, int64_t end,
             const ForwardScratch& scratch) {
  using Unit = typename Operands<D>::Unit;
  const Shape& shape = params.shape;
  [[maybe_unused]] TileRegisters<D> registers;
  const Stager<D> stager{shape.head_dim, padded_dim(shape)};
  const int64_t size = stager.dim * kTile / kPair<D>;
  auto* keys = static_cast<Unit*>(scratch.keys);
  auto* values = static_cast<Unit*>(scratch.values);
  const Head<D> k(params.k, batch, kv_head), v(params.v, batch, kv_head);
  Sight<D> sight(shape, batch, scratch.seen_until);
  sight.find_blocks(shape, scratch.block_sight);
  for (int64_t j = 0; j < tiles_of(end); ++j) {
    if (!sight.reaches(j, first)) continue;
    stager.rows(k, j * kTile, shape.length, keys + j * size);
    if constexpr (kOnTiles<D>) {
      stager.column_pairs(v, j * kTile, shape.length, values + j * size);
    } else {
      stager.row_pairs(v, j * kTile, shape.length, values + j * size);
    }
  }
  // Up to four heads at a time, in nearly equal parts.
  const int64_t group = shape.num_heads / shape.num_kv_heads, parts = ceil_div(group, 4);
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t head = group * part / parts, heads = group * (part + 1) / parts - head;
    const auto run = heads == 1   ? forward_heads<D, 1, 4>
                     : heads == 2 ? forward_heads<D, 2, 2>
                     : heads == 3 ? forward_heads<D, 3, 1>
                                  : forward_heads<D, 4, 1>;
    run(params, scratch, sight, batch, kv_head * group + head, first, end);
  }
}

}  // namespace
}  // namespace rrt::attention
