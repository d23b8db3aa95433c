// The key/value operators on the CPU: scratch memory, and tasks dealt out to threads.
#include <algorithm>
#include <cstring>

#include "arena.h"
#include "kv_cache/cpu_kernels.h"
#include "parallel.h"

namespace rrt::kv_cache {
namespace {

static_assert(kSplitSlots % kTileSlots == 0);

// Multiply-adds, and elements to copy, that are worth a thread.
constexpr int64_t kGrainWork = 1 << 16;
constexpr int64_t kGrainElements = 1 << 14;

const CpuKernels& kernels_for_this_cpu() { return choose_kernels<CpuKernels>(RRT_TILE_KERNELS); }

template <class Acc>
SoftmaxState take_state(Arena& arena, int64_t rows, int64_t padded_dim) {
  SoftmaxState state{};
  state.max = arena.take<Acc>(rows);
  state.sum = arena.take<Acc>(rows);
  state.out = arena.take<Acc>(rows * padded_dim);
  return state;
}

template <class Acc>
class ThreadMemory {
 public:
  ThreadMemory(int64_t rows, int64_t padded_dim) {
    arena_.fill([&] {
      scratch_.offsets = arena_.take<int64_t>(kTileSlots);
      scratch_.next_offsets = arena_.take<int64_t>(kTileSlots);
      scratch_.row = arena_.take<Acc>(padded_dim);
      scratch_.q = arena_.take<Acc>((rows + kReadBehind) * padded_dim);
      scratch_.k = arena_.take<Acc>(padded_dim * kTileSlots);
      scratch_.v = arena_.take<Acc>(kTileSlots * padded_dim);
      scratch_.scores = arena_.take<Acc>(rows * kTileSlots);
      scratch_.probabilities = arena_.take<Acc>((rows + kReadBehind) * kTileSlots);
      scratch_.split = take_state<Acc>(arena_, rows, padded_dim);
      scratch_.total = take_state<Acc>(arena_, rows, padded_dim);
    });
  }
  const Scratch& scratch() const { return scratch_; }

 private:
  Arena arena_;
  Scratch scratch_{};
};

template <class Acc>
void run_attention(const AttentionParams& p, const AttentionPlan& plan, ParallelFor parallel_for) {
  const CpuKernels& kernels = kernels_for_this_cpu();
  const int dtype = static_cast<int>(p.dtype);
  AttentionWork work{};
  work.params = &p;
  work.tasks = plan.tasks.data();
  work.merges = plan.merges.data();
  work.padded_dim = round_up(p.head_dim, kPadDim);
  Arena arena;
  arena.fill([&] { work.partial = take_state<Acc>(arena, plan.num_partial * p.num_heads, work.padded_dim); });

  const int64_t rows = plan.max_queries * (p.num_heads / p.num_kv_heads);
  const int64_t num_units = static_cast<int64_t>(plan.tasks.size()) * p.num_kv_heads;  // (task, key/value head)
  const int64_t cost = plan.num_scores * p.num_heads * p.head_dim * 2 / std::max<int64_t>(1, num_units);
  run_tasks(
      num_units, grain_of(kGrainWork, cost), parallel_for, [&] { return ThreadMemory<Acc>(rows, work.padded_dim); },
      [&](int64_t unit, const ThreadMemory<Acc>& memory) {
        kernels.attend[dtype](work, unit / p.num_kv_heads, unit % p.num_kv_heads, memory.scratch());
      });

  const int64_t num_merges = static_cast<int64_t>(plan.merges.size()) * p.num_kv_heads;
  const int64_t merge_cost = plan.num_partial * p.num_heads * p.head_dim / std::max<int64_t>(1, num_merges);
  run_ranges(num_merges, grain_of(kGrainWork, merge_cost), parallel_for, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) kernels.merge[dtype](work, i / p.num_kv_heads, i % p.num_kv_heads);
  });
}

}  // namespace

void write_cpu(const WriteParams& params, ParallelFor parallel_for) {
  const auto write = kernels_for_this_cpu().write[static_cast<int>(params.dtype)];
  run_ranges(params.m, grain_of(kGrainElements, params.num_kv_heads * params.head_dim), parallel_for,
             [&](int64_t begin, int64_t end) { write(params, begin, end); });
}

void attention_cpu(const AttentionParams& params, const AttentionPlan& plan, ParallelFor parallel_for) {
  const int64_t row_bytes = params.num_heads * params.head_dim * bytes_of(params.dtype);
  if (row_bytes == 0) return;
  for (int64_t row : plan.padding) std::memset(static_cast<char*>(params.out) + row * row_bytes, 0, row_bytes);
  if (params.dtype == Dtype::kFloat64) {
    run_attention<double>(params, plan, parallel_for);
  } else {
    run_attention<float>(params, plan, parallel_for);
  }
}

}  // namespace rrt::kv_cache
