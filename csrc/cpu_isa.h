// Which of the compiled instruction sets this process uses.
#pragma once

namespace rrt {

enum class CpuIsa { kBaseline, kAvx2, kAvx512, kAvx512Bf16 };

// The widest that the CPU has, or what the environment variable RRT_CPU_ISA (baseline, avx2, avx512,
// avx512_bf16) lowers it to; read once. Asking for more than the CPU has changes nothing.
CpuIsa cpu_isa();

const char* cpu_isa_name(CpuIsa isa);

}  // namespace rrt
