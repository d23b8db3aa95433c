// Uninitialised memory, handed out in parts that begin on a cache line.
#pragma once

#include <cstdint>
#include <memory>

#include "rounding.h"

namespace rrt {

class Arena {
 public:
  // Calls take_parts() twice, which assigns what take() returns to where it belongs: first to measure, then to hand
  // out.
  template <class TakeParts>
  void fill(const TakeParts& take_parts) {
    take_parts();
    memory_.reset(new char[size_ + kLine]);
    base_ = memory_.get() + (kLine - reinterpret_cast<uintptr_t>(memory_.get()) % kLine) % kLine;
    size_ = 0;
    take_parts();
  }

  template <class T>
  T* take(int64_t count) {
    const int64_t begin = size_;
    size_ += round_up(count * static_cast<int64_t>(sizeof(T)), kLine);
    return base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + begin);
  }

 private:
  static constexpr int64_t kLine = 64;
  int64_t size_ = 0;
  std::unique_ptr<char[]> memory_;
  char* base_ = nullptr;
};

}  // namespace rrt
