// The products of attention with keys and values where they lie in a cache.
#pragma once

#include "simd_products.h"

namespace rrt::kv_cache {
namespace {

// Lane i of the result is the sum of v[i]'s lanes.
template <class V>
inline V sum_each(V (&v)[kNumLanes<V>]) {
  for (int half = kNumLanes<V> / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) {
      V low, high;
      zip(v[i], v[i + half], low, high);
      v[i] = low + high;
    }
  }
  return v[0];
}

// Where the slots of a tile lie in a cache, and those of the next tile, which are prefetched meanwhile (null: none).
struct TileRows {
  const int64_t* offsets;
  const int64_t* next;

  TileRows from(int64_t slot) const { return {offsets + slot, next != nullptr ? next + slot : nullptr}; }
  // Into the second-level cache, since a tile is larger than the first-level one.
  template <class Storage>
  void prefetch(const Storage* cache, int64_t slot, int64_t element) const {
    if (next != nullptr) __builtin_prefetch(cache + next[slot] + element, 0, 2);
  }
};

// The right operand of a product (see Staged), read where it lies in a cache; kPair slots make a row of units.
template <class D>
struct Direct {
  const typename D::Storage* cache;
  TileRows rows;

  template <int C>
  void load_columns(int64_t k, int64_t column, typename Operands<D>::Vec (&to)[C]) const {
    if constexpr (kPair<D> == 1) {
      for (int c = 0; c < C; ++c) {
        to[c] = D::widen(cache + rows.offsets[k] + column + c * kLanes<D>);
        rows.prefetch(cache, k, column + c * kLanes<D>);
      }
    } else {
      static_assert(C % 2 == 0);
      for (int c = 0; c < C; c += 2) {
        U16Full pair[2], low, high;
        for (int i = 0; i < 2; ++i) {
          pair[i] = load<U16Full>(cache + rows.offsets[2 * k + i] + column + c * kLanes<D>);
          rows.prefetch(cache, 2 * k + i, column + c * kLanes<D>);
        }
        zip(pair[0], pair[1], low, high);
        to[c] = (typename Operands<D>::Vec)low;
        to[c + 1] = (typename Operands<D>::Vec)high;
      }
    }
  }
  Direct without_prefetch() const { return {cache, {rows.offsets, nullptr}}; }
};

// out[r][s] = a[r] . slot s of the cache, for R rows and as many slots as make one vector of results. A row has
// `steps` vectors of units, with nothing left over.
template <class D, int R>
inline void dot_tile(const typename Operands<D>::Unit* a, int64_t a_stride, const typename D::Storage* cache,
                     const TileRows& tile, int64_t steps, typename D::Acc* out, int64_t out_stride) {
  using Op = Operands<D>;
  constexpr int kSlots = kLanes<D> / R;
  constexpr int kStream = kSlots < 4 ? kSlots : 4;  // rows of the cache that are read side by side
  typename D::Vec acc[kLanes<D>] = {};
  for (int first = 0; first < kSlots; first += kStream) {
    for (int64_t i = 0; i < steps; ++i) {
      typename Op::Vec kv[kStream];
      for (int s = 0; s < kStream; ++s) {
        kv[s] = Op::load_units(cache + tile.offsets[first + s] + i * kUnitLanes<D>);
        tile.prefetch(cache, first + s, i * kUnitLanes<D>);
      }
      for (int r = 0; r < R; ++r) {
        const auto av = load<typename Op::Vec>(a + r * a_stride + i * kLanes<D>);
        for (int s = 0; s < kStream; ++s) Op::multiply_add(acc[r * kSlots + first + s], av, kv[s]);
      }
    }
  }
  const typename D::Vec sums = sum_each(acc);
  typename D::Acc lane[kLanes<D>];
  std::memcpy(lane, &sums, sizeof(sums));
  for (int r = 0; r < R; ++r) std::memcpy(out + r * out_stride, lane + r * kSlots, kSlots * sizeof(lane[0]));
}

// Takes a vector of slots at a time, so that the keys are still in the cache for the next rows.
template <class D, int R>
void dot_rows(const typename Operands<D>::Unit* a, int64_t a_stride, const typename D::Storage* cache, TileRows tile,
              int64_t steps, typename D::Acc* out, int64_t out_stride, int64_t rows) {
  for (; rows >= R; rows -= R, a += R * a_stride, out += R * out_stride, tile.next = nullptr) {
    for (int s = 0; s < kLanes<D>; s += kLanes<D> / R) {
      dot_tile<D, R>(a, a_stride, cache, tile.from(s), steps, out + s, out_stride);
    }
  }
  if constexpr (R > 1) {
    if (rows > 0) dot_rows<D, R / 2>(a, a_stride, cache, tile, steps, out, out_stride, rows);
  }
}

}  // namespace
}  // namespace rrt::kv_cache
