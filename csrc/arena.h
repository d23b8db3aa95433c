// Uninitialised memory, handed out in parts that begin on a cache line.
#pragma once

#include <cstdint>
#include <memory>

#include "rounding.h"

namespace rrt {

class Arena {
 public:
  // Where the part will begin; at() after allocate() tells its address.
  template <class T>
  int64_t reserve(int64_t count) {
    const int64_t begin = size_;
    size_ += round_up(count * static_cast<int64_t>(sizeof(T)), kLine);
    return begin;
  }
  void allocate() {
    memory_.reset(new char[size_ + kLine]);
    base_ = memory_.get() + (kLine - reinterpret_cast<uintptr_t>(memory_.get()) % kLine) % kLine;
  }
  char* at(int64_t begin) const { return base_ + begin; }

 private:
  static constexpr int64_t kLine = 64;
  int64_t size_ = 0;
  std::unique_ptr<char[]> memory_;
  char* base_ = nullptr;
};

}  // namespace rrt
