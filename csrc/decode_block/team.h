// Threads that stay together for many short parallel loops in a row: starting them anew would take as long as a loop.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <utility>

#include "dtype.h"
#include "rounding.h"

namespace rrt::decode_block {

// The thread that calls run() leads: it goes through `work`, whose loops run over Team::parallel_for, and publishes each
// loop as parts that whichever thread is free takes. So no loop waits for a thread that has not come yet, or never does.
class Team {
 public:
  // Calls work() once, on the caller's thread, while up to max_threads - 1 others of `parallel_for` take part in its
  // loops. An exception of any part is thrown here.
  template <class Work>
  static void run(int64_t max_threads, ParallelFor parallel_for, const Work& work) {
    struct Context {
      Team team;
      const Work& work;
    } context{{}, work};
    parallel_for(
        0, max_threads, 1,
        [](int64_t begin, int64_t, void* raw) {
          auto& c = *static_cast<Context*>(raw);
          // Each thread has one range, and the leader the first.
          if (begin == 0) {
            c.team.lead(c.work);
          } else {
            c.team.follow();
          }
        },
        &context);
    if (context.team.error_) std::rethrow_exception(context.team.error_);
  }

  // A ParallelFor, for the leader within run(). Ranges do not depend on how many threads there are.
  static void parallel_for(int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void*),
                           void* context) {
    const int64_t parts = std::min(kMaxParts, ceil_div(end - begin, std::max<int64_t>(1, grain)));
    if (parts > 1) {
      leading_->share({begin, end, ceil_div(end - begin, parts), body, context});
    } else if (begin < end) {
      body(begin, end, context);
    }
  }

 private:
  static constexpr int64_t kMaxParts = 64;
  static constexpr int kSpins = 1024;  // before a thread lets others run: some tens of microseconds

  struct Loop {
    int64_t begin, end, part_size;
    void (*body)(int64_t, int64_t, void*);
    void* context;
  };

  // Which part is next, of how many, in one number: so a thread cannot take a part of one loop for one of another.
  // Whoever takes a part may read loop_ until it has counted it as done, since the leader waits for that.
  static constexpr int kShift = 32;
  static uint64_t ticket(int64_t parts) { return static_cast<uint64_t>(parts) << kShift; }

  template <class Work>
  void lead(const Work& work) {
    Team* before = leading_;
    leading_ = this;
    try {
      work();
    } catch (...) {
      keep_error();
    }
    leading_ = before;
    finished_.store(true, std::memory_order_release);
  }

  void follow() {
    for (int spins = 0; !finished_.load(std::memory_order_acquire);) {
      if (take_part()) {
        spins = 0;
      } else {
        pause(spins);
      }
    }
  }

  void share(const Loop& loop) {
    const int64_t parts = ceil_div(loop.end - loop.begin, loop.part_size);
    loop_ = loop;
    done_.store(0, std::memory_order_relaxed);
    next_.store(ticket(parts), std::memory_order_release);
    while (take_part()) {
    }
    for (int spins = 0; done_.load(std::memory_order_acquire) < parts;) pause(spins);
    std::exception_ptr error;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      error = std::exchange(error_, nullptr);
    }
    if (error) std::rethrow_exception(error);
  }

  bool take_part() {
    const auto is_left = [](uint64_t t) { return (t & 0xffffffff) < t >> kShift; };
    if (!is_left(next_.load(std::memory_order_relaxed))) return false;
    const uint64_t taken = next_.fetch_add(1, std::memory_order_acq_rel);
    if (!is_left(taken)) return false;
    const int64_t begin = loop_.begin + static_cast<int64_t>(taken & 0xffffffff) * loop_.part_size;
    try {
      loop_.body(begin, std::min(loop_.end, begin + loop_.part_size), loop_.context);
    } catch (...) {
      keep_error();
    }
    done_.fetch_add(1, std::memory_order_release);
    return true;
  }

  void keep_error() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!error_) error_ = std::current_exception();
  }

  static void pause(int& spins) {
    if (++spins < kSpins) {
#ifdef RRT_X86
      __builtin_ia32_pause();
#endif
    } else {
      std::this_thread::yield();
    }
  }

  static inline thread_local Team* leading_ = nullptr;
  Loop loop_{};
  alignas(64) std::atomic<uint64_t> next_{0};
  alignas(64) std::atomic<int64_t> done_{0};
  alignas(64) std::atomic<bool> finished_{false};
  std::mutex mutex_;
  std::exception_ptr error_;
};

}  // namespace rrt::decode_block
