// Host planning of rrt::loop_lora_linear: which rows belong to which loop.
// Pure C++17 over plain memory, so that kernels, host checks and tests share it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace rrt::loop_lora {

// Rows sorted by loop; within a loop in their order of appearance.
struct LoopGroups {
  std::vector<int64_t> order;    // [M]: the rows of loop 0, then those of loop 1, ...
  std::vector<int64_t> offsets;  // [num_loops + 1]: loop l has order[offsets[l] : offsets[l + 1]]
  int64_t bad_row = -1;          // first row whose loop lies outside [0, num_loops); the rest is then empty

  bool ok() const { return bad_row < 0; }
};

inline LoopGroups group_rows_by_loop(const int32_t* loops, int64_t num_rows, int64_t num_loops) {
  LoopGroups groups;
  std::vector<int64_t> offsets(num_loops + 1, 0);
  for (int64_t row = 0; row < num_rows; ++row) {
    if (loops[row] < 0 || loops[row] >= num_loops) {
      groups.bad_row = row;
      return groups;
    }
    ++offsets[loops[row] + 1];
  }
  for (int64_t loop = 0; loop < num_loops; ++loop) offsets[loop + 1] += offsets[loop];
  std::vector<int64_t> next(offsets.begin(), offsets.end() - 1);
  groups.order.resize(num_rows);
  for (int64_t row = 0; row < num_rows; ++row) groups.order[next[loops[row]]++] = row;
  groups.offsets = std::move(offsets);
  return groups;
}

// At most `max_rows` consecutive entries of LoopGroups::order, all of one loop.
struct RowTile {
  int64_t begin;
  int64_t rows;
  int64_t loop;
};

inline std::vector<RowTile> tile_groups(const LoopGroups& groups, int64_t max_rows) {
  std::vector<RowTile> tiles;
  for (int64_t loop = 0; loop + 1 < static_cast<int64_t>(groups.offsets.size()); ++loop) {
    const int64_t end = groups.offsets[loop + 1];
    for (int64_t begin = groups.offsets[loop]; begin < end; begin += max_rows) {
      tiles.push_back({begin, std::min(max_rows, end - begin), loop});
    }
  }
  return tiles;
}

}  // namespace rrt::loop_lora
