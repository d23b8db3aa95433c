// Tasks dealt out to threads, and the memory that a thread keeps between calls. Host only.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>

#include "dtype.h"

namespace rrt {

// The number of tasks of `cost` each that make `worth`, the work that is worth a thread.
inline int64_t grain_of(int64_t worth, int64_t cost) {
  return std::max<int64_t>(1, worth / std::max<int64_t>(1, cost));
}

// Calls run(begin, end) over disjoint ranges of the tasks [0, count).
template <class Run>
void run_ranges(int64_t count, int64_t grain, ParallelFor parallel_for, const Run& run) {
  parallel_for(
      0, count, grain,
      [](int64_t begin, int64_t end, void* raw) { (*static_cast<const Run*>(raw))(begin, end); },
      const_cast<void*>(static_cast<const void*>(&run)));
}

// Calls run(task, memory) for the tasks [0, count). They may differ in size: a thread takes the next one when it is
// free, not a range. Each thread has what make_memory() returns.
template <class MakeMemory, class Run>
void run_tasks(int64_t count, int64_t grain, ParallelFor parallel_for, const MakeMemory& make_memory, const Run& run) {
  std::atomic<int64_t> next{0};
  run_ranges(count, grain, parallel_for, [&](int64_t, int64_t) {
    if (next >= count) return;
    const auto memory = make_memory();
    for (int64_t task = next++; task < count; task = next++) run(task, memory);
  });
}

// Memory for a thread_local: fresh pages at every call would cost more than filling them.
class KeptMemory {
 public:
  char* reserve(int64_t bytes) {
    constexpr int64_t kAlign = 64;
    if (bytes > size_) {
      size_ = 0;  // should the allocation fail
      memory_.reset(new char[bytes + kAlign]());  // pages that were never written would slow prefetches from them
      size_ = bytes;
    }
    const auto address = reinterpret_cast<uintptr_t>(memory_.get());
    return memory_.get() + (kAlign - address % kAlign) % kAlign;
  }

  // Gives back what an unusually large call left.
  void trim() {
    constexpr int64_t kKeptBytes = int64_t{64} << 20;
    if (size_ <= kKeptBytes) return;
    memory_.reset();
    size_ = 0;
  }

 private:
  std::unique_ptr<char[]> memory_;
  int64_t size_ = 0;
};

}  // namespace rrt
