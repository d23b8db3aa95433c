// Which of the compiled instruction sets this process uses.
#pragma once

namespace rrt {

enum class CpuIsa { kBaseline, kAvx2, kAvx512, kAvx512Bf16, kAmxBf16 };

// The widest that the CPU has, or what the environment variable RRT_CPU_ISA (baseline, avx2, avx512, avx512_bf16,
// amx_bf16) lowers it to; read once. Asking for more than the CPU has changes nothing.
CpuIsa cpu_isa();

const char* cpu_isa_name(CpuIsa isa);

// A family's tables of kernels (*/cpu_kernels.h), which its cpu_kernels.cpp defines once per instruction set. Those of
// RRT_TILE_KERNELS have kernels for AMX's tiles, the others run AVX512-BF16's there.
#ifdef RRT_X86
#define RRT_DECLARE_CPU_KERNELS(Table) \
  extern const Table kBaselineKernels, kAvx2Kernels, kAvx512Kernels, kAvx512Bf16Kernels, kAmxBf16Kernels
#define RRT_CPU_KERNELS {&kBaselineKernels, &kAvx2Kernels, &kAvx512Kernels, &kAvx512Bf16Kernels}
#else
#define RRT_DECLARE_CPU_KERNELS(Table) extern const Table kBaselineKernels
#define RRT_CPU_KERNELS {&kBaselineKernels}
#endif
#ifdef RRT_AMX
#define RRT_TILE_KERNELS {&kBaselineKernels, &kAvx2Kernels, &kAvx512Kernels, &kAvx512Bf16Kernels, &kAmxBf16Kernels}
#else
#define RRT_TILE_KERNELS RRT_CPU_KERNELS
#endif

// choose_kernels<Table>(RRT_CPU_KERNELS): the table to use here, of those that are given in the order of CpuIsa.
template <class Table, int N>
const Table& choose_kernels(const Table* const (&tables)[N]) {
  const int isa = static_cast<int>(cpu_isa());
  return *tables[isa < N ? isa : N - 1];
}

}  // namespace rrt
