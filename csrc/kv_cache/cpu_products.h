// The two products of attention, for cpu_kernels.cpp and under its rules (see simd.h): tiles of accumulators in
// registers, whatever lies behind the operands.
#pragma once

#include "simd.h"

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace rrt::kv_cache {
namespace {

using U16Full = Register<uint16_t>::Type;

// Shuffles of vectors of 2 to 32 lanes.
template <int... I>
struct Lanes {};
template <int N>
struct AllLanes;
template <>
struct AllLanes<2> {
  using Type = Lanes<0, 1>;
};
template <>
struct AllLanes<4> {
  using Type = Lanes<0, 1, 2, 3>;
};
template <>
struct AllLanes<8> {
  using Type = Lanes<0, 1, 2, 3, 4, 5, 6, 7>;
};
template <>
struct AllLanes<16> {
  using Type = Lanes<0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15>;
};
template <>
struct AllLanes<32> {
  using Type = Lanes<0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26,
                     27, 28, 29, 30, 31>;
};
template <class V>
constexpr int kNumLanes = sizeof(V) / sizeof(V{}[0]);

// low: a0 b0 a1 b1 ... of the first halves; high: of the second halves.
template <class V, int... I>
inline void zip(V a, V b, V& low, V& high, Lanes<I...>) {
  constexpr int n = sizeof...(I);
#if defined(__clang__) || __GNUC__ >= 12
  low = __builtin_shufflevector(a, b, (I / 2 + I % 2 * n)...);
  high = __builtin_shufflevector(a, b, (n / 2 + I / 2 + I % 2 * n)...);
#else
  using Mask = decltype(a < b);
  low = __builtin_shuffle(a, b, Mask{(I / 2 + I % 2 * n)...});
  high = __builtin_shuffle(a, b, Mask{(n / 2 + I / 2 + I % 2 * n)...});
#endif
}

template <class V>
inline void zip(V a, V b, V& low, V& high) {
  zip(a, b, low, high, typename AllLanes<kNumLanes<V>>::Type{});
}

// Perfect shuffles, as many as the lanes' number has bits, exchange rows and columns.
template <class V>
inline void transpose(V (&rows)[kNumLanes<V>]) {
  constexpr int n = kNumLanes<V>;
  for (int stage = 1; stage < n; stage *= 2) {
    V next[n];
    for (int i = 0; i < n / 2; ++i) zip(rows[i], rows[i + n / 2], next[2 * i], next[2 * i + 1]);
    for (int i = 0; i < n; ++i) rows[i] = next[i];
  }
}

template <class V, class F>
inline auto reduce_lanes(V v, F f) {
  constexpr int n = kNumLanes<V>;
  decltype(v[0] + v[0]) lane[n];
  std::memcpy(lane, &v, sizeof(v));
  for (int half = n / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lane[i] = f(lane[i], lane[i + half]);
  }
  return lane[0];
}

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

// The operands of a product: units of kPair elements that are multiplied and added in one step.
template <class D>
struct Operands {
  using Unit = typename D::Acc;
  using Vec = typename D::Vec;
  static constexpr int kPair = 1;
  static Vec load_units(const typename D::Storage* from) { return D::widen(from); }
  static Vec same(Unit unit) { return Vec{} + unit; }
  static void multiply_add(Vec& acc, Vec a, Vec b) { acc += a * b; }
  static Unit narrow_unit(const typename D::Acc* from) { return *from; }
};

#ifdef __AVX512BF16__
// Pairs of bfloat16, multiplied as such and added in float.
template <>
struct Operands<BFloat16> {
  using Unit = uint32_t;
  using Vec = U32;
  static constexpr int kPair = 2;
  static Vec load_units(const uint16_t* from) { return load<Vec>(from); }
  static Vec same(Unit unit) { return Vec{} + unit; }
  static void multiply_add(F32& acc, Vec a, Vec b) {
    acc = (F32)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
  }
  static Unit narrow_unit(const float* from) {
    return BFloat16::narrow(from[0]) | static_cast<uint32_t>(BFloat16::narrow(from[1])) << 16;
  }
};
#endif

template <class D>
constexpr int kPair = Operands<D>::kPair;

// The right operand of a product, laid out by units: [units of k, stride].
template <class D>
struct Staged {
  const typename Operands<D>::Unit* units;
  int64_t stride;

  template <int C>
  void load_columns(int64_t k, int64_t column, typename Operands<D>::Vec (&to)[C]) const {
    for (int c = 0; c < C; ++c) {
      to[c] = load<typename Operands<D>::Vec>(units + k * stride + column + c * kLanes<D>);
    }
  }
  Staged without_prefetch() const { return *this; }
};

// Where the slots of a tile lie in a cache, and those of the next tile, to be fetched meanwhile; null: none.
struct TileRows {
  const int64_t* offsets;
  const int64_t* next;

  TileRows from(int64_t slot) const { return {offsets + slot, next != nullptr ? next + slot : nullptr}; }
  // Into the second-level cache: a tile is larger than the first.
  template <class Storage>
  void prefetch(const Storage* cache, int64_t slot, int64_t element) const {
    if (next != nullptr) __builtin_prefetch(cache + next[slot] + element, 0, 2);
  }
};

// The same, read where it lies in a cache; kPair slots make a row of units.
template <class D>
struct Direct {
  const typename D::Storage* cache;
  TileRows rows;

  template <int C>
  void load_columns(int64_t k, int64_t column, typename Operands<D>::Vec (&to)[C]) const {
    constexpr int lanes = kLanes<D>;
    if constexpr (kPair<D> == 1) {
      for (int c = 0; c < C; ++c) {
        to[c] = D::widen(cache + rows.offsets[k] + column + c * lanes);
        rows.prefetch(cache, k, column + c * lanes);
      }
    } else {
      static_assert(C % 2 == 0);
      for (int c = 0; c < C; c += 2) {
        U16Full pair[2], low, high;
        for (int i = 0; i < 2; ++i) {
          pair[i] = load<U16Full>(cache + rows.offsets[2 * k + i] + column + c * lanes);
          rows.prefetch(cache, 2 * k + i, column + c * lanes);
        }
        zip(pair[0], pair[1], low, high);
        to[c] = (typename Operands<D>::Vec)low;
        to[c + 1] = (typename Operands<D>::Vec)high;
      }
    }
  }
  Direct without_prefetch() const { return {cache, {rows.offsets, nullptr}}; }
};

// out[r][c] (+)= sum over k of a[r][k] b[k][c], for R rows and C vectors of columns from `column` on. `count`
// elements are `count / kPair` units of k, and the first half of one more if it is odd. Every sum runs in the order
// of k, however it is tiled.
template <class D, int R, int C, bool ADD, class B>
inline void multiply_tile(const typename Operands<D>::Unit* a, int64_t a_stride, const B& b, int64_t count,
                          typename D::Acc* out, int64_t out_stride, int64_t column) {
  using Op = Operands<D>;
  constexpr int lanes = kLanes<D>;
  typename D::Vec acc[R][C] = {};
  if (ADD) {
    for (int r = 0; r < R; ++r) {
      for (int c = 0; c < C; ++c) acc[r][c] = load<typename D::Vec>(out + r * out_stride + column + c * lanes);
    }
  }
  typename Op::Vec bv[C];
  int64_t k = 0;
  for (; k < count / kPair<D>; ++k) {
    b.load_columns(k, column, bv);
    for (int r = 0; r < R; ++r) {
      const auto av = Op::same(a[r * a_stride + k]);
      for (int c = 0; c < C; ++c) Op::multiply_add(acc[r][c], av, bv[c]);
    }
  }
  if constexpr (kPair<D> == 2) {
    if (count % 2 == 1) {
      b.load_columns(k, column, bv);
      for (int r = 0; r < R; ++r) {
        const auto av = Op::same(a[r * a_stride + k]);
        for (int c = 0; c < C; ++c) Op::multiply_add(acc[r][c], av, bv[c] & 0xffff);
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < C; ++c) {
      std::memcpy(out + r * out_stride + column + c * lanes, &acc[r][c], sizeof(acc[r][c]));
    }
  }
}

// `columns` is a multiple of kPair vectors.
template <class D, int R, int C, bool ADD, class B>
inline void multiply_columns(const typename Operands<D>::Unit* a, int64_t a_stride, const B& b, int64_t count,
                             typename D::Acc* out, int64_t out_stride, int64_t column, int64_t columns) {
  constexpr int width = C * kLanes<D>;
  for (; column + width <= columns; column += width) {
    multiply_tile<D, R, C, ADD>(a, a_stride, b, count, out, out_stride, column);
  }
  if constexpr (C > kPair<D>) {
    if (column < columns) {
      multiply_columns<D, R, C / 2, ADD>(a, a_stride, b, count, out, out_stride, column, columns);
    }
  }
}

// Accumulators of a tile: half of the registers.
constexpr int kTileVectors = RRT_VECTOR_BYTES == 64 ? 16 : 8;

template <class D, int R, bool ADD, class B>
void multiply_rows(const typename Operands<D>::Unit* a, int64_t a_stride, const B& b, int64_t count,
                   typename D::Acc* out, int64_t out_stride, int64_t rows, int64_t columns) {
  if (rows >= R) {
    multiply_columns<D, R, kTileVectors / R, ADD>(a, a_stride, b, count, out, out_stride, 0, columns);
    rows -= R;
    a += R * a_stride;
    out += R * out_stride;
    const B again = b.without_prefetch();
    for (; rows >= R; rows -= R, a += R * a_stride, out += R * out_stride) {
      multiply_columns<D, R, kTileVectors / R, ADD>(a, a_stride, again, count, out, out_stride, 0, columns);
    }
    if constexpr (R > 1) {
      if (rows > 0) multiply_rows<D, R / 2, ADD>(a, a_stride, again, count, out, out_stride, rows, columns);
    }
  } else if constexpr (R > 1) {
    multiply_rows<D, R / 2, ADD>(a, a_stride, b, count, out, out_stride, rows, columns);
  }
}
constexpr int kMaxRows = kTileVectors / 2;

// out[r][s] = a[r] . slot s of the cache, for R rows and as many slots as make one vector of results. A row has
// `steps` vectors of units, with nothing left over.
template <class D, int R>
inline void dot_tile(const typename Operands<D>::Unit* a, int64_t a_stride, const typename D::Storage* cache,
                     const TileRows& tile, int64_t steps, typename D::Acc* out, int64_t out_stride) {
  using Op = Operands<D>;
  constexpr int lanes = kLanes<D>;
  constexpr int slots = lanes / R;
  constexpr int stream = slots < 4 ? slots : 4;  // rows of the cache that are read side by side
  typename D::Vec acc[lanes] = {};
  for (int first = 0; first < slots; first += stream) {
    for (int64_t i = 0; i < steps; ++i) {
      typename Op::Vec kv[stream];
      for (int s = 0; s < stream; ++s) {
        kv[s] = Op::load_units(cache + tile.offsets[first + s] + i * lanes * kPair<D>);
        tile.prefetch(cache, first + s, i * lanes * kPair<D>);
      }
      for (int r = 0; r < R; ++r) {
        const auto av = load<typename Op::Vec>(a + r * a_stride + i * lanes);
        for (int s = 0; s < stream; ++s) Op::multiply_add(acc[r * slots + first + s], av, kv[s]);
      }
    }
  }
  const typename D::Vec sums = sum_each(acc);
  typename D::Acc lane[lanes];
  std::memcpy(lane, &sums, sizeof(sums));
  for (int r = 0; r < R; ++r) std::memcpy(out + r * out_stride, lane + r * slots, slots * sizeof(lane[0]));
}

// A vector of slots at a time, so that a key is still near for the next rows.
template <class D, int R>
void dot_rows(const typename Operands<D>::Unit* a, int64_t a_stride, const typename D::Storage* cache, TileRows tile,
              int64_t steps, typename D::Acc* out, int64_t out_stride, int64_t rows) {
  constexpr int lanes = kLanes<D>;
  for (; rows >= R; rows -= R, a += R * a_stride, out += R * out_stride, tile.next = nullptr) {
    for (int s = 0; s < lanes; s += lanes / R) {
      dot_tile<D, R>(a, a_stride, cache, tile.from(s), steps, out + s, out_stride);
    }
  }
  if constexpr (R > 1) {
    if (rows > 0) dot_rows<D, R / 2>(a, a_stride, cache, tile, steps, out, out_stride, rows);
  }
}

}  // namespace
}  // namespace rrt::kv_cache
