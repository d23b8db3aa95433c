// Team of decode_block/team.h: every part of every loop runs once, whoever comes; errors reach the caller.
#include <atomic>
#include <chrono>
#include <stdexcept>
#include <vector>

#include "decode_block/team.h"
#include "kernels.h"
#include "parallel.h"

using namespace rrt;
using namespace rrt::decode_block;
using namespace rrt::tests;

namespace {

// One thread comes late, after the leader may have ended; ranges are those of run_threaded.
void run_late(int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
  struct Late {
    void (*body)(int64_t, int64_t, void*);
    void* context;
  } late{body, context};
  run_threaded(
      begin, end, grain,
      [](int64_t from, int64_t to, void* raw) {
        const Late& l = *static_cast<Late*>(raw);
        if (from > 0) std::this_thread::sleep_for(std::chrono::milliseconds(2));
        l.body(from, to, l.context);
      },
      &late);
}

constexpr ParallelFor kWays[] = {run_serially, run_threaded, run_late};

void every_task_runs_once() {
  for (ParallelFor way : kWays) {
    int64_t loops = 0;
    Team::run(8, way, [&] {
      for (int64_t round = 0; round < 300; ++round) {
        for (int64_t count : {0, 1, 2, 7, 64, 65, 200}) {
          std::vector<std::atomic<int>> times(count);
          std::vector<int64_t> seen(count, -1);
          run_ranges(count, 1 + round % 5, Team::parallel_for, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) {
              ++times[i];
              seen[i] = i + round;
            }
          });
          // What the parts wrote is seen after the loop.
          for (int64_t i = 0; i < count; ++i) CHECK(times[i] == 1 && seen[i] == i + round);
          ++loops;
        }
      }
    });
    CHECK_EQ(loops, int64_t{2100});
  }
}

void errors_reach_the_caller() {
  for (ParallelFor way : kWays) {
    for (int64_t bad : {0, 5, 99}) {
      int64_t loops = 0;
      CHECK_THROWS(Team::run(4, way,
                             [&] {
                               for (;; ++loops) {
                                 run_ranges(100, 1, Team::parallel_for, [&](int64_t begin, int64_t end) {
                                   if (loops == 3 && begin <= bad && bad < end) throw std::runtime_error("bad");
                                 });
                               }
                             }),
                   std::runtime_error);
      CHECK_EQ(loops, int64_t{3});
    }
    CHECK_THROWS(Team::run(4, way, [] { throw std::runtime_error("between loops"); }), std::runtime_error);
  }
}

void teams_may_run_side_by_side_and_within_each_other() {
  std::atomic<int64_t> total{0};
  const auto count = [&](int64_t begin, int64_t end) { total += end - begin; };
  run_ranges(3, 1, run_threaded, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      Team::run(3, run_threaded, [&] {
        run_ranges(50, 1, Team::parallel_for, count);
        Team::run(2, run_threaded, [&] { run_ranges(50, 1, Team::parallel_for, count); });
        run_ranges(50, 1, Team::parallel_for, count);
      });
    }
  });
  CHECK_EQ(total.load(), int64_t{450});
}

}  // namespace

int main() {
  return rrt::tests::run(every_task_runs_once, errors_reach_the_caller,
                         teams_may_run_side_by_side_and_within_each_other);
}
