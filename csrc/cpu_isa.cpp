#include "cpu_isa_choice.h"

#ifdef RRT_X86
#include <cpuid.h>
#endif
#ifdef RRT_AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <string>

namespace rrt {
namespace {

#ifdef RRT_AMX
// XCR0: the parts of the registers that the operating system saves when it changes threads.
uint64_t saved_state() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || !(ecx & bit_OSXSAVE)) return 0;
  asm volatile("xgetbv" : "=a"(eax), "=d"(edx) : "c"(0));
  return static_cast<uint64_t>(edx) << 32 | eax;
}

bool has_tiles() {
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;  // of leaf 7's EDX
  constexpr uint64_t kTileState = uint64_t{3} << 17;            // configuration and data
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
  return (edx & kAmxBf16) && (edx & kAmxTile) && (saved_state() & kTileState) == kTileState;
}

// Linux gives the 8 KiB of tile data to processes that ask; all threads have it then, later ones too, and children.
bool permit_tiles() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#else
bool permit_tiles() { return false; }
#endif

CpuFeatures features_of_this_cpu() {
  CpuFeatures features{};
#ifdef RRT_X86
  __builtin_cpu_init();
  // F16C by hand: not every compiler's __builtin_cpu_supports knows it.
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  const bool f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
  features.avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && f16c;
  features.avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  features.avx512_bf16 = __builtin_cpu_supports("avx512bf16");
#endif
#ifdef RRT_AMX
  features.amx_bf16 = has_tiles();
#endif
  return features;
}

CpuIsa widest(const CpuFeatures& features) {
  if (!features.avx2) return CpuIsa::kBaseline;
  if (!features.avx512) return CpuIsa::kAvx2;
  if (!features.avx512_bf16) return CpuIsa::kAvx512;
  return features.amx_bf16 ? CpuIsa::kAmxBf16 : CpuIsa::kAvx512Bf16;
}

}  // namespace

CpuIsaChoice choose_cpu_isa(const CpuFeatures& features, const char* requested, bool (*permit_tiles)()) {
  CpuIsa have = widest(features);
  const bool is_free = requested == nullptr || *requested == '\0';
  for (CpuIsa isa : {CpuIsa::kBaseline, CpuIsa::kAvx2, CpuIsa::kAvx512, CpuIsa::kAvx512Bf16}) {
    if (!is_free && std::strcmp(requested, cpu_isa_name(isa)) == 0 && isa <= have) return {isa, ""};
  }
  if (have == CpuIsa::kAmxBf16 && !permit_tiles()) have = CpuIsa::kAvx512Bf16;
  if (is_free || std::strcmp(requested, cpu_isa_name(have)) == 0) return {have, ""};
  return {have, "RRT_CPU_ISA: found '" + std::string(requested) +
                    "'; expected baseline, avx2, avx512, avx512_bf16 or amx_bf16, up to the widest that this CPU and "
                    "its system allow, " + cpu_isa_name(have) + ", which is used"};
}

CpuIsa cpu_isa() {
  static const CpuIsa isa = [] {
    const CpuIsaChoice choice = choose_cpu_isa(features_of_this_cpu(), std::getenv("RRT_CPU_ISA"), permit_tiles);
    if (!choice.complaint.empty()) std::fprintf(stderr, "rrt: %s\n", choice.complaint.c_str());
    return choice.isa;
  }();
  return isa;
}

const char* cpu_isa_name(CpuIsa isa) {
  switch (isa) {
    case CpuIsa::kAmxBf16: return "amx_bf16";
    case CpuIsa::kAvx512Bf16: return "avx512_bf16";
    case CpuIsa::kAvx512: return "avx512";
    case CpuIsa::kAvx2: return "avx2";
    default: return "baseline";
  }
}

}  // namespace rrt
