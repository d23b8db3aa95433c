// Integer division that rounds up. Static, for the per-instruction-set files (see simd.h).
#pragma once

#ifdef __CUDACC__
#define RRT_HOST_DEVICE __host__ __device__
#else
#define RRT_HOST_DEVICE
#endif

namespace rrt {

template <class A, class B>
static constexpr auto ceil_div(A a, B b) {
  return (a + b - 1) / b;
}

// The least multiple of b that is at least a.
template <class A, class B>
static constexpr auto round_up(A a, B b) {
  return ceil_div(a, b) * b;
}

// The same by a constant: kernels that got it as an argument would take more registers, though it is inlined.
template <auto B, class A>
RRT_HOST_DEVICE static constexpr auto ceil_div(A a) {
  return (a + B - 1) / B;
}

template <auto B, class A>
RRT_HOST_DEVICE static constexpr auto round_up(A a) {
  return (a + B - 1) / B * B;
}

}  // namespace rrt
