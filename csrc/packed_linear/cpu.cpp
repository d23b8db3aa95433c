// Packing, and the statistics of logits, on the CPU.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "huge_pages.h"
#include "packed_linear/cpu_kernels.h"
#include "parallel.h"

namespace rrt::packed_linear {
namespace {

// Multiply-adds that are worth a thread.
constexpr int64_t kGrainWork = 1 << 16;

const CpuKernels& kernels_for_this_cpu() { return choose_kernels<CpuKernels>(RRT_TILE_KERNELS); }

// The statistics of two consecutive parts of the outputs as one: of equal logits, the earlier is the argmax.
PartStatistics merge(const PartStatistics& first, const PartStatistics& second) {
  const double max = std::max(first.max, second.max);
  return {max, first.sum * std::exp(first.max - max) + second.sum * std::exp(second.max - max),
          second.max > first.max ? second.argmax : first.argmax};
}

}  // namespace

void pack_cpu(Dtype dtype, const void* from, int64_t count, int64_t n, int64_t k, void* to, ParallelFor parallel_for) {
  advise_huge_pages(to, count * packed_size(dtype, n, k) * bytes_of(dtype));
  const PackWork work{from, n, k, to};
  const auto pack_panels = kernels_for_this_cpu().pack_panels[static_cast<int>(dtype)];
  run_ranges(count * num_panels(n), grain_of(kGrainWork, kPanel * k), parallel_for,
             [&](int64_t begin, int64_t end) { pack_panels(work, begin, end); });
}

void statistics_cpu(const StatisticsParams& p, ParallelFor parallel_for) {
  const CpuKernels& kernels = kernels_for_this_cpu();
  const int dtype = static_cast<int>(p.dtype);
  std::vector<int64_t> order(p.m);
  std::iota(order.begin(), order.end(), 0);
  const int64_t most_rows = std::min(p.m, kMaxBlockRows);
  thread_local KeptMemory scratch;
  void* operands = scratch.reserve(operands_size(pack_steps(p.dtype, p.k), most_rows, kernels.operand_bytes[dtype]));
  const int64_t parts = ceil_div(num_panels(p.n), kPartPanels);
  std::vector<PartStatistics> statistics(parts * most_rows);
  for (int64_t first = 0; first < p.m; first += kMaxBlockRows) {
    const int64_t rows = std::min(kMaxBlockRows, p.m - first);
    const std::vector<RowTile> tiles = split_rows(rows, kernels.tile_rows[dtype]);
    StatisticsWork work{};
    work.x.x = p.x;
    work.x.k = p.k;
    work.x.x_row_stride = p.x_row_stride;
    work.x.order = order.data() + first;
    work.x.rows = rows;
    work.x.tiles = tiles.data();
    work.x.num_tiles = static_cast<int64_t>(tiles.size());
    work.x.operands = operands;
    work.n = p.n;
    work.weight = p.weight;
    work.parts = statistics.data();
    run_ranges(rows, grain_of(kGrainWork, 4 * p.k), parallel_for,
               [&](int64_t begin, int64_t end) { kernels.pack_rows[dtype](work.x, begin, end); });
    run_ranges(parts, grain_of(kGrainWork, kPartPanels * kPanel * rows * p.k), parallel_for,
               [&](int64_t begin, int64_t end) { kernels.statistics[dtype](work, begin, end); });
    for (int64_t row = 0; row < rows; ++row) {
      PartStatistics total = statistics[row];
      for (int64_t part = 1; part < parts; ++part) total = merge(total, statistics[part * rows + row]);
      const double log_sum_exp = total.max + std::log(total.sum);
      if (p.dtype == Dtype::kFloat64) {
        static_cast<double*>(p.log_sum_exp)[first + row] = log_sum_exp;
      } else {
        static_cast<float*>(p.log_sum_exp)[first + row] = static_cast<float>(log_sum_exp);
      }
      p.argmax[first + row] = total.argmax;
    }
  }
  scratch.trim();
}

}  // namespace rrt::packed_linear
