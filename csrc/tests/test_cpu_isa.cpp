// The choice of instruction set. A process makes it once, so this program runs copies of itself.
#include <fstream>
#include <iostream>
#include <sstream>
#include <string>
#include <vector>

#include "check.h"
#include "cpu_isa_choice.h"

using namespace rrt;
using namespace rrt::tests;

namespace {

const std::vector<std::string> kNames = {"baseline", "avx2", "avx512", "avx512_bf16", "amx_bf16"};

// The same from the operating system, an independent source. It lists tiles that it would refuse, which is right where it
// does not: in a sandbox that forbids them, this test fails.
std::string widest_of_this_cpu() {
  std::ifstream cpuinfo("/proc/cpuinfo");
  std::string line;
  while (std::getline(cpuinfo, line) && line.rfind("flags", 0) != 0) {
  }
  std::istringstream words(line);
  std::vector<std::string> flags;
  for (std::string word; words >> word;) flags.push_back(word);
  const auto have = [&](const std::vector<std::string>& wanted) {
    for (const std::string& flag : wanted) {
      bool found = false;
      for (const std::string& each : flags) found = found || each == flag;
      if (!found) return false;
    }
    return true;
  };
  if (!have({"avx2", "fma", "f16c"})) return "baseline";
  if (!have({"avx512f", "avx512bw", "avx512dq", "avx512vl"})) return "avx2";
  if (!have({"avx512_bf16"})) return "avx512";
#ifdef RRT_AMX
  if (have({"amx_tile", "amx_bf16"})) return "amx_bf16";
#endif
  return "avx512_bf16";
}

// The first line that a copy of this program prints when RRT_CPU_ISA is `requested`.
std::string chosen_with(const std::string& self, const char* requested, const char* stream = "2>/dev/null") {
  requested == nullptr ? unsetenv("RRT_CPU_ISA") : setenv("RRT_CPU_ISA", requested, 1);
  FILE* output = popen((self + " print " + stream).c_str(), "r");
  if (output == nullptr) return "";
  char line[256] = "";
  const bool read = std::fgets(line, sizeof(line), output) != nullptr;
  return pclose(output) == 0 && read ? line : "";
}

size_t index_of(const std::string& name) {
  size_t i = 0;
  while (i < kNames.size() && kNames[i] != name) ++i;
  return i;
}

int permissions_asked = 0;
bool permit() { return ++permissions_asked > 0; }
bool refuse() { return ++permissions_asked < 0; }

void tiles_are_used_only_with_permission_which_is_asked_only_for_use() {
  const CpuFeatures all{true, true, true, true}, none{}, no_pairs{true, true, false, true};
  struct Case {
    CpuFeatures features;
    const char* requested;
    bool (*permit_tiles)();
    CpuIsa chosen;
    int times_asked;
    bool complains;
  };
  for (const Case& c : {Case{all, nullptr, permit, CpuIsa::kAmxBf16, 1, false},
                        Case{all, "", permit, CpuIsa::kAmxBf16, 1, false},
                        Case{all, "amx_bf16", permit, CpuIsa::kAmxBf16, 1, false},
                        Case{all, "avx512_bf16", permit, CpuIsa::kAvx512Bf16, 0, false},
                        Case{all, "baseline", permit, CpuIsa::kBaseline, 0, false},
                        Case{all, "amx", permit, CpuIsa::kAmxBf16, 1, true},
                        Case{all, nullptr, refuse, CpuIsa::kAvx512Bf16, 1, false},
                        Case{all, "amx_bf16", refuse, CpuIsa::kAvx512Bf16, 1, true},
                        Case{no_pairs, nullptr, permit, CpuIsa::kAvx512, 0, false},
                        Case{no_pairs, "amx_bf16", permit, CpuIsa::kAvx512, 0, true},
                        Case{none, nullptr, permit, CpuIsa::kBaseline, 0, false}}) {
    permissions_asked = 0;
    const CpuIsaChoice choice = choose_cpu_isa(c.features, c.requested, c.permit_tiles);
    CHECK(choice.isa == c.chosen);
    CHECK_EQ(permissions_asked, c.times_asked);
    CHECK_EQ(!choice.complaint.empty(), c.complains);
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1) {
    std::cout << cpu_isa_name(cpu_isa());
    return 0;
  }
  return run(
      tiles_are_used_only_with_permission_which_is_asked_only_for_use,
      [] {
        for (size_t i = 0; i < kNames.size(); ++i) CHECK_EQ(cpu_isa_name(static_cast<CpuIsa>(i)), kNames[i]);
      },
      [&] {
        const std::string widest = widest_of_this_cpu();
        CHECK_EQ(chosen_with(argv[0], nullptr), widest);
        CHECK_EQ(chosen_with(argv[0], ""), widest);
        CHECK_EQ(chosen_with(argv[0], "AVX2"), widest);
        CHECK_EQ(chosen_with(argv[0], "AVX2", "2>&1 >/dev/null"),
                 "rrt: RRT_CPU_ISA: found 'AVX2'; expected baseline, avx2, avx512, avx512_bf16 or amx_bf16, up to the "
                 "widest that this CPU and its system allow, " +
                     widest + ", which is used\n");
        CHECK_EQ(chosen_with(argv[0], "baseline", "2>&1 >/dev/null"), "");
        for (size_t i = 0; i < kNames.size(); ++i) {
          const std::string& expected = i < index_of(widest) ? kNames[i] : widest;
          CHECK_EQ(chosen_with(argv[0], kNames[i].c_str()), expected);
        }
      });
}
