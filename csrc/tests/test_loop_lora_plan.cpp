// Grouping of rows by loop, and blocks, tiles and pieces of rows.
#include <set>
#include <vector>

#include "check.h"
#include "loop_lora/plan.h"

using namespace rrt::loop_lora;
using namespace rrt::tests;

namespace {

// From one row per loop to all rows of one, with loops that have none.
std::vector<int32_t> random_loops(Random& random, int64_t num_rows, int64_t num_loops) {
  std::vector<int32_t> loops(num_rows);
  const int64_t used = between(random, 1, num_loops), first = between(random, 0, num_loops - used);
  for (int32_t& loop : loops) loop = static_cast<int32_t>(first + between(random, 0, used - 1));
  return loops;
}

void groups_are_a_stable_sort() {
  Random random(1);
  for (int round = 0; round < 300; ++round) {
    const int64_t num_rows = between(random, 0, 60), num_loops = between(random, 1, 9);
    const auto loops = random_loops(random, num_rows, num_loops);
    const LoopGroups groups = group_rows_by_loop(loops.data(), num_rows, num_loops);
    CHECK(groups.ok());
    CHECK_EQ(groups.order.size(), loops.size());
    CHECK_EQ(groups.offsets.size(), static_cast<size_t>(num_loops) + 1);
    CHECK_EQ(groups.offsets.front(), 0);
    CHECK_EQ(groups.offsets.back(), num_rows);
    CHECK_EQ(std::set<int64_t>(groups.order.begin(), groups.order.end()).size(), loops.size());
    for (int64_t loop = 0; loop < num_loops; ++loop) {
      for (int64_t i = groups.offsets[loop]; i < groups.offsets[loop + 1]; ++i) {
        CHECK_EQ(loops[groups.order[i]], loop);
        if (i > groups.offsets[loop]) CHECK(groups.order[i] > groups.order[i - 1]);
      }
    }
  }
}

void the_first_bad_row_is_named() {
  for (int32_t bad : {-1, 3, 1 << 30}) {
    const std::vector<int32_t> loops = {0, 2, bad, 1, bad};
    const LoopGroups groups = group_rows_by_loop(loops.data(), 5, 3);
    CHECK(!groups.ok());
    CHECK_EQ(groups.bad_row, 2);
  }
  CHECK(group_rows_by_loop(nullptr, 0, 0).ok());
}

void check_block(const RowBlock& block, const std::vector<int32_t>& sorted_loops, int64_t tile_rows) {
  const int64_t num_tiles = rrt::ceil_div(block.rows, tile_rows);
  CHECK_EQ(static_cast<int64_t>(block.tiles.size()), num_tiles);
  std::set<int64_t> tile_ends;
  int64_t row = 0;
  for (const rrt::packed_linear::RowTile& tile : block.tiles) {
    CHECK_EQ(tile.begin, row);
    // Nearly equal, so that no tile is too small to be worth its pass over the weights.
    CHECK(tile.rows == block.rows / num_tiles || tile.rows == rrt::ceil_div(block.rows, num_tiles));
    CHECK(tile.rows <= tile_rows);
    row += tile.rows;
    tile_ends.insert(row);
  }
  CHECK_EQ(row, block.rows);

  row = 0;
  for (const RowPiece& piece : block.pieces) {
    CHECK_EQ(piece.begin, row);
    CHECK(piece.rows > 0);
    for (int64_t i = row; i < row + piece.rows; ++i) CHECK_EQ(sorted_loops[block.begin + i], piece.loop);
    const auto tile_end = tile_ends.upper_bound(row);
    CHECK(tile_end != tile_ends.end() && row + piece.rows <= *tile_end);
    row += piece.rows;
  }
  CHECK_EQ(row, block.rows);

  CHECK_EQ(block.loop_starts.front(), 0);
  CHECK_EQ(block.loop_starts.back(), static_cast<int64_t>(block.pieces.size()));
  int64_t last_loop = -1;
  for (size_t i = 0; i + 1 < block.loop_starts.size(); ++i) {
    CHECK(block.loop_starts[i] < block.loop_starts[i + 1]);
    const int64_t loop = block.pieces[block.loop_starts[i]].loop;
    CHECK(loop > last_loop);
    last_loop = loop;
    for (int64_t j = block.loop_starts[i]; j < block.loop_starts[i + 1]; ++j) CHECK_EQ(block.pieces[j].loop, loop);
  }
}

void tiles_and_pieces_cover_every_row_once() {
  Random random(2);
  for (int round = 0; round < 500; ++round) {
    const int64_t num_rows = between(random, 0, 100), num_loops = between(random, 1, 9);
    const int64_t tile_rows = between(random, 1, 13), block_rows = between(random, 1, 50);
    const auto loops = random_loops(random, num_rows, num_loops);
    const LoopGroups groups = group_rows_by_loop(loops.data(), num_rows, num_loops);
    std::vector<int32_t> sorted_loops;
    for (int64_t row : groups.order) sorted_loops.push_back(loops[row]);
    int64_t begin = 0;
    for (const RowBlock& block : plan_rows(groups, tile_rows, block_rows)) {
      CHECK_EQ(block.begin, begin);
      CHECK_EQ(block.rows, std::min(block_rows, num_rows - begin));
      check_block(block, sorted_loops, tile_rows);
      begin += block.rows;
    }
    CHECK_EQ(begin, num_rows);
  }
}

}  // namespace

int main() {
  return run(groups_are_a_stable_sort, the_first_bad_row_is_named, tiles_and_pieces_cover_every_row_once);
}
