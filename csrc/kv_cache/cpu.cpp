// The key/value operators on the CPU: scratch memory, and tasks dealt out to threads.
#include <algorithm>
#include <atomic>
#include <cstring>

#include "arena.h"
#include "kv_cache/cpu_kernels.h"

namespace rrt::kv_cache {
namespace {

static_assert(kSplitSlots % kTileSlots == 0);

// Multiply-adds, and elements to copy, that are worth a thread.
constexpr int64_t kGrainWork = 1 << 16;
constexpr int64_t kGrainElements = 1 << 14;

const CpuKernels& kernels_for_this_cpu() { return choose_kernels<CpuKernels>(RRT_CPU_KERNELS); }

int64_t dtype_size(Dtype dtype) {
  switch (dtype) {
    case Dtype::kFloat64: return 8;
    case Dtype::kFloat32: return 4;
    default: return 2;
  }
}

template <class Acc>
class StateMemory {
 public:
  StateMemory(Arena& arena, int64_t rows, int64_t padded_dim)
      : max_(arena.reserve<Acc>(rows)), sum_(arena.reserve<Acc>(rows)), out_(arena.reserve<Acc>(rows * padded_dim)) {}
  SoftmaxState in(const Arena& arena) const { return {arena.at(max_), arena.at(sum_), arena.at(out_)}; }

 private:
  int64_t max_, sum_, out_;
};

template <class Acc>
class ThreadMemory {
 public:
  ThreadMemory(int64_t rows, int64_t padded_dim)
      : offsets_(arena_.reserve<int64_t>(kTileSlots)),
        next_offsets_(arena_.reserve<int64_t>(kTileSlots)),
        row_(arena_.reserve<Acc>(padded_dim)),
        q_(arena_.reserve<Acc>(rows * padded_dim)),
        k_(arena_.reserve<Acc>(padded_dim * kTileSlots)),
        v_(arena_.reserve<Acc>(kTileSlots * padded_dim)),
        scores_(arena_.reserve<Acc>(rows * kTileSlots)),
        probabilities_(arena_.reserve<Acc>(rows * kTileSlots)),
        split_(arena_, rows, padded_dim),
        total_(arena_, rows, padded_dim) {
    arena_.allocate();
  }
  Scratch scratch() const {
    return {reinterpret_cast<int64_t*>(arena_.at(offsets_)),
            reinterpret_cast<int64_t*>(arena_.at(next_offsets_)),
            arena_.at(row_),
            arena_.at(q_),
            arena_.at(k_),
            arena_.at(v_),
            arena_.at(scores_),
            arena_.at(probabilities_),
            split_.in(arena_),
            total_.in(arena_)};
  }

 private:
  Arena arena_;
  int64_t offsets_, next_offsets_, row_, q_, k_, v_, scores_, probabilities_;
  StateMemory<Acc> split_, total_;
};

template <class Acc>
void run_attention(const AttentionParams& p, const AttentionPlan& plan, ParallelFor parallel_for) {
  const int64_t group = p.num_heads / p.num_kv_heads;
  const int64_t padded_dim = round_up(p.head_dim, kPadDim);
  Arena arena;
  const StateMemory<Acc> partial(arena, plan.num_partial * p.num_heads, padded_dim);
  arena.allocate();
  const AttentionWork work{&p, plan.tasks.data(), plan.merges.data(), padded_dim, partial.in(arena)};

  struct Context {
    const AttentionWork& work;
    const CpuKernels& kernels;
    int64_t dtype;
    int64_t rows;
    int64_t num_units;  // (task, key/value head) pairs
    std::atomic<int64_t> next;
  } context{work, kernels_for_this_cpu(), static_cast<int64_t>(p.dtype), plan.max_queries * group,
            static_cast<int64_t>(plan.tasks.size()) * p.num_kv_heads, {0}};
  const int64_t cost = plan.num_scores * p.num_heads * p.head_dim * 2 / std::max<int64_t>(1, context.num_units);
  parallel_for(
      0, context.num_units, std::max<int64_t>(1, kGrainWork / std::max<int64_t>(1, cost)),
      [](int64_t, int64_t, void* raw) {
        // Tasks differ in size, so threads take the next one when they are free, not the range they are given.
        Context& c = *static_cast<Context*>(raw);
        const ThreadMemory<Acc> memory(c.rows, c.work.padded_dim);
        const Scratch scratch = memory.scratch();
        const int64_t num_kv_heads = c.work.params->num_kv_heads;
        for (int64_t unit = c.next++; unit < c.num_units; unit = c.next++) {
          c.kernels.attend[c.dtype](c.work, unit / num_kv_heads, unit % num_kv_heads, scratch);
        }
      },
      &context);

  const int64_t num_merges = static_cast<int64_t>(plan.merges.size()) * p.num_kv_heads;
  const int64_t merge_cost = plan.num_partial * p.num_heads * p.head_dim / std::max<int64_t>(1, num_merges);
  parallel_for(
      0, num_merges, std::max<int64_t>(1, kGrainWork / std::max<int64_t>(1, merge_cost)),
      [](int64_t begin, int64_t end, void* raw) {
        const Context& c = *static_cast<const Context*>(raw);
        const int64_t num_kv_heads = c.work.params->num_kv_heads;
        for (int64_t i = begin; i < end; ++i) c.kernels.merge[c.dtype](c.work, i / num_kv_heads, i % num_kv_heads);
      },
      &context);
}

}  // namespace

void write_cpu(const WriteParams& params, ParallelFor parallel_for) {
  const int64_t row_elements = std::max<int64_t>(1, params.num_kv_heads * params.head_dim);
  parallel_for(
      0, params.m, std::max<int64_t>(1, kGrainElements / row_elements),
      [](int64_t begin, int64_t end, void* raw) {
        const WriteParams& p = *static_cast<const WriteParams*>(raw);
        kernels_for_this_cpu().write[static_cast<int>(p.dtype)](p, begin, end);
      },
      const_cast<WriteParams*>(&params));
}

void attention_cpu(const AttentionParams& params, const AttentionPlan& plan, ParallelFor parallel_for) {
  const int64_t row_bytes = params.num_heads * params.head_dim * dtype_size(params.dtype);
  if (row_bytes == 0) return;
  for (int64_t row : plan.padding) std::memset(static_cast<char*>(params.out) + row * row_bytes, 0, row_bytes);
  if (params.dtype == Dtype::kFloat64) {
    run_attention<double>(params, plan, parallel_for);
  } else {
    run_attention<float>(params, plan, parallel_for);
  }
}

}  // namespace rrt::kv_cache
