// Y = W X + b + B_loop (A_loop X) on the CPU, in two sweeps over blocks of rows that are sorted by loop. The first
// multiplies the rows by their loop's lora_a, the second reads every panel of the weight once for all rows of a block.
#include "loop_lora/cpu_kernels.h"
#include "packed_linear/launch.h"
#include "parallel.h"

namespace rrt::loop_lora {
namespace {

using namespace packed_linear;

// Multiply-adds that are worth a thread.
constexpr int64_t kGrainWork = 1 << 16;

const CpuKernels& kernels_for_this_cpu() { return choose_kernels<CpuKernels>(RRT_TILE_KERNELS); }

// Most memory for the shrunk rows of blocks that are computed together.
constexpr int64_t kShrunkBytes = int64_t{16} << 20;

// Runs the tasks of all blocks, of which works[i] has count(works[i]), each of cost(works[i]) multiply-adds. A thread
// has consecutive ones, and makes operands of the rows of their blocks by itself: that costs less than waiting for
// others, and leaves them in its own cache.
template <class Count, class Cost>
void sweep(const CpuKernels& kernels, CpuKernels::Range range, const std::vector<CpuWork>& works, const Count& count,
           const Cost& cost, ParallelFor parallel_for) {
  std::vector<int64_t> starts{0};
  for (const CpuWork& work : works) starts.push_back(starts.back() + count(work));
  const int dtype = static_cast<int>(works.front().params->dtype);
  const int64_t grain = grain_of(kGrainWork, cost(works.front()));
  run_ranges(starts.back(), grain, parallel_for, [&](int64_t begin, int64_t end) {
    thread_local KeptMemory scratch;
    size_t block = std::upper_bound(starts.begin(), starts.end(), begin) - starts.begin() - 1;
    for (; block < works.size() && starts[block] < end; ++block) {
      const int64_t first = std::max(begin, starts[block]), last = std::min(end, starts[block + 1]);
      if (first >= last) continue;
      CpuWork work = works[block];
      const int64_t steps = pack_steps(work.params->dtype, work.x.k);
      work.x.operands = scratch.reserve(operands_size(steps, work.x.rows, kernels.operand_bytes[dtype]));
      kernels.pack_rows[dtype](work.x, 0, work.x.rows);
      range(work, first - starts[block], last - starts[block]);
    }
    scratch.trim();
  });
}

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
  const int64_t tile_rows = p.m <= kFewRows ? kernels.few_tile_rows[dtype] : kernels.tile_rows[dtype];
  // Of nearly equal size, so that threads finish together.
  const int64_t block_rows = p.m == 0 ? 1 : ceil_div(p.m, ceil_div(p.m, kMaxBlockRows));
  const std::vector<RowBlock> blocks = plan_rows(groups, tile_rows, block_rows);
  const int64_t num_blocks = static_cast<int64_t>(blocks.size());
  const int64_t block_bytes = shrunk_chunks * block_rows * kChunk * kernels.operand_bytes[dtype];
  const int64_t fitting = std::max<int64_t>(1, kShrunkBytes / std::max<int64_t>(1, block_bytes));
  const int64_t together = std::min(fitting, num_blocks);
  thread_local KeptMemory scratch;
  char* shrunk = scratch.reserve(together * block_bytes + operands_size(0, 0, kernels.operand_bytes[dtype]));
  for (int64_t first = 0; first < num_blocks; first += fitting) {
    std::vector<CpuWork> works;
    for (int64_t i = first; i < std::min(first + fitting, num_blocks); ++i) {
      const RowBlock& block = blocks[i];
      CpuWork work{};
      work.params = &p;
      work.x.x = p.x;
      work.x.k = p.k;
      work.x.x_row_stride = p.x_row_stride;
      work.x.order = groups.order.data() + block.begin;
      work.x.rows = block.rows;
      work.x.tiles = block.tiles.data();
      work.x.num_tiles = static_cast<int64_t>(block.tiles.size());
      work.pieces = block.pieces.data();
      work.loop_starts = block.loop_starts.data();
      work.num_loops = static_cast<int64_t>(block.loop_starts.size()) - 1;
      work.segments = p.segments.data();
      work.num_segments = static_cast<int64_t>(p.segments.size());
      work.segment_chunk = segment_chunk.data();
      work.shrunk = shrunk + (i - first) * block_bytes;
      works.push_back(work);
    }
    const int64_t products = p.gate_weight == nullptr ? 1 : 2;
    const auto panel_cost = [&](const CpuWork& work) { return products * work.x.rows * p.k * kPanel; };
    if (p.total_rank > 0) {
      const auto num_tasks = [&](const CpuWork& work) { return work.num_loops * (num_panels(p.total_rank) - p.first_rank_panel); };
      sweep(kernels, kernels.shrink[dtype], works, num_tasks, panel_cost, parallel_for);
    }
    const auto num_tasks = [&](const CpuWork&) { return num_panels(p.n) - p.first_panel; };
    sweep(kernels, kernels.expand[dtype], works, num_tasks, panel_cost, parallel_for);
  }
  scratch.trim();
}

}  // namespace rrt::loop_lora
