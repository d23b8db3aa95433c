// Where the k-steps of a decode kernel lie, and in which order they come; cuda_decode.h explains the terms.
#pragma once

#include "loop_lora/cuda_decode.h"

namespace rrt::loop_lora {

// A part has consecutive k-steps of W, and every kParts-th one of each B_l: ranks are too few to give each part a run.
// The last part has the first one: with few ranks, T is then needed late, and W of the parts before is a single run.
RRT_DEVICE int first_rank_step_of(int part) { return kParts - 1 - part; }
RRT_DEVICE int first_step_of(int part, int column_steps) { return column_steps * part / kParts; }
RRT_DEVICE int num_column_steps(int part, int column_steps) {
  return first_step_of(part + 1, column_steps) - first_step_of(part, column_steps);
}
RRT_DEVICE int num_rank_steps(int part, int rank_steps) {
  return ceil_div<kParts>(rank_steps - first_rank_step_of(part));  // 0 from -7 on
}

// k-steps that lie at even distances: those of a part in W, or in one B_l.
template <class Storage>
struct Run {
  const Storage *w, *x;  // the first column, in the first row of the tile and in its first token
  int64_t w_stride, x_stride;
  int columns;  // from the first one to the end of the matrix, or of the part
  int spacing;  // columns from a k-step to the next
  int turns;
};

// Goes through the runs of parts [part, last_part) of a tile: in each part W, then B_l for every loop of the tile. What
// comes after the first run may need the loops, which must be ready then, and T, for which it waits. For shrink, W is
// A_l, and there is no B_l. Holds what it cannot compute again: the loop of turns needs the registers.
template <class Storage>
struct Cursor {
  const DecodeArgs& args;
  const DecodeTile tile;
  const Storage* const matrix;  // W or A_l
  const int segment;            // of the tile; kNoSegment for shrink
  int part;
  const int last_part;

  // Of the part, these are still to come.
  bool in_weight = true;
  uint32_t loops_left = 0;

  uint32_t loop_mask = 0;  // once W of the first part has been left behind
  int num_loops = 0;       // the bits of the mask

  static constexpr int kNoSegment = -1;

  // Finds the next run that is not empty; false if there is none.
  RRT_DEVICE bool next(Run<Storage>& run) {
    for (;;) {
      if (in_weight) {
        in_weight = false;
        if (rank_turns(part) == 0) continue;
        if (num_loops == 0) {
          loop_mask = find_loop_mask(args, tile);
          for (uint32_t bits = loop_mask; bits != 0; bits &= bits - 1) ++num_loops;
          device::dependency_wait();
        }
        loops_left = loop_mask;
      } else if (loops_left == 0) {
        if (part + 1 >= last_part) return false;
        ++part;
        in_weight = true;
        run = weight_run();
        if (run.turns > 0) return true;
        continue;
      }
      if (loops_left == 0) continue;
      int loop = 0;
      while ((loops_left >> loop & 1) == 0) ++loop;
      loops_left &= loops_left - 1;
      run = rank_run(loop);
      return true;
    }
  }

  // W in this part and in those that follow at once: with no B_l between them, and whole turns up to their begin. The
  // cursor is then in the last of them. To begin a run takes much longer than to go on in one.
  RRT_DEVICE Run<Storage> weight_run() {
    const int column_steps = ceil_div<kStepColumns>(args.k);
    const int first_step = first_step_of(part, column_steps);
    while (part + 1 < last_part && rank_turns(part) == 0 &&
           (first_step_of(part + 1, column_steps) - first_step) % kTurnSteps == 0) {
      ++part;
    }
    const int begin = first_step * kStepColumns, end = first_step_of(part + 1, column_steps) * kStepColumns;
    return {matrix + static_cast<int64_t>(tile.row_begin) * args.k + begin,
            static_cast<const Storage*>(args.x) + tile.token_begin * args.x_stride + begin,
            args.k,
            args.x_stride,
            (end < args.k ? end : args.k) - begin,
            kStepColumns,
            ceil_div<kTurnSteps>(end / kStepColumns - first_step)};
  }

  RRT_DEVICE Run<Storage> rank_run(int loop) const {
    const int begin = first_rank_step_of(part) * kStepColumns;
    return {static_cast<const Storage*>(args.lora_b) +
                (static_cast<int64_t>(loop) * args.n + tile.row_begin) * args.b_stride + begin,
            static_cast<const Storage*>(args.shrunk) +
                (static_cast<int64_t>(loop) * args.padded_m + tile.token_begin) * args.total_rank +
                args.segment_rank[segment] + begin,
            args.b_stride,
            args.total_rank,
            rank() - begin,
            kParts * kStepColumns,
            rank_turns(part)};
  }

  RRT_DEVICE int rank() const { return args.segment_size[segment]; }
  RRT_DEVICE int weight_turns(int of_part) const {
    return ceil_div<kTurnSteps>(num_column_steps(of_part, ceil_div<kStepColumns>(args.k)));
  }
  RRT_DEVICE int rank_turns(int of_part) const {
    if (segment == kNoSegment) return 0;
    return ceil_div<kTurnSteps>(num_rank_steps(of_part, ceil_div<kStepColumns>(rank())));
  }
};

// The last segment that begins at or before a row.
RRT_DEVICE int find_segment(const DecodeArgs& args, int row) {
  int segment = 0;
  while (segment + 1 < args.num_segments && args.segment_out[segment + 1] <= row) ++segment;
  return segment;
}

}  // namespace rrt::loop_lora
