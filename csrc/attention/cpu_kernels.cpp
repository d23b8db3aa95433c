// Compiled once per instruction set: RRT_KERNELS names the table, RRT_VECTOR_BYTES is its registers' size.
//
// Causal attention and its gradients in tiles of kTile queries by kTile keys, of which only those on and below the
// diagonal are computed. All tiles lie transposed, [keys, queries]: the numbers of a query (largest score, sum,
// logarithm, delta) are then in a lane of their own, and vectors need no horizontal sums.
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

  // [dim, kTile]: a right operand of products over the head's elements.
  void columns(const Head<D>& head, int64_t first, int64_t end, Unit* to) const {
    for (int64_t row = 0; row < kTile; row += kLanes<D>) {
      for (int64_t i = 0; i < dim; i += kUnitLanes<D>) {
        UnitVec block[kLanes<D>];
        for (int r = 0; r < kLanes<D>; ++r) block[r] = load(head, first + row + r, end, i);
        transpose(block);
        for (int u = 0; u < kLanes<D>; ++u) {
          std::memcpy(to + (i / kPair<D> + u) * kTile + row, &block[u], sizeof(block[u]));
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
    const auto wide = [](U16 narrow) { return __builtin_convertvector(narrow, U32); };
    const U32 pairs = wide(Operands<D>::narrow(values[0])) | wide(Operands<D>::narrow(values[1])) << 16;
    std::memcpy(to, &pairs, sizeof(pairs));
  }
}

// A part of a tile of keys and one of queries: some keys, and the first queries.
struct Part {
  int64_t key_begin, key_end, query_end;
};
// Its sides are multiples of this: of the elements of any vector of units.
constexpr int64_t kPartBlock = 32;
static_assert(kPartBlock % 32 == 0 && kTile % kPartBlock == 0 && kPadDim % 32 == 0, "multiply_on_tiles");

// Which queries of a sequence see which keys: those from the key on to where it ends to be seen.
template <class D>
struct Sight {
  using Acc = typename D::Acc;
  using Vec = typename D::Vec;
  // As wide as Acc, so that comparisons make masks of its vectors.
  using Index = std::conditional_t<sizeof(Acc) == 8, int64_t, int32_t>;
  using IndexVec = typename Register<Index>::Type;

  const Index* until = nullptr;  // of each token up to the end of the last tile; null: all are seen to the end

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

  // Whether any query from `query` on sees a key of tile j.
  bool reaches(int64_t j, int64_t query) const {
    if (until == nullptr) return true;
    bool seen = false;
    for (int64_t key = j * kTile; key < (j + 1) * kTile; ++key) seen |= until[key] > query;
    return seen;
  }

  // The part of a tile of keys and one of queries outside of which no query sees a key, in whole blocks.
  Part part(int64_t i, int64_t j) const {
    Part part{0, kTile, kTile};
    if (until == nullptr) return part;
    const int64_t first = i * kTile;
    const Index* keys = until + j * kTile;
    while (part.key_begin < kTile && keys[part.key_begin] <= first) ++part.key_begin;
    while (part.key_end > part.key_begin && keys[part.key_end - 1] <= first) --part.key_end;
    int64_t last = 0;
    for (int64_t key = part.key_begin; key < part.key_end; ++key) last = keys[key] > last ? keys[key] : last;
    part.key_begin -= part.key_begin % kPartBlock;
    part.key_end = smaller(kTile, round_up(part.key_end, kPartBlock));
    part.query_end = smaller(kTile, round_up(last > first ? last - first : 0, kPartBlock));
    return part;
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

// Rows `from` [dim, kTile] transposed, each multiplied by its factor, to `count` tokens of a head.
template <class D>
void store_transposed(const typename D::Acc* from, const typename D::Vec* factors, int64_t count, int64_t head_dim,
                      int64_t stride, typename D::Storage* to) {
  using Acc = typename D::Acc;
  for (int64_t row = 0; row < count; row += kLanes<D>) {
    for (int64_t i = 0; i < head_dim; i += kLanes<D>) {
      typename D::Vec block[kLanes<D>];
      for (int u = 0; u < kLanes<D>; ++u) {
        block[u] = load<typename D::Vec>(from + (i + u) * kTile + row) * factors[row / kLanes<D>];
      }
      transpose(block);
      const int64_t width = smaller(kLanes<D>, head_dim - i);
      for (int64_t r = 0; r < smaller(kLanes<D>, count - row); ++r) {
        Acc values[kLanes<D>];
        std::memcpy(values, &block[r], sizeof(values));
        typename D::Storage* row_to = to + (row + r) * stride + i;
        for (int64_t u = 0; u < width; ++u) row_to[u] = D::narrow(values[u]);
      }
    }
  }
}

template <class D>
struct Forward {
  using Acc = typename D::Acc;
  using Vec = typename D::Vec;
  using Unit = typename Operands<D>::Unit;
  static constexpr int64_t kPairStride = kTile / kPair<D>;

  const Shape& shape;
  const ForwardScratch& scratch;
  const int64_t dim = padded_dim(shape);

  // Scores of a tile become probabilities, and `out` and the running softmax follow.
  void softmax(const Unseen<D>& unseen, const Part& part) const {
    auto* scores = static_cast<Acc*>(scratch.scores);
    auto* probabilities = static_cast<Unit*>(scratch.probabilities);
    auto* out = static_cast<Acc*>(scratch.out);
    for (int64_t query = 0; query < part.query_end; query += kLanes<D>) {
      Acc* max_at = static_cast<Acc*>(scratch.max) + query;
      Acc* sum_at = static_cast<Acc*>(scratch.sum) + query;
      const Vec old = load<Vec>(max_at);
      Vec max = old, sum = {};
      for (int64_t key = part.key_begin; key < part.key_end; ++key) {
        Acc* at = scores + key * kTile + query;
        const Vec score = unseen.set(load<Vec>(at) * static_cast<Acc>(shape.scale), query, key, kUnseen<Acc>);
        std::memcpy(at, &score, sizeof(score));
        max = score > max ? score : max;
      }
      for (int64_t key = part.key_begin; key < part.key_end; key += kPair<D>) {
        Vec p[kPair<D>];
        for (int i = 0; i < kPair<D>; ++i) {
          p[i] = exp_negative(load<Vec>(scores + (key + i) * kTile + query) - max);
          sum += p[i];
        }
        store_pairs<D>(p, probabilities + key / kPair<D> * kTile + query);
      }
      const Vec shrink = exp_negative(old - max);
      sum += load<Vec>(sum_at) * shrink;
      std::memcpy(max_at, &max, sizeof(max));
      std::memcpy(sum_at, &sum, sizeof(sum));
      for (int64_t i = 0; i < dim; ++i) {
        const Vec shrunk = load<Vec>(out + i * kTile + query) * shrink;
        std::memcpy(out + i * kTile + query, &shrunk, sizeof(shrunk));
      }
    }
  }
};

template <class D>
void forward(const ForwardParams& params, int64_t batch, int64_t kv_head, int64_t first, int64_t end,
             const ForwardScratch& scratch) {
  using Acc = typename D::Acc;
  using Vec = typename D::Vec;
  using Storage = typename D::Storage;
  using Unit = typename Operands<D>::Unit;
  const Shape& shape = params.shape;
  [[maybe_unused]] TileRegisters<D> registers;
  const Forward<D> tile{shape, scratch};
  const Stager<D> stager{shape.head_dim, tile.dim};
  const int64_t dim = tile.dim, size = dim * kTile / kPair<D>, group = shape.num_heads / shape.num_kv_heads;
  auto* keys = static_cast<Unit*>(scratch.keys);
  auto* values = static_cast<Unit*>(scratch.values);
  const Head<D> k(params.k, batch, kv_head), v(params.v, batch, kv_head);
  const Sight<D> sight(shape, batch, scratch.seen_until);
  for (int64_t j = 0; j < tiles_of(end); ++j) {
    if (!sight.reaches(j, first)) continue;
    stager.rows(k, j * kTile, shape.length, keys + j * size);
    stager.column_pairs(v, j * kTile, shape.length, values + j * size);
  }
  auto* out = static_cast<Acc*>(scratch.out);
  for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
    const Head<D> q(params.q, batch, head);
    for (int64_t begin = first; begin < end; begin += kTile) {
      stager.columns(q, begin, end, static_cast<Unit*>(scratch.q));
      const Blocks<D> queries{static_cast<const Unit*>(scratch.q), kTile};
      for (int64_t i = 0; i < kTile; ++i) {
        static_cast<Acc*>(scratch.max)[i] = kLowest<Acc>;
        static_cast<Acc*>(scratch.sum)[i] = 0;
      }
      for (int64_t i = 0; i < dim * kTile; ++i) out[i] = 0;
      for (int64_t j = 0; j <= begin / kTile; ++j) {
        const Part part = sight.part(begin / kTile, j);
        if (part.key_begin >= part.key_end) continue;
        const int64_t num_keys = part.key_end - part.key_begin, num_queries = part.query_end;
        multiply_rows<D, kMaxRows, false>(keys + j * size + part.key_begin * dim / kPair<D>, dim / kPair<D>, queries,
                                          dim, static_cast<Acc*>(scratch.scores) + part.key_begin * kTile, kTile,
                                          num_keys, num_queries);
        tile.softmax({begin / kTile, j, sight}, part);
        const Blocks<D> probabilities{
            static_cast<const Unit*>(scratch.probabilities) + part.key_begin / kPair<D> * kTile, kTile};
        multiply_rows<D, kMaxRows, true>(values + j * size + part.key_begin / kPair<D>, tile.kPairStride, probabilities,
                                         num_keys, out, kTile, dim, num_queries);
      }
      const int64_t count = smaller(kTile, end - begin);
      const auto* max = static_cast<const Acc*>(scratch.max);
      const auto* sum = static_cast<const Acc*>(scratch.sum);
      Vec factors[kTile / kLanes<D>];
      for (int64_t i = 0; i < kTile; i += kLanes<D>) factors[i / kLanes<D>] = 1 / load<Vec>(sum + i);
      auto* to = static_cast<Storage*>(params.out) +
                 ((batch * shape.length + begin) * shape.num_heads + head) * shape.head_dim;
      store_transposed<D>(out, factors, count, shape.head_dim, shape.num_heads * shape.head_dim, to);
      auto* lse = static_cast<Acc*>(params.lse) + (batch * shape.num_heads + head) * shape.length + begin;
      for (int64_t i = 0; i < count; ++i) lse[i] = max[i] + static_cast<Acc>(__builtin_log(sum[i]));
    }
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
      store_transposed<D>(at<Acc>(scratch.q_grad, i * size), ones, smaller(kTile, shape.length - i * kTile),
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
