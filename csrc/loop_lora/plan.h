// Host planning of rrt::loop_lora_linear: which rows belong to which loop, and how rows and outputs are tiled.
// Pure C++17 over plain memory, so that kernels, host checks and tests share it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "packed_linear/row_operands.h"

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

// The part of one tile that is of one loop.
struct RowPiece {
  int64_t begin;
  int64_t rows;
  int64_t loop;
};

// How the rows [begin, begin + rows) of LoopGroups::order are computed.
struct RowBlock {
  int64_t begin;
  int64_t rows;
  std::vector<packed_linear::RowTile> tiles;  // they share the weight, whatever their loops
  std::vector<RowPiece> pieces;               // sorted by loop
  std::vector<int64_t> loop_starts;  // pieces[loop_starts[i] : loop_starts[i + 1]] are all the pieces of one loop
};

// Blocks of at most `block_rows` rows in tiles of at most `tile_rows`.
inline std::vector<RowBlock> plan_rows(const LoopGroups& groups, int64_t tile_rows, int64_t block_rows) {
  const int64_t total = groups.offsets.back();
  const int64_t num_loops = static_cast<int64_t>(groups.offsets.size()) - 1;
  std::vector<RowBlock> blocks;
  int64_t loop = 0;
  for (int64_t begin = 0; begin < total; begin += block_rows) {
    const int64_t rows = std::min(block_rows, total - begin);
    RowBlock block{begin, rows, packed_linear::split_rows(rows, tile_rows), {}, {}};
    for (const packed_linear::RowTile& tile : block.tiles) {
      const int64_t last = tile.begin + tile.rows;
      for (int64_t row = tile.begin; row < last;) {
        while (loop < num_loops && groups.offsets[loop + 1] <= begin + row) ++loop;
        const int64_t end = std::min(last, groups.offsets[loop + 1] - begin);
        if (block.pieces.empty() || block.pieces.back().loop != loop) {
          block.loop_starts.push_back(static_cast<int64_t>(block.pieces.size()));
        }
        block.pieces.push_back({row, end - row, loop});
        row = end;
      }
    }
    block.loop_starts.push_back(static_cast<int64_t>(block.pieces.size()));
    blocks.push_back(std::move(block));
  }
  return blocks;
}

}  // namespace rrt::loop_lora
