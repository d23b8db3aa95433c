// The order in which a decode kernel goes through its k-steps; cuda_decode.h explains the terms.
#pragma once

#include "loop_lora/cuda_decode.h"

namespace rrt::loop_lora {

// A part has consecutive k-steps of W, and every kParts-th one of each B_l: ranks are too few to give each part a run.
RRT_DEVICE int first_step_of(int part, int column_steps) { return column_steps * part / kParts; }
RRT_DEVICE int num_column_steps(int part, int column_steps) {
  return first_step_of(part + 1, column_steps) - first_step_of(part, column_steps);
}
RRT_DEVICE int num_rank_steps(int part, int rank_steps) {
  return rank_steps > part ? ceil_div<kParts>(rank_steps - part) : 0;
}

// Goes through the parts [part, last_part): in each through the k-steps of W, then through those of B_l for every loop
// of the tile. Before the first of B_l it waits for the kernel before this one, which writes T.
template <class Storage>
struct Cursor {
  const DecodeArgs& args;
  DecodeTile tile;
  const Storage* weight;  // the tile's first row
  const Storage* x;       // the tile's first token
  int part, last_part;
  int column_steps;  // k-steps of W
  int rank_steps;    // k-steps of a B_l
  int rank_begin, rank;  // of the tile's segment

  uint32_t loop_mask = 0;  // once `waited`
  bool waited = false;

  // The position: k-steps [step, end) of W (loop -1) or of B_l are still to come, then those of `loops_left`.
  int step = 0, end = 0, loop = -1;
  uint32_t loops_left = 0;

  // The k-step that next() found: its first column in the tile's first row and first token, and how many columns from
  // there on exist, which may be more than a k-step has.
  const Storage *w_from = nullptr, *x_from = nullptr;
  int64_t w_stride = 0, x_stride = 0;
  int columns = 0;

  RRT_DEVICE explicit Cursor(const DecodeArgs& decode_args) : args(decode_args) {}

  RRT_DEVICE void begin_part() {
    loop = -1;
    step = first_step_of(part, column_steps);
    end = first_step_of(part + 1, column_steps);
  }

  // Goes to the next k-step; false if there is none.
  RRT_DEVICE bool next() {
    while (step >= end) {
      if (loop < 0) {
        if (!waited && rank_steps > 0) {
          device::dependency_wait();
          loop_mask = find_loop_mask(args.loops, tile.token_begin, tile.tokens, args.num_loops);
          waited = true;
        }
        loops_left = loop_mask;
      }
      if (loops_left == 0) {
        if (part + 1 >= last_part) return false;
        ++part;
        begin_part();
        continue;
      }
      loop = 0;
      while ((loops_left >> loop & 1) == 0) ++loop;
      loops_left &= loops_left - 1;
      step = part;
      end = rank_steps;
    }
    const int column = step * kStepColumns;
    if (loop < 0) {
      w_from = weight + column;
      w_stride = args.k;
      x_from = x + column;
      x_stride = args.x_stride;
      columns = args.k - column;
      ++step;
    } else {
      w_from = static_cast<const Storage*>(args.lora_b) +
               (static_cast<int64_t>(loop) * args.n + tile.row_begin) * args.b_stride + column;
      w_stride = args.b_stride;
      x_from = static_cast<const Storage*>(args.shrunk) +
               (static_cast<int64_t>(loop) * args.padded_m + tile.token_begin) * args.total_rank + rank_begin + column;
      x_stride = args.total_rank;
      columns = rank - column;
      step += kParts;
    }
    return true;
  }

  // All k-steps of a part. Only right once the cursor is past W in that part, when it knows the loop mask.
  RRT_DEVICE int k_steps(int of_part) const {
    int num_loops = 0;
    for (uint32_t bits = loop_mask; bits != 0; bits &= bits - 1) ++num_loops;
    return num_column_steps(of_part, column_steps) + num_loops * num_rank_steps(of_part, rank_steps);
  }
};

// Before the first k-step of parts [part, last_part) of a tile; `matrix` is W or, for shrink, A_l, which has no B_l.
template <class Storage>
RRT_DEVICE Cursor<Storage> make_cursor(const DecodeArgs& args, const Storage* matrix, const DecodeTile& tile, int part,
                                       int last_part, bool has_rank) {
  int segment = 0;
  while (has_rank && segment + 1 < args.num_segments && args.segment_out[segment + 1] <= tile.row_begin) ++segment;
  Cursor<Storage> cursor(args);
  cursor.tile = tile;
  cursor.weight = matrix + static_cast<int64_t>(tile.row_begin) * args.k;
  cursor.x = static_cast<const Storage*>(args.x) + tile.token_begin * args.x_stride;
  cursor.part = part;
  cursor.last_part = last_part;
  cursor.column_steps = ceil_div<kStepColumns>(args.k);
  const int rank = has_rank ? args.segment_size[segment] : 0;
  cursor.rank_steps = ceil_div<kStepColumns>(rank);
  cursor.rank_begin = args.segment_rank[segment];
  cursor.rank = rank;
  cursor.begin_part();
  return cursor;
}

}  // namespace rrt::loop_lora
