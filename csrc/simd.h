// Vectors of the instruction set that a file is compiled for, and the storage dtypes as them. Included by the
// per-instruction-set files alone (*/cpu_kernels.cpp), which CMakeLists.txt compiles once for each:
// RRT_VECTOR_BYTES is the registers' size, RRT_KERNELS the name of the file's table.
//
// Those files must not emit shared inline functions (std::vector's, say): the linker keeps one copy of those,
// and a copy with AVX-512 in it would crash an older CPU. Hence the unnamed namespace, and plain data only.
#pragma once

#include <cstdint>
#include <cstring>
#if RRT_VECTOR_BYTES > 16
#include <immintrin.h>
#endif

namespace rrt {
namespace {

template <class T, int BYTES = RRT_VECTOR_BYTES>
struct Register {
  typedef T Type __attribute__((vector_size(BYTES)));
};
using F32 = Register<float>::Type;
using F64 = Register<double>::Type;
using U32 = Register<uint32_t>::Type;
using U16 = Register<uint16_t, RRT_VECTOR_BYTES / 2>::Type;

template <class V, class T>
inline V load(const T* from) {
  V v;
  std::memcpy(&v, from, sizeof(V));
  return v;
}

template <class To, class From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

struct Float32 {
  using Storage = float;
  using Acc = float;
  using Vec = F32;
  static Vec widen(const Storage* from) { return load<Vec>(from); }
  static Storage narrow(Acc value) { return value; }
};

struct Float64 {
  using Storage = double;
  using Acc = double;
  using Vec = F64;
  static Vec widen(const Storage* from) { return load<Vec>(from); }
  static Storage narrow(Acc value) { return value; }
};

struct BFloat16 {
  using Storage = uint16_t;
  using Acc = float;
  using Vec = F32;
  static Vec widen(const Storage* from) { return widen(load<U16>(from)); }
  static Vec widen(U16 values) {
#if RRT_VECTOR_BYTES == 64
    // (as below)
    return bit_cast<Vec>((U32)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)values) << 16);
#else
    return bit_cast<Vec>(__builtin_convertvector(values, U32) << 16);
#endif
  }
  static Storage narrow(Acc value) {
    if (value != value) return 0x7fc0;
    const uint32_t bits = bit_cast<uint32_t>(value);
    return static_cast<Storage>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);  // to nearest, ties to even
  }
};

struct Float16 {
  using Storage = uint16_t;
  using Acc = float;
  using Vec = F32;
  static Vec widen(const Storage* from) {
#if RRT_VECTOR_BYTES == 64
    // (the plain one makes GCC 12 warn of its own header)
    return (Vec)_mm512_maskz_cvtph_ps(0xffff, (__m256i)load<U16>(from));
#elif RRT_VECTOR_BYTES == 32
    return (Vec)_mm256_cvtph_ps((__m128i)load<U16>(from));
#else
    const U32 half = __builtin_convertvector(load<U16>(from), U32);
    const U32 sign = (half & 0x8000) << 16;
    const U32 shifted = (half & 0x7fff) << 13;
    // Exponents are biased by 15 here and by 127 there. Subnormals get an implicit one too many, which
    // a subtraction takes off exactly; infinity and NaN keep the largest exponent.
    const U32 normal = shifted + (112u << 23);
    const U32 special = shifted + (224u << 23);
    const F32 subnormal = bit_cast<F32>(shifted + (113u << 23)) - 0x1p-14f;
    const U32 is_subnormal = (U32)(shifted < (1u << 23));
    const U32 is_special = (U32)(shifted >= (31u << 23));
    const U32 finite = (is_subnormal & bit_cast<U32>(subnormal)) | (~is_subnormal & normal);
    return bit_cast<Vec>(sign | (is_special & special) | (~is_special & finite));
#endif
  }
  static Storage narrow(Acc value) {
    const uint32_t bits = bit_cast<uint32_t>(value);
    const uint32_t sign = (bits >> 16) & 0x8000;
    const uint32_t magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return 0x7e00;
    if (magnitude >= 0x477ff000) return static_cast<Storage>(sign | 0x7c00);  // 65520 rounds to infinity
    if (magnitude < 0x38800000) {  // below 2^-14: the spacing of floats in [0.5, 1) is that of subnormals
      const float aligned = bit_cast<float>(magnitude) + 0.5f;
      return static_cast<Storage>(sign | (bit_cast<uint32_t>(aligned) - 0x3f000000));
    }
    const uint32_t rounded = magnitude + 0xfff + ((magnitude >> 13) & 1);
    return static_cast<Storage>(sign | ((rounded - (112u << 23)) >> 13));
  }
};

template <class D>
constexpr int kLanes = sizeof(typename D::Vec) / sizeof(typename D::Acc);

template <class D>
inline typename D::Acc widen_one(const typename D::Storage* from) {
  const typename D::Storage padded[kLanes<D>] = {*from};
  return D::widen(padded)[0];
}

}  // namespace
}  // namespace rrt
