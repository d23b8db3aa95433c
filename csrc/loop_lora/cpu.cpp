// Y = W X + b + B_loop (A_loop X) on the CPU, in three sweeps over a block of rows. The first sorts the rows by loop
// and makes operands of them, the second multiplies them by their loop's lora_a, the third reads every panel of the
// weight once for all rows.
#include "loop_lora/cpu_kernels.h"
#include "packed_linear/launch.h"
#include "parallel.h"

namespace rrt::loop_lora {
namespace {

using namespace packed_linear;

// Multiply-adds that are worth a thread.
constexpr int64_t kGrainWork = 1 << 16;

const CpuKernels& kernels_for_this_cpu() { return choose_kernels<CpuKernels>(RRT_CPU_KERNELS); }

// Runs tasks [0, size), each of `cost` multiply-adds.
void sweep(CpuKernels::Range range, const CpuWork& work, int64_t size, int64_t cost, ParallelFor parallel_for) {
  run_ranges(size, grain_of(kGrainWork, cost), parallel_for,
             [&](int64_t begin, int64_t end) { range(work, begin, end); });
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
  const int64_t x_chunks = num_chunks(pack_steps(p.dtype, p.k));
  const int64_t chunk_bytes = std::min(p.m, kMaxBlockRows) * kChunk * kernels.operand_bytes[dtype];
  thread_local KeptMemory scratch;
  char* operands = scratch.reserve((x_chunks + shrunk_chunks) * chunk_bytes);
  const int64_t tile_rows = p.m <= kFewRows ? kernels.few_tile_rows[dtype] : kernels.tile_rows;
  for (const RowBlock& block : plan_rows(groups, tile_rows, kMaxBlockRows)) {
    CpuWork work{};
    work.params = &p;
    work.x.x = p.x;
    work.x.k = p.k;
    work.x.x_row_stride = p.x_row_stride;
    work.x.order = groups.order.data() + block.begin;
    work.x.rows = block.rows;
    work.x.tiles = block.tiles.data();
    work.x.num_tiles = static_cast<int64_t>(block.tiles.size());
    work.x.operands = operands;
    work.pieces = block.pieces.data();
    work.loop_starts = block.loop_starts.data();
    work.num_loops = static_cast<int64_t>(block.loop_starts.size()) - 1;
    work.segments = p.segments.data();
    work.num_segments = static_cast<int64_t>(p.segments.size());
    work.segment_chunk = segment_chunk.data();
    work.shrunk = operands + x_chunks * chunk_bytes;
    const int64_t panel_cost = block.rows * p.k * kPanel;
    sweep(kernels.pack_rows[dtype], work, block.rows, 4 * p.k, parallel_for);
    sweep(kernels.shrink[dtype], work, work.num_loops * num_panels(p.total_rank), panel_cost, parallel_for);
    sweep(kernels.expand[dtype], work, num_panels(p.n), panel_cost, parallel_for);
  }
  scratch.trim();
}

}  // namespace rrt::loop_lora
