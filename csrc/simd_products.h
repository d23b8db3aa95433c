// Products of small matrices, exponentials, and stores of results, for the per-instruction-set files and under their rules (see simd.h).
// Tiles of accumulators stay in registers, wherever the operands come from.
#pragma once

#include <type_traits>

#include "simd.h"

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif
#ifdef RRT_TILES
#include "tiles/primitives.h"
#endif

// Products of bfloat16 take pairs: where there is an instruction for them, and for tiles.
#if defined(__AVX512BF16__) || defined(RRT_TILES)
#define RRT_BF16_PAIRS
#endif

namespace rrt {
namespace {

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

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
  constexpr int kCount = sizeof...(I);
#if defined(__clang__) || __GNUC__ >= 12
  low = __builtin_shufflevector(a, b, (I / 2 + I % 2 * kCount)...);
  high = __builtin_shufflevector(a, b, (kCount / 2 + I / 2 + I % 2 * kCount)...);
#else
  using Mask = decltype(a < b);
  low = __builtin_shuffle(a, b, Mask{(I / 2 + I % 2 * kCount)...});
  high = __builtin_shuffle(a, b, Mask{(kCount / 2 + I / 2 + I % 2 * kCount)...});
#endif
}

template <class V>
inline void zip(V a, V b, V& low, V& high) {
  zip(a, b, low, high, typename AllLanes<kNumLanes<V>>::Type{});
}

// Perfect shuffles, as many as the lanes' number has bits, exchange rows and columns.
template <class V>
inline void transpose(V (&rows)[kNumLanes<V>]) {
  constexpr int kCount = kNumLanes<V>;
  for (int stage = 1; stage < kCount; stage *= 2) {
    V next[kCount];
    for (int i = 0; i < kCount / 2; ++i) zip(rows[i], rows[i + kCount / 2], next[2 * i], next[2 * i + 1]);
    for (int i = 0; i < kCount; ++i) rows[i] = next[i];
  }
}

template <class V, class F>
inline auto reduce_lanes(V v, F f) {
  constexpr int kCount = kNumLanes<V>;
  decltype(v[0] + v[0]) lane[kCount];
  std::memcpy(lane, &v, sizeof(v));
  for (int half = kCount / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lane[i] = f(lane[i], lane[i + half]);
  }
  return lane[0];
}

// The operands of a product: units of kPair elements that are multiplied and added in one step.
// `broadcast` subtracts zeros because adding them, as `same` does for multiply_tile, takes an instruction: it makes 0 of -0.
template <class D>
struct Operands {
  using Unit = typename D::Acc;
  using Vec = typename D::Vec;
  static constexpr int kPair = 1;
  static Vec load_units(const typename D::Storage* from) { return D::widen(from); }
  static Vec broadcast(Unit unit) { return unit - Vec{}; }
  static Vec same(Unit unit) { return Vec{} + unit; }
  static void multiply_add(Vec& acc, Vec a, Vec b) { acc += a * b; }
  static Unit narrow_unit(const typename D::Acc* from) { return *from; }
};

#ifdef RRT_BF16_PAIRS
// Pairs of bfloat16, multiplied as such and added in float.
template <>
struct Operands<BFloat16> {
  using Unit = uint32_t;
  using Vec = U32;
  static constexpr int kPair = 2;
  static Vec load_units(const uint16_t* from) { return load<Vec>(from); }
  static Vec broadcast(Unit unit) { return unit - Vec{}; }
  static Vec same(Unit unit) { return Vec{} + unit; }
#ifdef __AVX512BF16__
  static void multiply_add(F32& acc, Vec a, Vec b) {
    acc = (F32)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
  }
  static U16 narrow(F32 value) { return bit_cast<U16>(_mm512_cvtneps_pbh((__m512)value)); }
  // Pairs of a lane of each.
  static Vec narrow_pairs(F32 first, F32 second) {
    const U16Full order = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                           8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i halves = bit_cast<__m512i>(_mm512_cvtne2ps_pbh((__m512)second, (__m512)first));
    return (Vec)_mm512_permutexvar_epi16((__m512i)order, halves);
  }
#else
  // Beside emulated tiles.
  static void multiply_add(F32& acc, Vec a, Vec b) {
    acc += bit_cast<F32>(a & 0xffff0000u) * bit_cast<F32>(b & 0xffff0000u);
    acc += bit_cast<F32>(a << 16) * bit_cast<F32>(b << 16);
  }
  static U16 narrow(F32 value) {
    U16 narrow;
    for (int i = 0; i < kNumLanes<F32>; ++i) narrow[i] = BFloat16::narrow(value[i]);
    return narrow;
  }
  static Vec narrow_pairs(F32 first, F32 second) {
    return __builtin_convertvector(narrow(first), Vec) | __builtin_convertvector(narrow(second), Vec) << 16;
  }
#endif
  static Unit narrow_unit(const float* from) {
    return BFloat16::narrow(from[0]) | static_cast<uint32_t>(BFloat16::narrow(from[1])) << 16;
  }
};
#endif

// Whether products of the dtype run on tiles (AMX). Their sums have another order than those of vectors, so where a
// row's bits may not depend on its batch, all of an operator's products do, however few the rows.
template <class D>
#ifdef RRT_TILES
constexpr bool kOnTiles = std::is_same_v<D, BFloat16>;
#else
constexpr bool kOnTiles = false;
#endif

// A function that multiplies on tiles has one of these while it does; without effect if it is made with false.
struct NoRegisters {
  explicit NoRegisters(bool = true) {}
};
template <class D>
#ifdef RRT_TILES
using TileRegisters = std::conditional_t<kOnTiles<D>, tiles::Registers, NoRegisters>;
#else
using TileRegisters = NoRegisters;
#endif

template <class D>
constexpr int kPair = Operands<D>::kPair;
template <class D>
constexpr int kUnitLanes = kLanes<D> * kPair<D>;  // elements of a vector of units

// The vector as the dtype stores it.
template <class D>
inline auto narrowed(typename D::Vec value) {
  if constexpr (std::is_same_v<typename D::Storage, typename D::Acc>) {
    return value;
  } else if constexpr (kPair<D> == 2) {
    return Operands<D>::narrow(value);
  } else if constexpr (std::is_same_v<D, BFloat16>) {
    // As BFloat16::narrow.
    const U32 bits = bit_cast<U32>(value);
    const U32 nearest = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return __builtin_convertvector(value == value ? nearest : U32{} + 0x7fc0, U16);
  } else {
#if RRT_VECTOR_BYTES == 64
    return bit_cast<U16>(_mm512_maskz_cvtps_ph(0xffff, (__m512)value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif RRT_VECTOR_BYTES == 32
    return bit_cast<U16>(_mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
    U16 narrow;
    for (int i = 0; i < kLanes<D>; ++i) narrow[i] = D::narrow(value[i]);
    return narrow;
#endif
  }
}

// Stores as many of its lanes as there are among the `left` elements from here on.
template <class D>
inline void write(typename D::Vec value, typename D::Storage* to, int64_t left) {
  const auto narrow = narrowed<D>(value);
  if (left >= kLanes<D>) {
    std::memcpy(to, &narrow, sizeof(narrow));
  } else {
    std::memcpy(to, &narrow, left * sizeof(*to));
  }
}

// The vector as it comes back from being stored.
template <class D>
inline typename D::Vec rounded(typename D::Vec value) {
  const auto narrow = narrowed<D>(value);
  if constexpr (std::is_same_v<D, BFloat16>) {
    return D::widen(narrow);
  } else {
    typename D::Storage stored[kLanes<D>];
    std::memcpy(stored, &narrow, sizeof(stored));
    return D::widen(stored);
  }
}

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

// A right operand whose products run on tiles if the dtype's do; then they have the numbers that multiply_on_tiles asks
// for.
template <class D>
struct TileBlocks : Staged<D> {};
template <class D>
using Blocks = std::conditional_t<kOnTiles<D>, TileBlocks<D>, Staged<D>>;

// out[r][c] (+)= sum over k of a[r][k] b[k][c], two tiles of rows by two of columns at a time. `columns` and `count` are
// multiples of 32. Sums run in the order of k, 32 elements in an instruction. Of the 16 rows of a's last tile, those
// that are not there are read all the same, and dropped.
template <bool ADD>
void multiply_on_tiles(const uint32_t* a, int64_t a_stride, const Staged<BFloat16>& b, int64_t count, float* out,
                       int64_t out_stride, int64_t rows, int64_t columns);

// out[r][c] (+)= sum over k of a[r][k] b[k][c], for R rows and C vectors of columns from `column` on. `count`
// elements are `count / kPair` units of k, and the first half of one more if it is odd. Every sum runs in the order
// of k, however it is tiled.
template <class D, int R, int C, bool ADD, class B>
inline void multiply_tile(const typename Operands<D>::Unit* a, int64_t a_stride, const B& b, int64_t count,
                          typename D::Acc* out, int64_t out_stride, int64_t column) {
  using Op = Operands<D>;
  typename D::Vec acc[R][C] = {};
  if (ADD) {
    for (int r = 0; r < R; ++r) {
      for (int c = 0; c < C; ++c) acc[r][c] = load<typename D::Vec>(out + r * out_stride + column + c * kLanes<D>);
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
      std::memcpy(out + r * out_stride + column + c * kLanes<D>, &acc[r][c], sizeof(acc[r][c]));
    }
  }
}

// `columns` is a multiple of kPair vectors.
template <class D, int R, int C, bool ADD, class B>
inline void multiply_columns(const typename Operands<D>::Unit* a, int64_t a_stride, const B& b, int64_t count,
                             typename D::Acc* out, int64_t out_stride, int64_t column, int64_t columns) {
  constexpr int kWidth = C * kLanes<D>;
  for (; column + kWidth <= columns; column += kWidth) {
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
  if constexpr (kOnTiles<D> && std::is_same_v<B, Blocks<D>>) {
    multiply_on_tiles<ADD>(a, a_stride, b, count, out, out_stride, rows, columns);
  } else if (rows >= R) {
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

#ifdef RRT_TILES
// The sums of two tiles side by side, `rows` rows of 32 columns. Those that are not there are held beside the matrix,
// where others' may lie; at most 16 are.
class TileSums {
 public:
  TileSums(float* at, int64_t stride, int64_t rows) : at_(at), stride_(stride), rows_(rows) {}

  template <int FIRST, int SECOND>
  void load() {
    for (int64_t row = 0; is_partial() && row < rows_; ++row) {
      std::memcpy(copy_[row], at_ + row * stride_, sizeof(copy_[row]));
    }
    tiles::load<FIRST>(base(), bytes());
    tiles::load<SECOND>(base() + tiles::kRows, bytes());
  }

  template <int FIRST, int SECOND>
  void store() {
    tiles::store<FIRST>(base(), bytes());
    tiles::store<SECOND>(base() + tiles::kRows, bytes());
    for (int64_t row = 0; is_partial() && row < rows_; ++row) {
      std::memcpy(at_ + row * stride_, copy_[row], sizeof(copy_[row]));
    }
  }

 private:
  bool is_partial() const { return rows_ < tiles::kRows; }
  float* base() { return is_partial() ? copy_[0] : at_; }
  int64_t bytes() const { return (is_partial() ? 2 * tiles::kRows : stride_) * sizeof(float); }

  float* at_;
  int64_t stride_;
  int64_t rows_;
  alignas(64) float copy_[tiles::kRows][2 * tiles::kRows];
};

template <bool ADD>
void multiply_on_tiles(const uint32_t* a, int64_t a_stride, const Staged<BFloat16>& b, int64_t count, float* out,
                       int64_t out_stride, int64_t rows, int64_t columns) {
  constexpr int64_t kSide = tiles::kRows;
  const int64_t a_bytes = a_stride * sizeof(*a), b_bytes = b.stride * sizeof(*b.units);
  for (int64_t row = 0; row < rows; row += 2 * kSide) {
    const bool both = rows - row > kSide;
    for (int64_t column = 0; column < columns; column += 2 * kSide) {
      TileSums upper(out + row * out_stride + column, out_stride, rows - row);
      TileSums lower(out + (row + kSide) * out_stride + column, out_stride, rows - row - kSide);
      if constexpr (ADD) {
        upper.load<0, 1>();
        if (both) lower.load<2, 3>();
      } else {
        tiles::zero<0>();
        tiles::zero<1>();
        tiles::zero<2>();
        tiles::zero<3>();
      }
      for (int64_t k = 0; k < count / 2; k += kSide) {
        tiles::load<6>(b.units + k * b.stride + column, b_bytes);
        tiles::load<7>(b.units + k * b.stride + column + kSide, b_bytes);
        tiles::load<4>(a + row * a_stride + k, a_bytes);
        tiles::multiply_add_bf16<0, 4, 6>();
        tiles::multiply_add_bf16<1, 4, 7>();
        if (!both) continue;
        tiles::load<5>(a + (row + kSide) * a_stride + k, a_bytes);
        tiles::multiply_add_bf16<2, 5, 6>();
        tiles::multiply_add_bf16<3, 5, 7>();
      }
      upper.store<0, 1>();
      if (both) lower.store<2, 3>();
    }
  }
}
#endif

// e^x for x <= 0 (or NaN), to about 1e-7; 0 below e^-86, where floats end.
inline F32 exp_negative(F32 x) {
  const F32 least = F32{} - 86.0f;
  const F32 bounded = x < least ? least : x;
  // Adding 1.5 * 2^23 rounds to an integer n, which is then in the low bits; e^x = 2^n e^r with |r| <= log(2) / 2.
  const F32 shifted = bounded * 1.44269504f + 12582912.0f;
  const F32 n = shifted - 12582912.0f;
  const F32 r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;
  F32 p = r * (1.0f / 5040) + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const F32 scaled = bit_cast<F32>(bit_cast<U32>(p) + (bit_cast<U32>(shifted) << 23));
  // NaN as it came: the sum with `shifted` may have made a number of it.
  return x >= least ? scaled : (x < least ? F32{} : x);
}

inline F64 exp_negative(F64 x) {
  for (int i = 0; i < kNumLanes<F64>; ++i) x[i] = __builtin_exp(x[i]);
  return x;
}

#ifdef __AVX512BF16__
// e^x for x <= 100 (or NaN), to about 2e-7 and the rounding of x; 0 below e^-104. It takes half of the instructions,
// and is for what is computed from bfloat16.
inline F32 exp_short(F32 x) {
  // With masks because the plain ones make GCC 12 warn of its own header. Of its operands vmaxps returns the second if
  // one is NaN.
  const __m512 power = _mm512_maskz_max_ps(0xffff, _mm512_set1_ps(-160.0f), (__m512)(x * 1.44269504f));
  const __m512 n = _mm512_maskz_roundscale_ps(0xffff, power, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const F32 r = (F32)power - (F32)n;
  // 2^r for |r| <= 1/2, with the least largest error of those that are 1 at 0.
  F32 p = r * 0.00132647273f + 0.00967151299f;
  p = p * r + 0.0555073358f;
  p = p * r + 0.240222424f;
  p = p * r + 0.693147004f;
  p = p * r + 1.0f;
  return (F32)_mm512_maskz_scalef_ps(0xffff, (__m512)p, n);
}
#endif

// e^x for x <= 0 of numbers that are computed from the dtype.
template <class D>
inline typename D::Vec exp_for(typename D::Vec x) {
#ifdef __AVX512BF16__
  if constexpr (std::is_same_v<D, BFloat16>) return exp_short(x);
#endif
  return exp_negative(x);
}

template <class D>
inline typename D::Acc exp_one(typename D::Acc x) {
  return exp_negative(typename D::Vec{} + x)[0];
}

// Whether any lane of a comparison holds.
template <class V>
inline bool any(V comparison) {
#if RRT_VECTOR_BYTES == 64
  return _mm512_test_epi64_mask((__m512i)comparison, (__m512i)comparison) != 0;
#else
  uint64_t words[sizeof(V) / sizeof(uint64_t)], all = 0;
  std::memcpy(words, &comparison, sizeof(words));
  for (const uint64_t word : words) all |= word;
  return all != 0;
#endif
}

template <class Acc>
constexpr Acc kLowest = sizeof(Acc) == 4 ? static_cast<Acc>(-__FLT_MAX__) : static_cast<Acc>(-__DBL_MAX__);

// Below the lowest number: a softmax whose largest begins as that gives it no weight, even if it is all there is.
template <class Acc>
constexpr Acc kUnseen = static_cast<Acc>(-__builtin_inf());

}  // namespace
}  // namespace rrt
