// Tiles of heads as operands of products, which of their pairs are seen, and their way back, for the
// per-instruction-set files and under their rules (see simd.h).
//
// All tiles of scores lie transposed, [keys, queries]: the numbers of a query (largest score, sum, logarithm, delta)
// are then in a lane of their own, and vectors need no horizontal sums.
#pragma once

#include <type_traits>

#include "attention/cpu_kernels.h"
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

}  // namespace
}  // namespace rrt::attention
