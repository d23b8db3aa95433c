// The plain kernel's body, for fp32 and fp64 and for shapes that the decode kernels' 16-byte loads do not fit. A warp
// has one output, and its lanes share the columns; a weight is read once for kPlainTokens rows. As in the decode
// kernels, the order of a row's sums depends on the layer's shape alone, and shrink is launched before the product.
// cuda_decode.h explains the terms.
#pragma once

#include "loop_lora/cuda_decode.h"

namespace rrt::loop_lora {

constexpr int kPlainTokens = 8;
constexpr int kPlainRows = 8, kPlainThreads = 32 * kPlainRows;

// The lanes' sums, added pairwise: the same in every lane.
template <class Acc>
RRT_DEVICE Acc add_lanes(Acc sum) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) sum += device::shuffle_xor(sum, mask);
  return sum;
}

// Thread block (x: tile; y: loop, for shrink, which writes T in the accumulation type here).
template <class Number, bool SHRINK>
RRT_DEVICE void plain_body(const DecodeArgs& args) {
  using Storage = typename Number::Storage;
  using Acc = typename Number::Acc;
  const device::Index block = device::block_index();
  const int lane = device::thread_index() % 32;
  const int token_tiles = ceil_div<kPlainTokens>(args.m);
  const int row = block.x / token_tiles * kPlainRows + device::thread_index() / 32;
  const int token_begin = block.x % token_tiles * kPlainTokens;
  const int tokens = args.m - token_begin < kPlainTokens ? args.m - token_begin : kPlainTokens;
  device::dependency_wait();
  if (SHRINK) {
    device::launch_dependents();
    bool has_loop = false;
    for (int i = 0; i < tokens; ++i) has_loop |= device::load_global(args.loops + token_begin + i) == block.y;
    if (!has_loop) return;
  }
  if (row >= (SHRINK ? args.total_rank : args.n)) return;

  const Storage* x = static_cast<const Storage*>(args.x) + token_begin * args.x_stride;
  const Storage* weight = SHRINK ? static_cast<const Storage*>(args.lora_a) +
                                       (static_cast<int64_t>(block.y) * args.total_rank + row) * args.k
                                 : static_cast<const Storage*>(args.weight) + static_cast<int64_t>(row) * args.k;
  Acc sums[kPlainTokens] = {};
  for (int column = lane; column < args.k; column += 32) {
    const Acc w = Number::widen(device::load_global(weight + column));
#pragma unroll
    for (int token = 0; token < kPlainTokens; ++token) {
      if (token < tokens) sums[token] += w * Number::widen(device::load_global(x + token * args.x_stride + column));
    }
  }

  int segment = 0;
  while (!SHRINK && segment + 1 < args.num_segments && args.segment_out[segment + 1] <= row) ++segment;
#pragma unroll
  for (int token = 0; token < kPlainTokens; ++token) {
    if (token >= tokens) break;
    const int loop = device::load_global(args.loops + token_begin + token);
    const bool valid = 0 <= loop && loop < args.num_loops;
    if constexpr (SHRINK) {
      const Acc sum = add_lanes(sums[token]);
      Acc* t = static_cast<Acc*>(args.shrunk) +
                 (static_cast<int64_t>(block.y) * args.padded_m + token_begin + token) * args.total_rank + row;
      if (lane == 0 && loop == block.y) device::store_global(t, sum);
    } else {
      if (valid) {
        const Storage* b = static_cast<const Storage*>(args.lora_b) +
                           (static_cast<int64_t>(loop) * args.n + row) * args.b_stride;
        const Acc* t = static_cast<const Acc*>(args.shrunk) +
                         (static_cast<int64_t>(loop) * args.padded_m + token_begin + token) * args.total_rank +
                         args.segment_rank[segment];
        for (int r = lane; r < args.segment_size[segment]; r += 32) {
          sums[token] += Number::widen(device::load_global(b + r)) * device::load_global(t + r);
        }
      }
      Acc sum = add_lanes(sums[token]);
      if (lane != 0) continue;
      if (valid && args.bias != nullptr) {
        sum += Number::widen(
            device::load_global(static_cast<const Storage*>(args.bias) + loop * args.bias_loop_stride + row));
      }
      Storage* y = static_cast<Storage*>(args.y) + static_cast<int64_t>(token_begin + token) * args.n + row;
      device::store_global(y, Number::narrow(valid ? sum : static_cast<Acc>(NAN)));
    }
  }
}

}  // namespace rrt::loop_lora
