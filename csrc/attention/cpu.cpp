// Causal attention on the CPU: scratch memory, and parts of the work dealt out to threads.
#include <algorithm>
#include <atomic>
#include <cstring>

#include "arena.h"
#include "attention/cpu_kernels.h"

namespace rrt::attention {
namespace {

// Multiply-adds that are worth a thread.
constexpr int64_t kGrainWork = 1 << 16;
// Rows (queries x query heads of one key/value head) of a part of the forward: each lays out the keys before it.
constexpr int64_t kPartRows = 512;

const CpuKernels& kernels_for_this_cpu() { return choose_kernels<CpuKernels>(RRT_CPU_KERNELS); }

template <class Acc>
class ForwardMemory {
 public:
  explicit ForwardMemory(const Shape& shape) {
    const int64_t dim = padded_dim(shape), tile = dim * kTile, tiles = tiles_of(shape.length);
    const int64_t pair = kTile * kTile;
    const int64_t sizes[] = {tiles * tile, tiles * tile, tile, pair, pair, kTile, kTile, tile, tiles * kTile};
    for (int i = 0; i < kParts; ++i) parts_[i] = arena_.reserve<Acc>(sizes[i]);
    arena_.allocate();
  }
  ForwardScratch scratch() const {
    const auto at = [this](int part) -> void* { return arena_.at(parts_[part]); };
    return {at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7), at(8)};
  }

 private:
  static constexpr int kParts = 9;
  Arena arena_;
  int64_t parts_[kParts];
};

template <class Acc>
class BackwardMemory {
 public:
  explicit BackwardMemory(const Shape& shape) {
    const int64_t tiles = tiles_of(shape.length), tile = padded_dim(shape) * kTile, pair = kTile * kTile;
    const int64_t all = tiles * tile, row = tiles * kTile;
    const int64_t sizes[] = {tile, tile, tile, tile, tile, all,  all,  all, all,
                             row,  row,  all,  pair, pair, pair, pair, pair, row};
    for (int i = 0; i < kParts; ++i) parts_[i] = arena_.reserve<Acc>(sizes[i]);
    arena_.allocate();
  }
  BackwardScratch scratch() const {
    const auto at = [this](int part) -> void* { return arena_.at(parts_[part]); };
    return {at(0),  at(1),  at(2),  at(3),  at(4),  at(5),  at(6),  at(7), at(8),
            at(9),  at(10), at(11), at(12), at(13), at(14), at(15), at(16), at(17)};
  }

 private:
  static constexpr int kParts = 18;
  Arena arena_;
  int64_t parts_[kParts];
};

// Calls run(part, memory) for parts [0, count) of `work` multiply-adds in all, each thread with memory of its own.
template <class Memory, class Params, class Run>
void deal_out(const Params& params, int64_t count, int64_t work, ParallelFor parallel_for, Run run) {
  struct Context {
    const Params& params;
    Run run;
    int64_t count;
    std::atomic<int64_t> next;
  } context{params, run, count, {0}};
  parallel_for(
      0, count, std::max<int64_t>(1, kGrainWork / std::max<int64_t>(1, work / std::max<int64_t>(1, count))),
      [](int64_t, int64_t, void* raw) {
        // Parts differ in size, so threads take the next one when they are free, not the range they are given.
        Context& c = *static_cast<Context*>(raw);
        const Memory memory(c.params.shape);
        for (int64_t part = c.next++; part < c.count; part = c.next++) c.run(part, memory.scratch());
      },
      &context);
}

template <class Acc>
void run_forward(const ForwardParams& params, ParallelFor parallel_for) {
  const Shape& s = params.shape;
  const int64_t group = s.num_heads / s.num_kv_heads;
  const int64_t queries = std::max<int64_t>(1, kPartRows / (group * kTile)) * kTile;
  const int64_t parts = ceil_div(s.length, queries);
  const auto run = [&params, queries, parts](int64_t part, const ForwardScratch& scratch) {
    const Shape& shape = params.shape;
    // The last queries, which see most, first.
    const int64_t first = (parts - 1 - part % parts) * queries;
    const int64_t head = part / parts;
    kernels_for_this_cpu().forward[static_cast<int>(shape.dtype)](params, head / shape.num_kv_heads,
                                                                  head % shape.num_kv_heads, first,
                                                                  std::min(shape.length, first + queries), scratch);
  };
  deal_out<ForwardMemory<Acc>>(params, s.batch * s.num_kv_heads * parts,
                               s.batch * s.num_heads * s.length * s.length * s.head_dim, parallel_for, run);
}

template <class Acc>
void run_backward(BackwardParams params, ParallelFor parallel_for) {
  const Shape& s = params.shape;
  Arena arena;
  if (s.num_heads != s.num_kv_heads) {
    const int64_t shares = arena.reserve<Acc>(2 * s.batch * s.num_heads * s.length * padded_dim(s));
    arena.allocate();
    params.shares = arena.at(shares);
  }
  const auto run = [&params](int64_t part, const BackwardScratch& scratch) {
    const Shape& shape = params.shape;
    kernels_for_this_cpu().backward[static_cast<int>(shape.dtype)](params, part / shape.num_heads,
                                                                   part % shape.num_heads, scratch);
  };
  deal_out<BackwardMemory<Acc>>(params, s.batch * s.num_heads,
                                s.batch * s.num_heads * s.length * s.length * s.head_dim, parallel_for, run);
  if (params.shares == nullptr) return;
  parallel_for(
      0, s.batch * s.num_kv_heads, 1,
      [](int64_t begin, int64_t end, void* raw) {
        const auto& p = *static_cast<const BackwardParams*>(raw);
        for (int64_t part = begin; part < end; ++part) {
          kernels_for_this_cpu().sum_shares[static_cast<int>(p.shape.dtype)](p, part / p.shape.num_kv_heads,
                                                                             part % p.shape.num_kv_heads);
        }
      },
      &params);
}

bool is_empty(const Shape& shape) { return shape.batch * shape.length * shape.num_heads == 0; }

int64_t key_bytes(const Shape& s) { return s.batch * s.length * s.num_kv_heads * s.head_dim * bytes_of(s.dtype); }

}  // namespace

void forward_cpu(const ForwardParams& params, ParallelFor parallel_for) {
  if (is_empty(params.shape)) return;
  if (params.shape.dtype == Dtype::kFloat64) {
    run_forward<double>(params, parallel_for);
  } else {
    run_forward<float>(params, parallel_for);
  }
}

void backward_cpu(const BackwardParams& params, ParallelFor parallel_for) {
  if (is_empty(params.shape)) {
    // There may be keys without queries.
    for (void* grad : {params.k_grad, params.v_grad}) {
      if (key_bytes(params.shape) > 0) std::memset(grad, 0, key_bytes(params.shape));
    }
    return;
  }
  if (params.shape.dtype == Dtype::kFloat64) {
    run_backward<double>(params, parallel_for);
  } else {
    run_backward<float>(params, parallel_for);
  }
}

}  // namespace rrt::attention
