// Gated activations, for the per-instruction-set files and under their rules (see simd.h).
#pragma once

#include "elementwise/launch.h"
#include "simd_products.h"

namespace rrt::elementwise {
namespace {

// 1 / (1 + e^-x), of whose exponential no large argument makes infinity.
template <class D>
inline typename D::Vec sigmoid(typename D::Vec x) {
#ifdef __AVX512BF16__
  // Beyond 89 the exponential is infinity, and its inverse 0.
  if constexpr (std::is_same_v<D, BFloat16>) return 1 / (1 + exp_short(x < -100 ? typename D::Vec{} + 100 : -x));
#endif
  const auto e = exp_negative(x < 0 ? x : -x);
  return (x < 0 ? e : typename D::Vec{} + 1) / (1 + e);
}

// Both activations are x sigmoid(z(x)): silu with z = x, and the tanh form of gelu with z = 2 sqrt(2 / pi) (x + a x^3).
constexpr double kGeluFactor = 1.5957691216057308, kGeluCube = 0.044715;

template <class D, Activation A>
inline typename D::Vec exponent(typename D::Vec x) {
  using Acc = typename D::Acc;
  if constexpr (A == Activation::kSilu) return x;
  return (x + x * x * x * static_cast<Acc>(kGeluCube)) * static_cast<Acc>(kGeluFactor);
}

template <class D, Activation A>
inline typename D::Vec exponent_slope(typename D::Vec x) {
  using Acc = typename D::Acc;
  if constexpr (A == Activation::kSilu) return typename D::Vec{} + 1;
  return (x * x * static_cast<Acc>(3 * kGeluCube) + 1) * static_cast<Acc>(kGeluFactor);
}

template <class D, Activation A>
inline typename D::Vec gated(typename D::Vec gate, typename D::Vec up) {
  return gate * sigmoid<D>(exponent<D, A>(gate)) * up;
}

}  // namespace
}  // namespace rrt::elementwise
