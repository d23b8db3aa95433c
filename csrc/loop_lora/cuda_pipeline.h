// The loop of the decode kernels: turns come to shared memory by asynchronous copies, from which the warps multiply
// them; cuda_decode.h explains the terms.
//
// A team of threads (a warp of the column kernel, a thread block of the row kernel) has a ring of its own. A turn lies
// in it as two k-steps, in each first the rows of W and then the tokens, 64 bytes of each, so four vectors. Eight
// threads copy a row's 128 bytes: a whole line of memory. For each of these copies and each matrix of ldmatrix to touch
// every bank once, 64 bytes lie between k-steps, and of row r vector v lies at place v ^ (r / 2 % 4).
//
// What a turn has to reckon is little, since it is the same for every turn: pointers run on by constants, the stages
// rotate. Only turns at the edge of a matrix ask which of their rows and columns exist.
#pragma once

#include "loop_lora/cuda_cursor.h"

namespace rrt::loop_lora {

template <class Half, int THREADS, int TILES, int TOKENS, int STAGES>
struct Pipeline {
  using Storage = typename Half::Storage;
  using Sums = float[TILES][TOKENS / 8][4];
  static constexpr int kRows = THREADS / 32 * 16 * TILES;  // of W
  static constexpr int kRowBytes = kStepColumns * 2;       // of a k-step
  static constexpr int kStepBytes = (kRows + TOKENS + 1) * kRowBytes;
  static constexpr int kStageBytes = kTurnSteps * kStepBytes;
  static constexpr int kBytes = STAGES * kStageBytes;
  static constexpr int kStepVectors = kStepColumns / kVectorElements;
  static constexpr int kLineThreads = kTurnSteps * kStepVectors;  // that copy a row's columns of a turn
  static constexpr int kCopyRows = THREADS / kLineThreads;  // that all threads of the team copy at a time
  static constexpr int kTurnColumns = kTurnSteps * kStepColumns;
  static constexpr int kBatchTiles = TOKENS <= 32 ? TOKENS / 8 : 4 / TILES;  // of 8 tokens, whose x is loaded at a time
  static constexpr int kBatches = TOKENS / 8 / kBatchTiles;
  static constexpr int kRowCopies = kRows / kCopyRows;  // of a thread in a turn
  static constexpr int kCopies = kRowCopies + ceil_div<kCopyRows>(TOKENS);

  // The ring begins at byte `begin` of shared memory; `rows` of the tile exist.
  RRT_DEVICE Pipeline(const Cursor<Storage>& at, int begin, int rows) : cursor(at) {
    const int thread = device::thread_index() % THREADS;
    const device::SharedAddress ring = device::shared_address(device::shared_memory() + begin);
    copy_row = thread / kLineThreads;
    copy_step = thread % kLineThreads / kStepVectors;
    const int vector = thread % kStepVectors;
    copy_column = vector * kVectorElements;
    copy_to = ring + copy_step * kStepBytes + place(copy_row, vector);
    rows_left = rows - copy_row;
    tokens_left = cursor.tile.tokens - copy_row;
    const int warp = thread / 32, lane = thread % 32;
    read_rows = ring + warp * 16 * TILES * kRowBytes + place(lane % 16, lane / 16);
    read_tokens = ring + kRows * kRowBytes + place(lane % 8, lane / 8);
    enter(cursor.weight_run());
  }

  // Fills the ring. W is a parameter, which the kernels before this one don't write; x may be what they write, so
  // unless it is ready it is read once they have ended, for which `wait` waits. If it is, it comes with W, in the order
  // in which the turns need it.
  template <class Wait>
  RRT_DEVICE void start(bool x_is_ready, Wait wait) {
    const int turns = full + partial, early = turns < STAGES - 1 ? turns : STAGES - 1;
    const Storage* x_turn = x_from;
    const int columns = columns_left;
    const auto copy_x = [&](int turn) {
      const Storage* from = x_turn + turn * kTurnColumns;
#pragma unroll
      for (int i = kRowCopies; i < kCopies; ++i) {
        copy<false>(i, from, turn * kStageBytes, columns - turn * kTurnColumns);
      }
    };
#pragma unroll 1
    for (int turn = 0; turn < early; ++turn) {
      const Storage* from = w_from + turn * kTurnColumns;
#pragma unroll
      for (int i = 0; i < kRowCopies; ++i) copy<false>(i, from, turn * kStageBytes, columns - turn * kTurnColumns);
      if (x_is_ready) copy_x(turn);
      device::copy_commit();
    }
    if (!x_is_ready) {
      wait();
#pragma unroll 1
      for (int turn = 0; turn < early; ++turn) {
        copy_x(turn);
        device::copy_commit();
      }
    }
    w_from += early * kTurnColumns;
    x_from += early * kTurnColumns;
    columns_left -= early * kTurnColumns;
    write = early * kStageBytes;
    partial -= early > full ? early - full : 0;
    full -= early < full ? early : full;
#pragma unroll 1
    for (int turn = early; turn < STAGES - 1; ++turn) fetch();
  }

  // Multiplies the next `count` turns into the sums, and fetches as many that are to come.
  RRT_DEVICE void multiply(int count, Sums& sums) {
    while (count > 0) {
      const int whole = count < full ? count : full;
      count -= whole;
      full -= whole;
#pragma unroll(TILES == 1 && THREADS > 32 ? 2 : 1)  // the end of an iteration waits for the last products
      for (int i = 0; i < whole; ++i) turn<true>(sums);
      columns_left -= whole * kTurnColumns;
      if (count > 0) {
        turn<false>(sums);
        --count;
      }
    }
  }

  Cursor<Storage> cursor;

 private:
  RRT_DEVICE static void team_barrier() {
    if constexpr (THREADS == 32) {
      device::warp_barrier();
    } else {
      device::block_barrier();
    }
  }

  // Of a row's vector, in bytes from the begin of the k-step.
  RRT_DEVICE static int place(int row, int vector) { return row * kRowBytes + (vector ^ row / 2 % 4) * 16; }

  RRT_DEVICE static int next_stage(int stage) {
    return stage == kBytes - kStageBytes ? 0 : stage + kStageBytes;
  }

  RRT_DEVICE void enter(const Run<Storage>& run) {
    const int column = copy_step * run.spacing + copy_column;
    w_from = run.w + copy_row * run.w_stride + column;
    x_from = run.x + copy_row * run.x_stride + column;
    w_step = static_cast<uint32_t>(kCopyRows * run.w_stride);
    x_step = static_cast<uint32_t>(kCopyRows * run.x_stride);
    columns_left = run.columns - column;
    advance = kTurnSteps * run.spacing;
    // Whether a turn is whole is the same for all threads of the team.
    const bool whole_rows = rows_left + copy_row >= kRows;
    full = whole_rows && run.spacing == kStepColumns ? run.columns / kTurnColumns : 0;
    partial = run.turns - full;
  }

  // Multiplies a turn, and fetches the one that takes the place of the turn before. WHOLE: that one is the next of a
  // run and lies in the matrix wholly. Its copies then come among the products, in whose time they are issued. Tokens
  // are loaded a batch ahead of their products.
  template <bool WHOLE>
  RRT_DEVICE void turn(Sums& sums) {
    device::copy_wait<STAGES - 2>();
    team_barrier();  // every thread's copies are here, and the stage that the next fetch fills has been read
    const device::SharedAddress rows = read_rows + read, tokens = read_tokens + read;
    read = next_stage(read);
    if (!WHOLE) fetch();
    const Storage *w_at = w_from, *x_at = x_from;
    uint32_t w[kTurnSteps][2][TILES][4], x[2][kBatchTiles][4];
    const auto load = [&](int batch) {
      const int step = batch / kBatches;
#pragma unroll
      for (int i = 0; batch % kBatches == 0 && i < 2 * TILES; ++i) {
        // Vectors 2 and 3 lie where 0 and 1 do, but for one bit.
        const int half = i / TILES, tile = i % TILES;
        device::load_matrices(w[step][half][tile], (rows ^ (half * 32)) + step * kStepBytes + tile * 16 * kRowBytes);
      }
#pragma unroll
      for (int i = 0; i < kBatchTiles; ++i) {
        const int token_tile = batch % kBatches * kBatchTiles + i;
        device::load_matrices(x[batch % 2][i], tokens + step * kStepBytes + token_tile * 8 * kRowBytes);
      }
    };
    constexpr int kLast = kTurnSteps * kBatches - 1;
    load(0);
#pragma unroll
    for (int batch = 0; batch <= kLast; ++batch) {
      if (batch < kLast) load(batch + 1);
      if (WHOLE && batch == 1) {  // once: the compiler guards each change from loads to copies by three instructions
#pragma unroll
        for (int i = 0; i < kCopies; ++i) copy<true>(i, i < kRowCopies ? w_at : x_at, write, 0);
        device::copy_commit();
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int i = 0; i < kBatchTiles; ++i) {
          const uint32_t b[2] = {x[batch % 2][i][2 * half], x[batch % 2][i][2 * half + 1]};
#pragma unroll
          for (int tile = 0; tile < TILES; ++tile) {
            Half::multiply(sums[tile][batch % kBatches * kBatchTiles + i], w[batch / kBatches][half][tile], b);
          }
        }
      }
    }
    if (!WHOLE) return;
    w_from += kTurnColumns;
    x_from += kTurnColumns;
    write = next_stage(write);
  }

  RRT_DEVICE void fetch() {
    if (find_turn()) {
      const Storage *w = w_from, *x = x_from;
#pragma unroll
      for (int i = 0; i < kCopies; ++i) copy<false>(i, i < kRowCopies ? w : x, write, columns_left);
      w_from += advance;
      x_from += advance;
      columns_left -= advance;
    }
    device::copy_commit();
    write = next_stage(write);
  }

  // Counts the next turn as fetched; false if there is none.
  RRT_DEVICE bool find_turn() {
    if (full + partial == 0) {
      Run<Storage> run;
      if (!cursor.next(run)) return false;
      enter(run);
    }
    if (full > 0) {
      --full;
    } else {
      --partial;
    }
    return true;
  }

  // This thread's i-th copy of a turn, after which `from` is where the next one begins: first those of rows, then those
  // of tokens. WHOLE: all of the tile's rows exist, and all columns of the turn.
  template <bool WHOLE>
  RRT_DEVICE void copy(int i, const Storage*& from, int stage, int columns) const {
    const bool of_row = i < kRowCopies;
    if (!of_row && TOKENS < kCopyRows && copy_row >= TOKENS) return;
    const int row = (of_row ? i : i - kRowCopies) * kCopyRows;  // from copy_row on
    const bool valid = (WHOLE || columns > 0) && (of_row ? WHOLE || row < rows_left : row < tokens_left);
    // Rows that are four apart swap their first two places with the others.
    const device::SharedAddress to = (copy_to ^ row / 2 % 4 * 16) + stage + (of_row ? row : kRows + row) * kRowBytes;
    device::copy_async(to, from, valid);
    from += of_row ? w_step : x_step;
  }

  // This thread's copies: of rows copy_row, copy_row + kCopyRows, ..., in each one vector of columns.
  int copy_row, copy_step, copy_column;
  device::SharedAddress copy_to;  // in the first stage
  int rows_left, tokens_left;  // that exist from copy_row on
  const Storage *w_from, *x_from;  // for the next turn of the run
  uint32_t w_step, x_step;         // elements from one of the thread's rows to the next
  int columns_left;                // from the thread's vector to the end of the run
  int advance;                     // columns from a turn to the next
  int full, partial;               // turns of the run to come: first those that lie in the matrix wholly

  device::SharedAddress read_rows, read_tokens;  // what this lane points at for ldmatrix, in the first stage
  int write = 0, read = 0;  // the stages that are written and read next, in bytes from the first one
};

// Of shrink: the bits of the lane's tokens, two of every 8 of the tile, that are of `loop`.
template <int TOKEN_TILES>
RRT_DEVICE uint32_t find_tokens_of_loop(const DecodeArgs& args, const DecodeTile& tile, int loop) {
  int loops[2 * TOKEN_TILES];
#pragma unroll
  for (int i = 0; i < 2 * TOKEN_TILES; ++i) {
    const int token = device::thread_index() % 4 * 2 + i / 2 * 8 + i % 2;
    loops[i] = token < tile.tokens ? device::load_global(args.loops + tile.token_begin + token) : -1;
  }
  uint32_t bits = 0;
#pragma unroll
  for (int i = 0; i < 2 * TOKEN_TILES; ++i) bits |= static_cast<uint32_t>(loops[i] == loop) << i;
  return bits;
}

// Of shrink, in the late order: asks the second-level cache for some of W, which memory brings until the product is
// launched. A lane gives one hint at most, since those of a warp take turns. WARPS: of a block; GROUPS: the grid's z.
template <class Storage, int ROWS, int TOKENS, int WARPS, int GROUPS>
RRT_DEVICE void prefetch_weight(const DecodeArgs& args) {
  const device::Index block = device::block_index();
  const int warp = device::thread_index() / 32, lane = device::thread_index() % 32;
  const int tiles = ceil_div<ROWS>(args.total_rank) * ceil_div<TOKENS>(args.m);
  const int of_all = ((block.z * args.num_loops + block.y) * tiles + block.x) * WARPS + warp;
  const int part = (lane * GROUPS * args.num_loops * tiles * WARPS + of_all) * args.hint_parts;
  const int row = part / kParts * args.hint_row_step;
  if (row >= args.hint_rows) return;
  const int column = first_step_of(part % kParts, ceil_div<kStepColumns>(args.k)) * kStepColumns;
  const auto* from = static_cast<const Storage*>(args.weight) + static_cast<int64_t>(row) * args.k + column;
  device::prefetch(from, args.hint_columns * static_cast<int>(sizeof(Storage)));
}

// Of shrink: fills the ring, gives hints, waits, and lets what follows start if it has not; false if no token of the
// tile is of `loop`. Where nothing is fetched before the wait, that is known before A_l is asked for. `load_loops` loads
// what else is needed of the loops, in the same trip to memory.
template <class Turns, class LoadLoops, class Prefetch>
RRT_DEVICE bool start_shrink(Turns& turns, const DecodeArgs& args, const DecodeTile& tile, int loop,
                             LoadLoops load_loops, Prefetch prefetch) {
  const auto wait = [&] {
    device::dependency_wait();
    if (!args.starts_early) device::launch_dependents();
  };
  const auto has_loop = [&] {
    load_loops();
    const LanesLoops loops = load_lanes_loops(args, tile);
    return device::any_lane(loops.first == loop || loops.second == loop);
  };
  if (!args.prefetches) {
    wait();
    if (!has_loop()) return false;
  }
  turns.start(false, [&] {
    prefetch();
    wait();
  });
  if (!args.prefetches || has_loop()) return true;
  device::copy_wait<0>();
  return false;
}

}  // namespace rrt::loop_lora
