// Compiled once per instruction set: RRT_KERNELS names the table, RRT_VECTOR_BYTES is its registers' size.
//
// Causal attention and its gradients in tiles, of which only those on and below the diagonal are computed. All tiles
// lie transposed, [keys, queries]: the numbers of a query (largest score, sum, logarithm, delta) are then in a lane of
// their own, and vectors need no horizontal sums.
//
//   forward:   S = K Q^T, the running softmax down the columns, O^T += V^T P
//   backward:  P = exp(S - lse), dV += P dO, dP = V dO^T, dS = P (dP - delta), dK += dS Q, dQ^T += K^T dS
#include "attention/cpu_kernels.h"

#include <type_traits>

#include "simd_products.h"

namespace rrt::attention {
namespace {

// One head of a view.
template <class D>
struct Head {
  const typename D::Storage* data;
  int64_t stride;  // from token to token

  Head(const View& view, int64_t batch, int64_t head)
      : data(static_cast<const typename D::Storage*>(view.data) + batch * view.batch_stride + head * view.head_stride),
        stride(view.token_stride) {}
};

// A tile of rows as an operand of products. Rows from `end` on, and elements beyond the head's, are zeros.
template <class D>
struct Stager {
  using Storage = typename D::Storage;
  using Op = Operands<D>;
  using Unit = typename Op::Unit;
  using UnitVec = typename Op::Vec;

  const int64_t head_dim;
  const int64_t dim;  // padded

  UnitVec load(const Head<D>& head, int64_t row, int64_t end, int64_t i) const {
    const int64_t left = row < end ? head_dim - i : 0;
    Storage chunk[kUnitLanes<D>] = {};
    if (left <= 0) return Op::load_units(chunk);
    const Storage* from = head.data + row * head.stride + i;
    if (left >= kUnitLanes<D>) return Op::load_units(from);
    std::memcpy(chunk, from, left * sizeof(chunk[0]));
    return Op::load_units(chunk);
  }

  // [kTile, dim]: a left operand of products over the head's elements.
  void rows(const Head<D>& head, int64_t first, int64_t end, Unit* to) const {
    for (int64_t row = first; row < first + kTile; ++row, to += dim / kPair<D>) {
      for (int64_t i = 0; i < dim; i += kUnitLanes<D>) {
        const UnitVec units = load(head, row, end, i);
        std::memcpy(to + i / kPair<D>, &units, sizeof(units));
      }
    }
  }

  // [dim, `stride`], of which `rows` are written: a right operand of products over the head's elements.
  void columns(const Head<D>& head, int64_t first, int64_t end, Unit* to, int64_t rows = kTile,
               int64_t stride = kTile) const {
    for (int64_t row = 0; row < rows; row += kLanes<D>) {
      for (int64_t i = 0; i < dim; i += kUnitLanes<D>) {
        UnitVec block[kLanes<D>];
        for (int r = 0; r < kLanes<D>; ++r) block[r] = load(head, first + row + r, end, i);
        transpose(block);
        for (int u = 0; u < kLanes<D>; ++u) {
          std::memcpy(to + (i / kPair<D> + u) * stride + row, &block[u], sizeof(block[u]));
        }
      }
    }
  }

  // Units along the rows: kPair vectors of them, from kPair rows.
  void load_pairs(const Head<D>& head, int64_t row, int64_t end, int64_t i, UnitVec (&to)[kPair<D>]) const {
    for (int r = 0; r < kPair<D>; ++r) to[r] = load(head, row + r, end, i);
    if constexpr (kPair<D> == 2) {
      U16Full low, high;
      zip((U16Full)to[0], (U16Full)to[1], low, high);
      to[0] = (UnitVec)low;
      to[1] = (UnitVec)high;
    }
  }

  // [kTile, dim]: a right operand of products over the rows.
  void row_pairs(const Head<D>& head, int64_t first, int64_t end, Unit* to) const {
    for (int64_t row = 0; row < kTile; row += kPair<D>, to += dim) {
      for (int64_t i = 0; i < dim; i += kUnitLanes<D>) {
        UnitVec pairs[kPair<D>];
        load_pairs(head, first + row, end, i, pairs);
        std::memcpy(to + i, pairs, sizeof(pairs));
      }
    }
  }

  // [dim, kTile]: a left operand of products over the rows.
  void column_pairs(const Head<D>& head, int64_t first, int64_t end, Unit* to) const {
    constexpr int64_t kStride = kTile / kPair<D>;
    for (int64_t row = 0; row < kTile; row += kUnitLanes<D>) {
      for (int64_t i = 0; i < dim; i += kUnitLanes<D>) {
        UnitVec blocks[kPair<D>][kLanes<D>];
        for (int r = 0; r < kLanes<D>; ++r) {
          UnitVec pairs[kPair<D>];
          load_pairs(head, first + row + r * kPair<D>, end, i, pairs);
          for (int b = 0; b < kPair<D>; ++b) blocks[b][r] = pairs[b];
        }
        for (int b = 0; b < kPair<D>; ++b) {
          transpose(blocks[b]);
          for (int u = 0; u < kLanes<D>; ++u) {
            std::memcpy(to + (i + b * kLanes<D> + u) * kStride + row / kPair<D>, &blocks[b][u], sizeof(blocks[b][u]));
          }
        }
      }
    }
  }
};

// Vectors of a tile [keys, queries] as operands: a left one of products over the queries has units along a key's row,
// a right one of products over the keys has units of kPair keys.
template <class D>
inline void store_row(typename D::Vec value, typename Operands<D>::Unit* row, int64_t query) {
  if constexpr (kPair<D> == 1) {
    std::memcpy(row + query, &value, sizeof(value));
  } else {
    const U16 narrow = Operands<D>::narrow(value);
    std::memcpy(row + query / 2, &narrow, sizeof(narrow));
  }
}

template <class D>
inline void store_pairs(const typename D::Vec (&values)[kPair<D>], typename Operands<D>::Unit* to) {
  if constexpr (kPair<D> == 1) {
    std::memcpy(to, values, sizeof(values));
  } else {
    const U32 pairs = Operands<D>::narrow_pairs(values[0], values[1]);
    std::memcpy(to, &pairs, sizeof(pairs));
  }
}

// Keys that the forward skips, or takes, together.
template <class D>
constexpr int64_t kKeyBlock = kOnTiles<D> ? 32 : 8;
static_assert(kTile % 32 == 0 && kPadDim % 32 == 0, "multiply_on_tiles");

// Which queries of a sequence see which keys: those from the key on to where it ends to be seen.
template <class D>
struct Sight {
  using Acc = typename D::Acc;
  using Vec = typename D::Vec;
  // As wide as Acc, so that comparisons make masks of its vectors.
  using Index = std::conditional_t<sizeof(Acc) == 8, int64_t, int32_t>;
  using IndexVec = typename Register<Index>::Type;

  const Index* until = nullptr;  // of each token up to the end of the last tile; null: all are seen to the end
  // Of each block of kKeyBlock tokens, the largest and the smallest `until`; null as well.
  const Index* block_last = nullptr;
  const Index* block_first = nullptr;

  Sight(const Shape& shape, int64_t batch, void* scratch) {
    if (shape.seen_until == nullptr) return;
    const int32_t* from = shape.seen_until + batch * shape.length;
    auto* to = static_cast<Index*>(scratch);
    for (int64_t token = 0; token < tiles_of(shape.length) * kTile; ++token) {
      const int64_t given = token < shape.length ? from[token] : 0;
      to[token] = static_cast<Index>(given > token ? given : token + 1);
    }
    until = to;
  }

  void find_blocks(const Shape& shape, void* scratch) {
    if (until == nullptr) return;
    const int64_t blocks = tiles_of(shape.length) * kTile / kKeyBlock<D>;
    auto *last = static_cast<Index*>(scratch), *first = last + blocks;
    for (int64_t block = 0; block < blocks; ++block) {
      const Index* keys = until + block * kKeyBlock<D>;
      last[block] = first[block] = keys[0];
      for (int64_t i = 1; i < kKeyBlock<D>; ++i) {
        last[block] = keys[i] > last[block] ? keys[i] : last[block];
        first[block] = keys[i] < first[block] ? keys[i] : first[block];
      }
    }
    block_last = last;
    block_first = first;
  }

  // Whether any query from `query` on sees a key of the block, and whether all up to `query` see all of them.
  bool reaches_block(int64_t block, int64_t query) const { return until == nullptr || block_last[block] > query; }
  bool keeps_block(int64_t block, int64_t query) const { return until == nullptr || block_first[block] > query; }

  Index until_of(int64_t key) const { return until == nullptr ? static_cast<Index>(INT32_MAX) : until[key]; }

  // Whether any query from `query` on sees a key of tile j.
  bool reaches(int64_t j, int64_t query) const {
    if (until == nullptr) return true;
    bool seen = false;
    for (int64_t key = j * kTile; key < (j + 1) * kTile; ++key) seen |= until[key] > query;
    return seen;
  }
};

// Masks the pairs of tile i of queries and tile j of keys in which the query does not see the key.
template <class D>
struct Unseen {
  using Acc = typename D::Acc;
  using Vec = typename D::Vec;
  using Index = typename Sight<D>::Index;

  const bool diagonal;
  const Index first;  // query of the tile
  const Index* until = nullptr;

  Unseen(int64_t i, int64_t j, const Sight<D>& sight) : diagonal(i == j), first(static_cast<Index>(i * kTile)) {
    if (sight.until != nullptr) until = sight.until + j * kTile;
  }

  // Puts `value` into the lanes of queries, from `query` on, that do not see the key.
  Vec set(Vec values, int64_t query, int64_t key, Acc value) const {
    if (diagonal) {
      Vec number;
      for (int i = 0; i < kLanes<D>; ++i) number[i] = static_cast<Acc>(i);
      values = number < static_cast<Acc>(key - query) ? Vec{} + value : values;
    }
    if (until != nullptr) {
      const Index left = until[key] - first - static_cast<Index>(query);
      if (left < kLanes<D>) {
        typename Sight<D>::IndexVec number;
        for (int i = 0; i < kLanes<D>; ++i) number[i] = i;
        values = number >= left ? Vec{} + value : values;
      }
    }
    return values;
  }
};

// Columns of `from` [dim, from_stride], each multiplied by its factor, to `count` tokens of a head.
template <class D>
void store_transposed(const typename D::Acc* from, int64_t from_stride, const typename D::Vec* factors, int64_t count,
                      int64_t head_dim, int64_t stride, typename D::Storage* to) {
  for (int64_t row = 0; row < count; row += kLanes<D>) {
    int64_t i = 0;
    if constexpr (kPair<D> == 2) {
      // Of pairs there are half as many to transpose.
      for (; i + kUnitLanes<D> <= head_dim; i += kUnitLanes<D>) {
        typename Operands<D>::Vec block[kLanes<D>];
        for (int u = 0; u < kLanes<D>; ++u) {
          const typename D::Acc* pair = from + (i + 2 * u) * from_stride + row;
          const auto factor = factors[row / kLanes<D>];
          block[u] = Operands<D>::narrow_pairs(load<typename D::Vec>(pair) * factor,
                                               load<typename D::Vec>(pair + from_stride) * factor);
        }
        transpose(block);
        for (int64_t r = 0; r < smaller(kLanes<D>, count - row); ++r) {
          std::memcpy(to + (row + r) * stride + i, &block[r], sizeof(block[r]));
        }
      }
    }
    for (; i < head_dim; i += kLanes<D>) {
      typename D::Vec block[kLanes<D>];
      for (int u = 0; u < kLanes<D>; ++u) {
        block[u] = load<typename D::Vec>(from + (i + u) * from_stride + row) * factors[row / kLanes<D>];
      }
      transpose(block);
      for (int64_t r = 0; r < smaller(kLanes<D>, count - row); ++r) {
        write<D>(block[r], to + (row + r) * stride + i, head_dim - i);
      }
    }
  }
}

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

template <class D>
struct Backward {
  using Acc = typename D::Acc;
  using Vec = typename D::Vec;
  using Storage = typename D::Storage;
  using Unit = typename Operands<D>::Unit;

  const BackwardParams& params;
  const Shape& shape;
  const BackwardScratch& scratch;
  const int64_t batch;
  const int64_t head;
  const int64_t kv_head = head / (shape.num_heads / shape.num_kv_heads);
  const int64_t dim = padded_dim(shape);
  const int64_t tiles = tiles_of(shape.length);
  const int64_t size = dim * kTile;       // of a tile of sums
  const int64_t units = size / kPair<D>;  // of a tile as an operand
  const Stager<D> stager{shape.head_dim, dim};

  template <class T>
  static T* at(void* base, int64_t offset = 0) {
    return static_cast<T*>(base) + offset;
  }

  void run() const {
    stage_queries();
    const Head<D> k(params.k, batch, kv_head), v(params.v, batch, kv_head);
    const Sight<D> sight(shape, batch, scratch.seen_until);
    for (int64_t j = 0; j < tiles; ++j) {
      stager.rows(k, j * kTile, shape.length, at<Unit>(scratch.k_rows));
      stager.column_pairs(k, j * kTile, shape.length, at<Unit>(scratch.k_columns));
      stager.rows(v, j * kTile, shape.length, at<Unit>(scratch.v_rows));
      for (int64_t i = 0; i < size; ++i) *at<Acc>(scratch.k_grad, i) = *at<Acc>(scratch.v_grad, i) = 0;
      for (int64_t i = j; i < tiles; ++i) {
        if (sight.reaches(j, i * kTile)) multiply(i, {i, j, sight});
      }
      store_keys(j, at<Acc>(scratch.k_grad), params.k_grad, 0);
      store_keys(j, at<Acc>(scratch.v_grad), params.v_grad, 1);
    }
    Vec ones[kTile / kLanes<D>];
    for (Vec& one : ones) one = Vec{} + 1;
    for (int64_t i = 0; i < tiles; ++i) {
      auto* to = at<Storage>(params.q_grad,
                             ((batch * shape.length + i * kTile) * shape.num_heads + head) * shape.head_dim);
      store_transposed<D>(at<Acc>(scratch.q_grad, i * size), kTile, ones, smaller(kTile, shape.length - i * kTile),
                          shape.head_dim, shape.num_heads * shape.head_dim, to);
    }
  }

  void stage_queries() const {
    const Head<D> q(params.q, batch, head), out_grad(params.out_grad, batch, head), out(params.out, batch, head);
    const auto* lse = static_cast<const Acc*>(params.lse) + (batch * shape.num_heads + head) * shape.length;
    for (int64_t i = 0; i < tiles; ++i) {
      stager.columns(q, i * kTile, shape.length, at<Unit>(scratch.q_columns, i * units));
      stager.row_pairs(q, i * kTile, shape.length, at<Unit>(scratch.q_rows, i * units));
      stager.columns(out_grad, i * kTile, shape.length, at<Unit>(scratch.out_columns, i * units));
      stager.row_pairs(out_grad, i * kTile, shape.length, at<Unit>(scratch.out_rows, i * units));
    }
    for (int64_t token = 0; token < tiles * kTile; ++token) {
      Vec sum = {};
      for (int64_t i = 0; token < shape.length && i < shape.head_dim; i += kLanes<D>) {
        sum += wide(out, token, i) * wide(out_grad, token, i);
      }
      *at<Acc>(scratch.delta, token) = reduce_lanes(sum, [](Acc a, Acc b) { return a + b; });
      // Beyond the end nothing is probable.
      *at<Acc>(scratch.lse, token) = token < shape.length ? lse[token] : -kLowest<Acc>;
    }
    for (int64_t i = 0; i < tiles * size; ++i) *at<Acc>(scratch.q_grad, i) = 0;
  }

  Vec wide(const Head<D>& from, int64_t token, int64_t i) const {
    const Storage* elements = from.data + token * from.stride + i;
    if (shape.head_dim - i >= kLanes<D>) return D::widen(elements);
    Storage chunk[kLanes<D>] = {};
    std::memcpy(chunk, elements, (shape.head_dim - i) * sizeof(chunk[0]));
    return D::widen(chunk);
  }

  // The tile of keys at hand against the tile of queries i.
  void multiply(int64_t i, const Unseen<D>& unseen) const {
    constexpr int64_t kStride = kTile / kPair<D>;
    const Blocks<D> q_columns{at<Unit>(scratch.q_columns, i * units), kTile};
    const Blocks<D> out_columns{at<Unit>(scratch.out_columns, i * units), kTile};
    multiply_rows<D, kMaxRows, false>(at<Unit>(scratch.k_rows), dim / kPair<D>, q_columns, dim,
                                      at<Acc>(scratch.scores), kTile, kTile, kTile);
    multiply_rows<D, kMaxRows, false>(at<Unit>(scratch.v_rows), dim / kPair<D>, out_columns, dim,
                                      at<Acc>(scratch.probability_grads), kTile, kTile, kTile);
    slopes(i, unseen);
    const Blocks<D> q_rows{at<Unit>(scratch.q_rows, i * units), dim};
    const Blocks<D> out_rows{at<Unit>(scratch.out_rows, i * units), dim};
    const Blocks<D> score_pairs{at<Unit>(scratch.score_pairs), kTile};
    multiply_rows<D, kMaxRows, true>(at<Unit>(scratch.probabilities), kStride, out_rows, kTile,
                                     at<Acc>(scratch.v_grad), dim, kTile, dim);
    multiply_rows<D, kMaxRows, true>(at<Unit>(scratch.score_rows), kStride, q_rows, kTile, at<Acc>(scratch.k_grad),
                                     dim, kTile, dim);
    multiply_rows<D, kMaxRows, true>(at<Unit>(scratch.k_columns), kStride, score_pairs, kTile,
                                     at<Acc>(scratch.q_grad, i * size), kTile, dim, kTile);
  }

  // Probabilities, and the gradient of the scores, as operands.
  void slopes(int64_t i, const Unseen<D>& unseen) const {
    const auto scale = static_cast<Acc>(shape.scale);
    for (int64_t query = 0; query < kTile; query += kLanes<D>) {
      const Vec lse = load<Vec>(at<Acc>(scratch.lse, i * kTile + query));
      const Vec delta = load<Vec>(at<Acc>(scratch.delta, i * kTile + query));
      for (int64_t key = 0; key < kTile; key += kPair<D>) {
        Vec slope[kPair<D>];
        for (int r = 0; r < kPair<D>; ++r) {
          const int64_t place = (key + r) * kTile + query;
          const Vec score = load<Vec>(at<Acc>(scratch.scores, place)) * scale;
          const Vec p = unseen.set(exp_negative(score - lse), query, key + r, 0);
          slope[r] = p * (load<Vec>(at<Acc>(scratch.probability_grads, place)) - delta) * scale;
          store_row<D>(p, at<Unit>(scratch.probabilities, (key + r) * (kTile / kPair<D>)), query);
          store_row<D>(slope[r], at<Unit>(scratch.score_rows, (key + r) * (kTile / kPair<D>)), query);
        }
        store_pairs<D>(slope, at<Unit>(scratch.score_pairs, key / kPair<D> * kTile + query));
      }
    }
  }

  // A tile's sums to the gradient, or to this head's share of it.
  void store_keys(int64_t j, const Acc* sums, void* grad, int64_t which) const {
    const int64_t first = j * kTile, count = smaller(kTile, shape.length - first);
    for (int64_t token = first; token < first + count; ++token, sums += dim) {
      if (params.shares != nullptr) {
        std::memcpy(at<Acc>(params.shares, share(shape, which, batch, head, token)), sums, dim * sizeof(Acc));
        continue;
      }
      auto* to = at<Storage>(grad, ((batch * shape.length + token) * shape.num_kv_heads + kv_head) * shape.head_dim);
      for (int64_t i = 0; i < shape.head_dim; ++i) to[i] = D::narrow(sums[i]);
    }
  }

  // Where a token's share in k_grad (0) or v_grad (1) begins.
  static int64_t share(const Shape& s, int64_t which, int64_t batch, int64_t head, int64_t token) {
    return (((which * s.batch + batch) * s.num_heads + head) * s.length + token) * padded_dim(s);
  }
};

template <class D>
void backward(const BackwardParams& params, int64_t batch, int64_t head, const BackwardScratch& scratch) {
  [[maybe_unused]] TileRegisters<D> registers;
  Backward<D>{params, params.shape, scratch, batch, head}.run();
}

template <class D>
void sum_shares(const BackwardParams& params, int64_t batch, int64_t kv_head) {
  using Acc = typename D::Acc;
  const Shape& s = params.shape;
  const int64_t group = s.num_heads / s.num_kv_heads;
  void* const grads[] = {params.k_grad, params.v_grad};
  for (int64_t which = 0; which < 2; ++which) {
    for (int64_t token = 0; token < s.length; ++token) {
      auto* to = static_cast<typename D::Storage*>(grads[which]) +
                 ((batch * s.length + token) * s.num_kv_heads + kv_head) * s.head_dim;
      const Acc* from = static_cast<const Acc*>(params.shares) +
                        Backward<D>::share(s, which, batch, kv_head * group, token);
      for (int64_t i = 0; i < s.head_dim; i += kLanes<D>) {
        typename D::Vec sum = {};
        for (int64_t h = 0; h < group; ++h) sum += load<typename D::Vec>(from + h * s.length * padded_dim(s) + i);
        Acc values[kLanes<D>];
        std::memcpy(values, &sum, sizeof(values));
        const int64_t width = smaller(kLanes<D>, s.head_dim - i);
        for (int64_t lane = 0; lane < width; ++lane) to[i + lane] = D::narrow(values[lane]);
      }
    }
  }
}

}  // namespace

const CpuKernels RRT_KERNELS = {
    {forward<Float32>, forward<Float64>, forward<BFloat16>, forward<Float16>},
    {backward<Float32>, backward<Float64>, backward<BFloat16>, backward<Float16>},
    {sum_shares<Float32>, sum_shares<Float64>, sum_shares<BFloat16>, sum_shares<Float16>},
};

}  // namespace rrt::attention
