// The CPU kernel's inner parts, compiled once per instruction set and chosen at run time (cpu.cpp).
#pragma once

#include "loop_lora/launch.h"

namespace rrt::loop_lora {

// Buffers hold the accumulation type: double for float64, else float.
struct CpuWork {
  const Params* params;
  const int64_t* order;  // rows of x sorted by loop
  const RowTile* tiles;
  int64_t num_tiles;
  const Segment* segments;
  int64_t num_segments;
  void* packed;  // [m, packed_stride]: rows of x in `order`, zeros from column k on
  int64_t packed_stride;
  void* shrunk;  // [m, shrunk_stride]: lora_a x in `order`; a segment's from shrunk_begin[s] on, then zeros
  int64_t shrunk_stride;
  const int64_t* shrunk_begin;
};

constexpr int64_t kTileRows = 4;   // rows that share one load of a weight
constexpr int64_t kPadLanes = 16;  // strides are multiples of it: no kernel's vector is longer

struct CpuKernels {
  using Range = void (*)(const CpuWork& work, int64_t begin, int64_t end);
  Range pack[4];    // over positions in `order`; all three are indexed by Dtype
  Range shrink[4];  // over rows of lora_a, [0, total_rank)
  Range expand[4];  // over rows of the weight, [0, n)
};

extern const CpuKernels kBaselineKernels;
#ifdef RRT_X86
extern const CpuKernels kAvx2Kernels;
extern const CpuKernels kAvx512Kernels;
extern const CpuKernels kAvx512Bf16Kernels;
#endif

}  // namespace rrt::loop_lora
