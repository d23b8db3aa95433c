// Causal attention on the CPU: scratch memory, and parts of the work dealt out to threads.
#include <algorithm>
#include <cstring>

#include "arena.h"
#include "attention/cpu_kernels.h"
#include "parallel.h"

namespace rrt::attention {
namespace {

// Multiply-adds that are worth a thread.
constexpr int64_t kGrainWork = 1 << 16;
// Rows (queries x query heads of one key/value head) of a part of the forward: each lays out the keys before it.
constexpr int64_t kPartRows = 1024;

const CpuKernels& kernels_for_this_cpu() { return choose_kernels<CpuKernels>(RRT_TILE_KERNELS); }

template <class Acc>
class ForwardMemory {
 public:
  explicit ForwardMemory(const Shape& shape) {
    const int64_t dim = padded_dim(shape), tile = dim * kTile, tiles = tiles_of(shape.length);
    constexpr int64_t kPair = kSegment * kTile;  // of a segment of keys and the columns
    arena_.fill([&] {
      scratch_.keys = arena_.take<Acc>(tiles * tile);
      scratch_.values = arena_.take<Acc>(tiles * tile);
      scratch_.q = arena_.take<Acc>(tile);
      scratch_.scores = arena_.take<Acc>(kPair);
      scratch_.probabilities = arena_.take<Acc>(kPair);
      scratch_.max = arena_.take<Acc>(kTile);
      scratch_.sum = arena_.take<Acc>(kTile);
      scratch_.out = arena_.take<Acc>(tile);
      scratch_.seen_until = arena_.take<Acc>(tiles * kTile);
      scratch_.block_sight = arena_.take<Acc>(tiles * kTile);
    });
  }
  const ForwardScratch& scratch() const { return scratch_; }

 private:
  Arena arena_;
  ForwardScratch scratch_{};
};

template <class Acc>
class BackwardMemory {
 public:
  explicit BackwardMemory(const Shape& shape) {
    const int64_t tiles = tiles_of(shape.length), tile = padded_dim(shape) * kTile;
    constexpr int64_t kPair = kTile * kTile;
    arena_.fill([&] {
      scratch_.k_rows = arena_.take<Acc>(tile);
      scratch_.k_columns = arena_.take<Acc>(tile);
      scratch_.v_rows = arena_.take<Acc>(tile);
      scratch_.k_grad = arena_.take<Acc>(tile);
      scratch_.v_grad = arena_.take<Acc>(tile);
      scratch_.q_columns = arena_.take<Acc>(tiles * tile);
      scratch_.q_rows = arena_.take<Acc>(tiles * tile);
      scratch_.out_columns = arena_.take<Acc>(tiles * tile);
      scratch_.out_rows = arena_.take<Acc>(tiles * tile);
      scratch_.lse = arena_.take<Acc>(tiles * kTile);
      scratch_.delta = arena_.take<Acc>(tiles * kTile);
      scratch_.q_grad = arena_.take<Acc>(tiles * tile);
      scratch_.scores = arena_.take<Acc>(kPair);
      scratch_.probability_grads = arena_.take<Acc>(kPair);
      scratch_.probabilities = arena_.take<Acc>(kPair);
      scratch_.score_rows = arena_.take<Acc>(kPair);
      scratch_.score_pairs = arena_.take<Acc>(kPair);
      scratch_.seen_until = arena_.take<Acc>(tiles * kTile);
    });
  }
  const BackwardScratch& scratch() const { return scratch_; }

 private:
  Arena arena_;
  BackwardScratch scratch_{};
};

// Multiply-adds of the scores.
int64_t work_of(const Shape& s) { return s.batch * s.num_heads * s.length * s.length * s.head_dim; }

// Calls run(part, scratch) for `count` parts of the work.
template <class Memory, class Run>
void deal_out(const Shape& shape, int64_t count, ParallelFor parallel_for, const Run& run) {
  run_tasks(
      count, grain_of(kGrainWork, work_of(shape) / std::max<int64_t>(1, count)), parallel_for,
      [&] { return Memory(shape); }, [&](int64_t part, const Memory& memory) { run(part, memory.scratch()); });
}

template <class Acc>
void run_forward(const ForwardParams& params, ParallelFor parallel_for) {
  const Shape& s = params.shape;
  const auto forward = kernels_for_this_cpu().forward[static_cast<int>(s.dtype)];
  const int64_t group = s.num_heads / s.num_kv_heads;
  const int64_t queries = std::max<int64_t>(1, kPartRows / (group * kTile)) * kTile;
  const int64_t parts = ceil_div(s.length, queries);
  deal_out<ForwardMemory<Acc>>(s, s.batch * s.num_kv_heads * parts, parallel_for,
                               [&](int64_t part, const ForwardScratch& scratch) {
    // The last queries, which see most, come first.
    const int64_t first = (parts - 1 - part % parts) * queries;
    const int64_t head = part / parts;
    forward(params, head / s.num_kv_heads, head % s.num_kv_heads, first, std::min(s.length, first + queries), scratch);
  });
}

template <class Acc>
void run_backward(BackwardParams params, ParallelFor parallel_for) {
  const Shape& s = params.shape;
  const CpuKernels& kernels = kernels_for_this_cpu();
  const int dtype = static_cast<int>(s.dtype);
  Arena arena;
  if (s.num_heads != s.num_kv_heads) {
    arena.fill([&] { params.shares = arena.take<Acc>(2 * s.batch * s.num_heads * s.length * padded_dim(s)); });
  }
  deal_out<BackwardMemory<Acc>>(s, s.batch * s.num_heads, parallel_for,
                                [&](int64_t part, const BackwardScratch& scratch) {
    kernels.backward[dtype](params, part / s.num_heads, part % s.num_heads, scratch);
  });
  if (params.shares == nullptr) return;
  run_ranges(s.batch * s.num_kv_heads, 1, parallel_for, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      kernels.sum_shares[dtype](params, part / s.num_kv_heads, part % s.num_kv_heads);
    }
  });
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
