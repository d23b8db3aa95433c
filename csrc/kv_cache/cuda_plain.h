// Bodies of the CUDA kernels of loop_kv_write, and of attention for what the other kernels do not take: fp32 and
// fp64, other head dims. There a warp has one query head and goes through its slots one by one.
#pragma once

#include "kv_cache/cuda_attention.h"

namespace rrt::kv_cache {

constexpr int kMaxLaneColumns = 16;  // of a head, per lane

struct CudaWriteArgs {
  const void* k;  // [m, num_kv_heads, head_dim]; a head's elements are adjacent
  const void* v;
  int64_t k_row_stride, k_head_stride, v_row_stride, v_head_stride;
  void* k_cache;  // [num_slots, num_kv_heads, head_dim]
  void* v_cache;
  const int64_t* slots;  // [m]; one outside [0, num_slots) is skipped
  int64_t num_slots;
  CudaRope rope;
  int num_kv_heads, head_dim;
};

// Thread block (x: row).
template <class Number>
RRT_DEVICE void write_body(const CudaWriteArgs& args) {
  using Storage = typename Number::Storage;
  using Acc = typename Number::Acc;
  device::launch_dependents();
  device::dependency_wait();
  const int row = device::block_index().x;
  const int64_t slot = device::load_global(args.slots + row);
  if (slot < 0 || slot >= args.num_slots) return;
  const int64_t to = slot * args.num_kv_heads * args.head_dim;
  for (int i = device::thread_index(); i < args.num_kv_heads * args.head_dim; i += kThreads) {
    const int head = i / args.head_dim, column = i % args.head_dim;
    const Storage* k = static_cast<const Storage*>(args.k) + row * args.k_row_stride + head * args.k_head_stride;
    const Storage* v = static_cast<const Storage*>(args.v) + row * args.v_row_stride + head * args.v_head_stride;
    const Acc key =
        rotated<Acc>(args.rope, row, column, [&](int j) { return Number::widen(device::load_global(k + j)); });
    device::store_global(static_cast<Storage*>(args.k_cache) + to + i, Number::narrow(key));
    device::store_global(static_cast<Storage*>(args.v_cache) + to + i, device::load_global(v + column));
  }
}

// Thread block (x: 4 pairs of query and query head, one per warp).
template <class Number>
RRT_DEVICE void plain_attention_body(const CudaAttentionArgs& args) {
  using Storage = typename Number::Storage;
  using Acc = typename Number::Acc;
  device::dependency_wait();
  const int lane = device::thread_index() % 32;
  const int64_t unit = static_cast<int64_t>(device::block_index().x) * kWarps + device::thread_index() / 32;
  if (unit >= static_cast<int64_t>(args.num_queries) * args.num_heads) return;
  const int query = static_cast<int>(unit / args.num_heads), head = static_cast<int>(unit % args.num_heads);
  int sequence = query, limit;
  if (args.query_start == nullptr) {
    limit = device::load_global(args.context_lens + query);
  } else {
    sequence = 0;
    while (device::load_global(args.query_start + sequence + 1) <= query) ++sequence;
    limit = device::load_global(args.context_lens + sequence) -
            (device::load_global(args.query_start + sequence + 1) - query) + 1;
  }
  const int kv_head = args.group.divide(head);
  // Of a slot: its keys or values.
  const auto at_slot = [&](const void* cache, int64_t slot) {
    return static_cast<const Storage*>(cache) + (slot * args.num_kv_heads + kv_head) * args.head_dim;
  };
  const Storage* from = static_cast<const Storage*>(args.q) + query * args.q_row_stride + head * args.q_head_stride;
  Acc q[kMaxLaneColumns], sums[kMaxLaneColumns];
#pragma unroll
  for (int i = 0; i < kMaxLaneColumns; ++i) {
    const int column = lane + 32 * i;
    q[i] = 0;
    if (column < args.head_dim && limit > 0) {
      q[i] =
          rotated<Acc>(args.rope, query, column, [&](int j) { return Number::widen(device::load_global(from + j)); });
    }
    sums[i] = 0;
  }
  const int32_t* table = block_table(args, sequence);
  Acc largest = static_cast<Acc>(-1e30), weights = 0;
  for (int slot = 0; slot < limit; ++slot) {
    const int64_t at = slot_on<int64_t>(args, load_page(args, table, slot), slot);
    const Storage* k = at_slot(args.k_cache, at);
    const Storage* v = at_slot(args.v_cache, at);
    Acc score = 0;
#pragma unroll
    for (int i = 0; i < kMaxLaneColumns; ++i) {
      const int column = lane + 32 * i;
      if (at >= 0 && column < args.head_dim) score += q[i] * Number::widen(device::load_global(k + column));
    }
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) score += device::shuffle_xor(score, mask);
    score = at < 0 ? static_cast<Acc>(NAN) : score * static_cast<Acc>(args.scale * 1.44269504088896340736);
    const Acc next = score > largest ? score : largest;
    const Acc shrink = device::exp2(largest - next), weight = device::exp2(score - next);
    largest = next;
    weights = weights * shrink + weight;
#pragma unroll
    for (int i = 0; i < kMaxLaneColumns; ++i) {
      const int column = lane + 32 * i;
      sums[i] *= shrink;
      if (at >= 0 && column < args.head_dim) sums[i] += weight * Number::widen(device::load_global(v + column));
    }
  }
  Storage* to = static_cast<Storage*>(args.out) + unit * args.head_dim;
#pragma unroll
  for (int i = 0; i < kMaxLaneColumns; ++i) {
    const int column = lane + 32 * i;
    if (column < args.head_dim) {
      device::store_global(to + column, Number::narrow(limit > 0 ? sums[i] / weights : static_cast<Acc>(0)));
    }
  }
}

}  // namespace rrt::kv_cache
