// Y = W X + b + B_loop (A_loop X) on the CPU, in three sweeps: gather the rows by loop in the accumulation
// type, shrink them by their loop's lora_a, then read every row of the weight once for all of them.
#include <algorithm>

#include "cpu_isa.h"
#include "loop_lora/cpu_kernels.h"

namespace rrt::loop_lora {
namespace {

// Multiply-adds that make a task worth a thread.
constexpr int64_t kGrainWork = 1 << 15;

const CpuKernels& kernels_for_this_cpu() {
  switch (cpu_isa()) {
#ifdef RRT_X86
    case CpuIsa::kAvx512Bf16: return kAvx512Bf16Kernels;
    case CpuIsa::kAvx512: return kAvx512Kernels;
    case CpuIsa::kAvx2: return kAvx2Kernels;
#endif
    default: return kBaselineKernels;
  }
}

int64_t pad(int64_t size) { return (size + kPadLanes - 1) / kPadLanes * kPadLanes; }

void sweep(ParallelFor parallel_for, CpuKernels::Range range, const CpuWork& work, int64_t size, int64_t cost) {
  struct Context {
    CpuKernels::Range range;
    const CpuWork& work;
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

template <class Acc>
void run(const Params& p, const LoopGroups& groups, ParallelFor parallel_for) {
  const std::vector<RowTile> tiles = tile_groups(groups, kTileRows);
  std::vector<int64_t> shrunk_begin;
  int64_t shrunk_stride = 0;
  for (const Segment& segment : p.segments) {
    shrunk_begin.push_back(shrunk_stride);
    shrunk_stride += pad(segment.rank);
  }
  std::vector<Acc> packed(p.m * pad(p.k));
  std::vector<Acc> shrunk(p.m * shrunk_stride);
  const CpuWork work{&p,
                     groups.order.data(),
                     tiles.data(),
                     static_cast<int64_t>(tiles.size()),
                     p.segments.data(),
                     static_cast<int64_t>(p.segments.size()),
                     packed.data(),
                     pad(p.k),
                     shrunk.data(),
                     shrunk_stride,
                     shrunk_begin.data()};
  const CpuKernels& kernels = kernels_for_this_cpu();
  const int dtype = static_cast<int>(p.dtype);
  sweep(parallel_for, kernels.pack[dtype], work, p.m, p.k);
  sweep(parallel_for, kernels.shrink[dtype], work, p.total_rank, p.m * p.k);
  sweep(parallel_for, kernels.expand[dtype], work, p.n, p.m * p.k);
}

}  // namespace

void run_cpu(const Params& params, const LoopGroups& groups, ParallelFor parallel_for) {
  if (params.dtype == Dtype::kFloat64) {
    run<double>(params, groups, parallel_for);
  } else {
    run<float>(params, groups, parallel_for);
  }
}

}  // namespace rrt::loop_lora
