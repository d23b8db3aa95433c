// How cpu_isa() decides, apart from the machine it runs on.
#pragma once

#include <string>

#include "cpu_isa.h"

namespace rrt {

struct CpuFeatures {
  bool avx2;    // with FMA and F16C
  bool avx512;  // F, BW, DQ and VL
  bool avx512_bf16;
  bool amx_bf16;  // tiles of bfloat16, which the operating system saves between threads, and kernels for them here
};

struct CpuIsaChoice {
  CpuIsa isa;
  std::string complaint;  // about `requested`; empty if it was followed
};

// `requested` is RRT_CPU_ISA's value, or null. permit_tiles() asks the system for tile registers, in vain if it returns
// false; it is called only if they are to be used.
CpuIsaChoice choose_cpu_isa(const CpuFeatures& features, const char* requested, bool (*permit_tiles)());

}  // namespace rrt
