// Y = W X + b + B_loop (A_loop X) on the CPU, in three sweeps over a block of rows: bring the rows into loop
// order and operand form, shrink them by their loop's lora_a, then read every panel of the weight once for all.
#include <algorithm>
#include <cmath>
#include <memory>

#include "huge_pages.h"
#include "loop_lora/cpu_kernels.h"

namespace rrt::loop_lora {
namespace {

// Multiply-adds that make a task worth a thread.
constexpr int64_t kGrainWork = 1 << 16;

const CpuKernels& kernels_for_this_cpu() { return choose_kernels<CpuKernels>(RRT_CPU_KERNELS); }

template <class Work>
void sweep(ParallelFor parallel_for, void (*range)(const Work&, int64_t, int64_t), const Work& work, int64_t size,
           int64_t cost) {
  struct Context {
    void (*range)(const Work&, int64_t, int64_t);
    const Work& work;
  } context{range, work};
  const int64_t grain = std::max<int64_t>(1, kGrainWork / std::max<int64_t>(1, cost));
  parallel_for(
      0, size, grain,
      [](int64_t begin, int64_t end, void* raw) {
        const Context& c = *static_cast<const Context*>(raw);
        c.range(c.work, begin, end);
      },
      &context);
}

// Memory that the thread keeps from call to call: fresh pages would cost more than filling them.
class Scratch {
 public:
  char* reserve(int64_t bytes) {
    constexpr int64_t kAlign = 64;
    if (bytes > size_) {
      size_ = 0;  // should the allocation fail
      memory_.reset(new char[bytes + kAlign]);
      size_ = bytes;
    }
    const auto address = reinterpret_cast<uintptr_t>(memory_.get());
    return memory_.get() + (kAlign - address % kAlign) % kAlign;
  }

  void trim() {
    constexpr int64_t kKeptBytes = int64_t{64} << 20;
    if (size_ <= kKeptBytes) return;
    memory_.reset();
    size_ = 0;
  }

 private:
  std::unique_ptr<char[]> memory_;
  int64_t size_ = 0;
};

}  // namespace

void run_cpu(const Params& p, const LoopGroups& groups, ParallelFor parallel_for) {
  const CpuKernels& kernels = kernels_for_this_cpu();
  const int dtype = static_cast<int>(p.dtype);
  std::vector<int64_t> segment_chunk;
  int64_t shrunk_chunks = 0;
  for (const Segment& segment : p.segments) {
    segment_chunk.push_back(shrunk_chunks);
    shrunk_chunks += num_chunks(pack_steps(p.dtype, segment.rank));
  }
  const int64_t x_chunks = num_chunks(pack_steps(p.dtype, p.k));
  const int64_t chunk_bytes = std::min(p.m, kMaxBlockRows) * kChunk * kernels.operand_bytes[dtype];
  thread_local Scratch scratch;
  char* packed_x = scratch.reserve((x_chunks + shrunk_chunks) * chunk_bytes);
  const int64_t tile_rows = p.m <= kFewRows ? kernels.few_tile_rows[dtype] : kernels.tile_rows;
  for (const RowBlock& block : plan_rows(groups, tile_rows, kMaxBlockRows)) {
    const CpuWork work{&p,
                       groups.order.data() + block.begin,
                       block.rows,
                       block.tiles.data(),
                       static_cast<int64_t>(block.tiles.size()),
                       block.pieces.data(),
                       block.present.data(),
                       static_cast<int64_t>(block.present.size()) - 1,
                       p.segments.data(),
                       static_cast<int64_t>(p.segments.size()),
                       segment_chunk.data(),
                       packed_x,
                       packed_x + x_chunks * chunk_bytes};
    const int64_t panel_cost = block.rows * p.k * kPanel;
    sweep(parallel_for, kernels.pack_rows[dtype], work, block.rows, 4 * p.k);
    sweep(parallel_for, kernels.shrink[dtype], work, work.num_present * num_panels(p.total_rank), panel_cost);
    sweep(parallel_for, kernels.expand[dtype], work, num_panels(p.n), panel_cost);
  }
  scratch.trim();
}

void statistics_cpu(const StatisticsParams& p, ParallelFor parallel_for) {
  const CpuKernels& kernels = kernels_for_this_cpu();
  const int dtype = static_cast<int>(p.dtype);
  Params rows{};
  rows.k = p.k;
  rows.x_row_stride = p.x_row_stride;
  rows.x = p.x;
  const std::vector<int32_t> loops(p.m, 0);
  const LoopGroups groups = group_rows_by_loop(loops.data(), p.m, 1);
  const int64_t most_rows = std::min(p.m, kMaxBlockRows);
  thread_local Scratch scratch;
  char* packed_x =
      scratch.reserve(num_chunks(pack_steps(p.dtype, p.k)) * most_rows * kChunk * kernels.operand_bytes[dtype]);
  const int64_t parts = ceil_div(num_panels(p.n), kPartPanels);
  std::vector<PartStatistics> statistics(parts * most_rows);
  for (const RowBlock& block : plan_rows(groups, kernels.tile_rows, kMaxBlockRows)) {
    StatisticsWork work{{}, p.n, p.k, p.weight, statistics.data()};
    work.block.params = &rows;
    work.block.order = groups.order.data() + block.begin;
    work.block.rows = block.rows;
    work.block.tiles = block.tiles.data();
    work.block.num_tiles = static_cast<int64_t>(block.tiles.size());
    work.block.packed_x = packed_x;
    sweep(parallel_for, kernels.pack_rows[dtype], work.block, block.rows, 4 * p.k);
    sweep(parallel_for, kernels.statistics[dtype], work, parts, kPartPanels * kPanel * block.rows * p.k);
    for (int64_t row = 0; row < block.rows; ++row) {
      PartStatistics total = statistics[row];
      for (int64_t part = 1; part < parts; ++part) {
        const PartStatistics& other = statistics[part * block.rows + row];
        const double max = std::max(total.max, other.max);
        total.sum = total.sum * std::exp(total.max - max) + other.sum * std::exp(other.max - max);
        if (other.max > total.max) total.argmax = other.argmax;
        total.max = max;
      }
      const double log_sum_exp = total.max + std::log(total.sum);
      if (p.dtype == Dtype::kFloat64) {
        static_cast<double*>(p.log_sum_exp)[block.begin + row] = log_sum_exp;
      } else {
        static_cast<float*>(p.log_sum_exp)[block.begin + row] = static_cast<float>(log_sum_exp);
      }
      p.argmax[block.begin + row] = total.argmax;
    }
  }
  scratch.trim();
}

void pack_cpu(Dtype dtype, const void* from, int64_t count, int64_t n, int64_t k, void* to, ParallelFor parallel_for) {
  const int64_t steps = num_panels(n) * kPanel * pack_steps(dtype, k) * pack_step(dtype);
  advise_huge_pages(to, count * steps * bytes_of(dtype));
  const PackWork work{from, n, k, to};
  sweep(parallel_for, kernels_for_this_cpu().pack_panels[static_cast<int>(dtype)], work, count * num_panels(n),
        kPanel * k);
}

}  // namespace rrt::loop_lora
