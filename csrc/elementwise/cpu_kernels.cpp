// Compiled once per instruction set: RRT_KERNELS names the table, RRT_VECTOR_BYTES is its registers' size.
//
// The operators between a layer's matrix products, in one pass over their operands, or two over a row. They compute in
// Acc and round when they store. The elements that do not fill a vector go through the same instructions, so that a
// result does not depend on where in a tensor an element lies.
#include "elementwise/cpu_kernels.h"

#include "elementwise/gate.h"
#include "simd_products.h"

namespace rrt::elementwise {
namespace {

// Of the `left` elements from here on, as many as a vector has; zeros behind them.
template <class D>
inline typename D::Vec read(const typename D::Storage* from, int64_t left) {
  if (left >= kLanes<D>) return D::widen(from);
  typename D::Storage padded[kLanes<D>] = {};
  std::memcpy(padded, from, left * sizeof(padded[0]));
  return D::widen(padded);
}

template <class D>
inline typename D::Acc sum_of(typename D::Vec value) {
  return reduce_lanes(value, [](typename D::Acc a, typename D::Acc b) { return a + b; });
}

template <class D>
void rotary(const RotaryParams& p, int64_t begin, int64_t end) {
  using Storage = typename D::Storage;
  for (int64_t token = begin; token < end; ++token) {
    const int64_t b = token / p.length, t = token % p.length, angles = b * p.angles_batch_stride + t * p.half;
    const Storage* cos = static_cast<const Storage*>(p.cos) + angles;
    const Storage* sin = static_cast<const Storage*>(p.sin) + angles;
    for (int64_t head = 0; head < p.num_heads; ++head) {
      const Storage* x =
          static_cast<const Storage*>(p.x) + b * p.batch_stride + t * p.token_stride + head * p.head_stride;
      Storage* out = static_cast<Storage*>(p.out) + (token * p.num_heads + head) * p.head_dim;
      for (int64_t i = 0; i < p.half; i += kLanes<D>) {
        const int64_t left = p.half - i;
        const auto first = read<D>(x + i, left), second = read<D>(x + p.half + i, left);
        const auto c = read<D>(cos + i, left), s = read<D>(sin + i, left);
        write<D>(first * c - second * s, out + i, left);
        write<D>(second * c + first * s, out + p.half + i, left);
      }
      std::memcpy(out + 2 * p.half, x + 2 * p.half, (p.head_dim - 2 * p.half) * sizeof(Storage));
    }
  }
}

template <class D>
void norm(const NormParams& p, int64_t begin, int64_t end) {
  using Acc = typename D::Acc;
  using Vec = typename D::Vec;
  using Storage = typename D::Storage;
  const auto* weight = static_cast<const Storage*>(p.weight);
  for (int64_t row = begin; row < end; ++row) {
    const Storage* x = static_cast<const Storage*>(p.x) + row * p.width;
    Storage* out = static_cast<Storage*>(p.out) + row * p.width;
    Vec squares = {};
    for (int64_t i = 0; i < p.width; i += kLanes<D>) {
      const Vec value = read<D>(x + i, p.width - i);
      squares += value * value;
    }
    const Acc mean = sum_of<D>(squares) / static_cast<Acc>(p.width);
    const auto scale = static_cast<Acc>(1 / __builtin_sqrt(mean + p.eps));
    static_cast<Acc*>(p.scale)[row] = scale;
    for (int64_t i = 0; i < p.width; i += kLanes<D>) {
      const int64_t left = p.width - i;
      const Vec normed = read<D>(x + i, left) * scale, w = read<D>(weight + i, left);
      write<D>(p.weight_plus_one ? normed * (w + 1) : rounded<D>(normed) * w, out + i, left);
    }
  }
}

template <class D>
void norm_backward(const NormBackwardParams& p, int64_t share, void* shares) {
  using Acc = typename D::Acc;
  using Vec = typename D::Vec;
  using Storage = typename D::Storage;
  const auto* weight = static_cast<const Storage*>(p.weight);
  const auto factor = [&](int64_t i) {
    const Vec w = read<D>(weight + i, p.width - i);
    return p.weight_plus_one ? w + 1 : w;
  };
  Acc* weight_share = static_cast<Acc*>(shares) + share * p.width;
  for (int64_t i = 0; i < p.width; ++i) weight_share[i] = 0;
  for (int64_t row = share * kShareRows; row < smaller(p.rows, (share + 1) * kShareRows); ++row) {
    const Storage* x = static_cast<const Storage*>(p.x) + row * p.width;
    const Storage* out_grad = static_cast<const Storage*>(p.out_grad) + row * p.width;
    Storage* x_grad = static_cast<Storage*>(p.x_grad) + row * p.width;
    const Acc scale = static_cast<const Acc*>(p.scale)[row];
    Vec along = {};
    for (int64_t i = 0; i < p.width; i += kLanes<D>) {
      const int64_t left = p.width - i;
      const Vec grad = read<D>(out_grad + i, left), normed = read<D>(x + i, left) * scale;
      along += grad * factor(i) * normed;
      const Vec product = grad * normed;
      if (left >= kLanes<D>) {
        const Vec sum = load<Vec>(weight_share + i) + product;
        std::memcpy(weight_share + i, &sum, sizeof(sum));
      } else {
        for (int64_t lane = 0; lane < left; ++lane) weight_share[i + lane] += product[lane];
      }
    }
    const Acc mean = sum_of<D>(along) / static_cast<Acc>(p.width);
    for (int64_t i = 0; i < p.width; i += kLanes<D>) {
      const int64_t left = p.width - i;
      const Vec grad = read<D>(out_grad + i, left), normed = read<D>(x + i, left) * scale;
      write<D>((grad * factor(i) - normed * mean) * scale, x_grad + i, left);
    }
  }
}

template <class D>
void sum_shares(const NormBackwardParams& p, const void* shares, int64_t begin, int64_t end) {
  using Acc = typename D::Acc;
  auto* to = static_cast<typename D::Storage*>(p.weight_grad);
  for (int64_t i = begin; i < end; ++i) {
    const Acc* from = static_cast<const Acc*>(shares) + i;
    Acc sum = 0;
    for (int64_t share = 0; share < shares_of(p.rows); ++share) sum += from[share * p.width];
    to[i] = D::narrow(sum);
  }
}

template <class D, Activation A>
void gate_as(const GateParams& p, int64_t begin, int64_t end) {
  using Storage = typename D::Storage;
  for (int64_t i = begin; i < end; i += kLanes<D>) {
    const int64_t left = end - i;
    const auto x = read<D>(static_cast<const Storage*>(p.gate) + i, left);
    const auto up = read<D>(static_cast<const Storage*>(p.up) + i, left);
    write<D>(gated<D, A>(x, up), static_cast<Storage*>(p.out) + i, left);
  }
}

template <class D, Activation A>
void gate_backward_as(const GateBackwardParams& p, int64_t begin, int64_t end) {
  using Storage = typename D::Storage;
  for (int64_t i = begin; i < end; i += kLanes<D>) {
    const int64_t left = end - i;
    const auto x = read<D>(static_cast<const Storage*>(p.gate) + i, left);
    const auto up = read<D>(static_cast<const Storage*>(p.up) + i, left);
    const auto grad = read<D>(static_cast<const Storage*>(p.out_grad) + i, left);
    const auto s = sigmoid<D>(exponent<D, A>(x));
    const auto slope = s + x * s * (1 - s) * exponent_slope<D, A>(x);
    write<D>(grad * up * slope, static_cast<Storage*>(p.gate_grad) + i, left);
    write<D>(grad * x * s, static_cast<Storage*>(p.up_grad) + i, left);
  }
}

template <class D>
void gate(const GateParams& p, int64_t begin, int64_t end) {
  if (p.activation == Activation::kSilu) {
    gate_as<D, Activation::kSilu>(p, begin, end);
  } else {
    gate_as<D, Activation::kGeluTanh>(p, begin, end);
  }
}

template <class D>
void gate_backward(const GateBackwardParams& p, int64_t begin, int64_t end) {
  if (p.activation == Activation::kSilu) {
    gate_backward_as<D, Activation::kSilu>(p, begin, end);
  } else {
    gate_backward_as<D, Activation::kGeluTanh>(p, begin, end);
  }
}

template <class D>
void add(const AddParams& p, int64_t begin, int64_t end) {
  using Storage = typename D::Storage;
  for (int64_t i = begin; i < end; i += kLanes<D>) {
    const int64_t left = end - i;
    const auto a = read<D>(static_cast<const Storage*>(p.a) + i, left);
    const auto b = read<D>(static_cast<const Storage*>(p.b) + i, left);
    write<D>(a + b, static_cast<Storage*>(p.out) + i, left);
  }
}

}  // namespace

const CpuKernels RRT_KERNELS = {
    {rotary<Float32>, rotary<Float64>, rotary<BFloat16>, rotary<Float16>},
    {norm<Float32>, norm<Float64>, norm<BFloat16>, norm<Float16>},
    {norm_backward<Float32>, norm_backward<Float64>, norm_backward<BFloat16>, norm_backward<Float16>},
    {sum_shares<Float32>, sum_shares<Float64>, sum_shares<BFloat16>, sum_shares<Float16>},
    {gate<Float32>, gate<Float64>, gate<BFloat16>, gate<Float16>},
    {gate_backward<Float32>, gate_backward<Float64>, gate_backward<BFloat16>, gate_backward<Float16>},
    {add<Float32>, add<Float64>, add<BFloat16>, add<Float16>},
};

}  // namespace rrt::elementwise
