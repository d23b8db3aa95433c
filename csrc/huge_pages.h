#pragma once

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <cstdint>

#include "rounding.h"

namespace rrt {

// Asks for huge pages under memory that is about to be written: a stream of weights otherwise spends a good part of its
// time on address translation, above all in a virtual machine. A request that is refused changes nothing.
inline void advise_huge_pages([[maybe_unused]] void* memory, [[maybe_unused]] int64_t bytes) {
#ifdef __linux__
  constexpr uintptr_t kHugePage = 2 << 20;
  const auto begin = round_up(reinterpret_cast<uintptr_t>(memory), kHugePage);
  const auto end = (reinterpret_cast<uintptr_t>(memory) + bytes) / kHugePage * kHugePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace rrt
