// The operators between a layer's matrix products, on the CPU: rows and elements dealt out to threads.
#include <memory>

#include "elementwise/cpu_kernels.h"
#include "parallel.h"

namespace rrt::elementwise {
namespace {

// Elements that are worth a thread.
constexpr int64_t kGrainElements = 1 << 14;

const CpuKernels& kernels_for_this_cpu() { return choose_kernels<CpuKernels>(RRT_CPU_KERNELS); }

// Calls run(begin, end) over disjoint ranges of [0, count), of which each has `width` elements.
template <class Run>
void deal_out(int64_t count, int64_t width, ParallelFor parallel_for, const Run& run) {
  run_ranges(count, grain_of(kGrainElements, width), parallel_for, run);
}

}  // namespace

void rotary_cpu(const RotaryParams& p, ParallelFor parallel_for) {
  const auto kernel = kernels_for_this_cpu().rotary[static_cast<int>(p.dtype)];
  deal_out(p.batch * p.length, p.num_heads * p.head_dim, parallel_for,
           [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
}

void norm_cpu(const NormParams& p, ParallelFor parallel_for) {
  const auto kernel = kernels_for_this_cpu().norm[static_cast<int>(p.dtype)];
  deal_out(p.rows, p.width, parallel_for, [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
}

void norm_backward_cpu(const NormBackwardParams& p, ParallelFor parallel_for) {
  const CpuKernels& kernels = kernels_for_this_cpu();
  const int dtype = static_cast<int>(p.dtype);
  const int64_t acc_bytes = p.dtype == Dtype::kFloat64 ? sizeof(double) : sizeof(float);
  const std::unique_ptr<char[]> shares(new char[shares_of(p.rows) * p.width * acc_bytes]);
  deal_out(shares_of(p.rows), kShareRows * p.width, parallel_for, [&](int64_t begin, int64_t end) {
    for (int64_t share = begin; share < end; ++share) kernels.norm_backward[dtype](p, share, shares.get());
  });
  deal_out(p.width, shares_of(p.rows), parallel_for,
           [&](int64_t begin, int64_t end) { kernels.sum_shares[dtype](p, shares.get(), begin, end); });
}

void gate_cpu(const GateParams& p, ParallelFor parallel_for) {
  const auto kernel = kernels_for_this_cpu().gate[static_cast<int>(p.dtype)];
  deal_out(p.size, 1, parallel_for, [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
}

void gate_backward_cpu(const GateBackwardParams& p, ParallelFor parallel_for) {
  const auto kernel = kernels_for_this_cpu().gate_backward[static_cast<int>(p.dtype)];
  deal_out(p.size, 1, parallel_for, [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
}

void add_cpu(const AddParams& p, ParallelFor parallel_for) {
  const auto kernel = kernels_for_this_cpu().add[static_cast<int>(p.dtype)];
  deal_out(p.size, 1, parallel_for, [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
}

}  // namespace rrt::elementwise
