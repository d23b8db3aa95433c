// The choice of instruction set. A process makes it once, so this program runs copies of itself.
#include <fstream>
#include <iostream>
#include <sstream>
#include <string>
#include <vector>

#include "check.h"
#include "cpu_isa.h"

using namespace rrt;
using namespace rrt::tests;

namespace {

const std::vector<std::string> kNames = {"baseline", "avx2", "avx512", "avx512_bf16"};

// The same from the operating system, an independent source.
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
  return have({"avx512_bf16"}) ? "avx512_bf16" : "avx512";
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

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1) {
    std::cout << cpu_isa_name(cpu_isa());
    return 0;
  }
  return run(
      [] {
        for (size_t i = 0; i < kNames.size(); ++i) CHECK_EQ(cpu_isa_name(static_cast<CpuIsa>(i)), kNames[i]);
      },
      [&] {
        const std::string widest = widest_of_this_cpu();
        CHECK_EQ(chosen_with(argv[0], nullptr), widest);
        CHECK_EQ(chosen_with(argv[0], ""), widest);
        CHECK_EQ(chosen_with(argv[0], "AVX2"), widest);
        CHECK_EQ(chosen_with(argv[0], "AVX2", "2>&1 >/dev/null"),
                 "rrt: RRT_CPU_ISA: found 'AVX2'; expected baseline, avx2, avx512 or avx512_bf16, up to this CPU's " +
                     widest + ", which is used\n");
        CHECK_EQ(chosen_with(argv[0], "baseline", "2>&1 >/dev/null"), "");
        for (size_t i = 0; i < kNames.size(); ++i) {
          const std::string& expected = i < index_of(widest) ? kNames[i] : widest;
          CHECK_EQ(chosen_with(argv[0], kNames[i].c_str()), expected);
        }
      });
}
