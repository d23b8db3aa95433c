// Bodies of the decode kernels: y = W x + b + B_l A_l x for a tile of tokens of mixed loops, W read once for all.
//
// Weight rows are the mma's M, tokens its N. The columns of W are cut in 8 parts. A part is summed by itself, first over
// W, then over its share of B_l of each loop present, times T_l = A_l x, in which the rows of other loops are zeros; the
// parts' sums are added in order. So the order of every sum is the layer's, whatever tokens are in the batch, however
// they are tiled, and whichever of two kernels runs:
//
//   column kernel  a block has 16 outputs; its 8 warps have a part each. Fewest bytes wait for anybody; but x is brought
//                  once for every 16 outputs. Shrink, which writes T, is this kernel with A_l for W.
//   row kernel     a block has 128 outputs, 32 per warp, and all or some of the parts one after the other; its warps
//                  share x. Where a block has some only, it writes their sums, and add_parts_body adds them.
//
// Columns may be taken in any order as long as W and x agree. So a lane loads 16 adjacent bytes per row, straight
// into a ring in shared memory, and they are its fragments of two mmas: weights in slots that are the lane's own.
#pragma once

#include <cmath>
#include <cstdint>

#include "device/primitives.h"
#include "loop_lora/launch.h"
#include "rounding.h"

namespace rrt::loop_lora {

// What the kernels of the op read. All pointers are to device memory, 16-byte aligned, and every row of a matrix is too.
struct DecodeArgs {
  const void* x;           // [m, k], rows at x_stride
  int64_t x_stride;
  const int32_t* loops;    // [m]; a row outside [0, num_loops) gets NaN: finding it on the host would wait
  const void* weight;      // [n, k]
  const void* bias;        // [n], or [num_loops, n] at bias_loop_stride n; null: none
  int64_t bias_loop_stride;
  const void* lora_a;      // [num_loops, total_rank, k]
  const void* lora_b;      // [num_loops, n, b_stride]
  void* shrunk;            // [num_loops, padded m, total_rank], written by shrink
  float* part_sums;        // [8, m, n], written by the row kernel if a block has not all parts
  void* y;                 // [m, n]
  int m, n, k;
  int num_loops;
  int total_rank;
  int b_stride;
  int padded_m;
  int parts_per_block;  // of the row kernel
  int num_segments;
  int segment_out[kMaxSegments];   // first output row of each; a multiple of a block's rows
  int segment_rank[kMaxSegments];  // first rank of each, a multiple of 8
  int segment_size[kMaxSegments];  // its rank, a multiple of 8
};

constexpr int kParts = 8;
constexpr int kBlockColumns = 32;   // of one turn of a stream
constexpr int kVectorElements = 8;  // of 16 bits
constexpr int kMaxLoops = 32;       // loops present are a mask

constexpr int kColumnRows = 16, kColumnThreads = 32 * kParts;
constexpr int kRowWarps = 4, kRowThreads = 32 * kRowWarps;
constexpr int kWarpTiles = 2;  // of 16 outputs, of a warp of the row kernel
constexpr int kWarpRows = 16 * kWarpTiles, kBlockRows = kRowWarps * kWarpRows;
constexpr int kAddThreads = 256;

// The instances: F(TOKENS, STAGES). As many stages as let an A100's multiprocessor hold two blocks of the row kernel,
// an H100's two of the column kernel.
#define RRT_COLUMN_TILES(F) F(8, 8) F(16, 6) F(32, 4) F(64, 4)
#define RRT_ROW_TILES(F) F(8, 8) F(16, 8) F(32, 7) F(64, 6)

constexpr int kSumStride = kColumnRows + 4;  // of a token's sums in the column kernel: spreads tokens over the banks

// Of the column kernel's ring; the sums of the warps reuse it.
template <int TOKENS, int STAGES>
constexpr int column_shared_bytes() {
  const int ring = STAGES * (2 + TOKENS / 8) * kColumnThreads * 16, sums = kParts * TOKENS * kSumStride * 4;
  return ring > sums ? ring : sums;
}
template <int TOKENS, int STAGES>
constexpr int row_shared_bytes() {
  return STAGES * (2 * kWarpTiles * kRowThreads + TOKENS / 8 * 32) * 16;
}

// Bit l: some token of [begin, begin + count) is of loop l; count is at most 64. Every lane of the warp takes part.
RRT_DEVICE uint32_t loops_present(const int32_t* loops, int begin, int count, int num_loops) {
  uint32_t mask = 0;
  for (int i = device::thread_index() % 32; i < count; i += 32) {
    const int loop = device::load_global(loops + begin + i);
    if (0 <= loop && loop < num_loops) mask |= 1u << loop;
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) mask |= device::shuffle_xor(mask, step);
  return mask;
}

RRT_DEVICE int first_block_of(int part, int blocks) { return blocks * part / kParts; }

// Blocks of 32 ranks that a part has of each loop: every eighth.
RRT_DEVICE int rank_blocks_of(int part, int blocks) { return blocks > part ? ceil_div<kParts>(blocks - part) : 0; }

// Goes through the parts [part, last_part) in blocks of 32 columns: each W's, then those of each B_l. Waits for the kernel
// before, which writes T, at the first of these.
template <class Storage>
struct Cursor {
  const DecodeArgs& args;
  const Storage *weight, *x;  // at the block's rows and tokens
  int row_begin, token_begin, tokens;
  int part, last_part;
  int column_blocks, rank_blocks, rank_begin, rank;
  uint32_t present = 0;
  bool waited = false;

  int block = 0, end = 0, loop = -1;  // where it is; loop -1: in W
  uint32_t rest = 0;                  // loops of this part still to come

  // Where the columns of one turn are: `columns` of them or 32.
  const Storage *from = nullptr, *of_x = nullptr;
  int64_t stride = 0, x_stride = 0;
  int columns = 0;

  RRT_DEVICE void begin_part() {
    loop = -1;
    block = first_block_of(part, column_blocks);
    end = first_block_of(part + 1, column_blocks);
  }

  RRT_DEVICE bool next() {
    while (block >= end) {
      if (loop < 0) {
        if (!waited && rank_blocks > 0) {
          device::dependency_wait();
          present = loops_present(args.loops, token_begin, tokens, args.num_loops);
          waited = true;
        }
        rest = present;
      }
      if (rest == 0) {
        if (part + 1 >= last_part) return false;
        ++part;
        begin_part();
        continue;
      }
      loop = 0;
      while ((rest >> loop & 1) == 0) ++loop;
      rest &= rest - 1;
      block = part;
      end = rank_blocks;
    }
    const int column = block * kBlockColumns;
    if (loop < 0) {
      from = weight + column;
      stride = args.k;
      of_x = x + column;
      x_stride = args.x_stride;
      columns = args.k - column;
      ++block;
    } else {
      from = static_cast<const Storage*>(args.lora_b) +
             (static_cast<int64_t>(loop) * args.n + row_begin) * args.b_stride + column;
      stride = args.b_stride;
      of_x = static_cast<const Storage*>(args.shrunk) +
             (static_cast<int64_t>(loop) * args.padded_m + token_begin) * args.total_rank + rank_begin + column;
      x_stride = args.total_rank;
      columns = rank - column;
      block += kParts;
    }
    return true;
  }

  // Turns of a part, once the cursor is past W in it.
  RRT_DEVICE int turns(int of_part) const {
    int loops = 0;
    for (uint32_t bits = present; bits != 0; bits &= bits - 1) ++loops;
    return first_block_of(of_part + 1, column_blocks) - first_block_of(of_part, column_blocks) +
           loops * rank_blocks_of(of_part, rank_blocks);
  }
};

template <class Storage>
RRT_DEVICE Cursor<Storage> make_cursor(const DecodeArgs& args, const Storage* matrix, int row_begin, int token_begin,
                                       int tokens, int part, int last_part, bool has_rank) {
  int segment = 0;
  while (has_rank && segment + 1 < args.num_segments && args.segment_out[segment + 1] <= row_begin) ++segment;
  const int rank = has_rank ? args.segment_size[segment] : 0;
  Cursor<Storage> cursor{args,
                         matrix + static_cast<int64_t>(row_begin) * args.k,
                         static_cast<const Storage*>(args.x) + token_begin * args.x_stride,
                         row_begin,
                         token_begin,
                         tokens,
                         part,
                         last_part,
                         ceil_div<kBlockColumns>(args.k),
                         ceil_div<kBlockColumns>(rank),
                         args.segment_rank[segment],
                         rank};
  cursor.begin_part();
  return cursor;
}

// d += w x over 32 columns: TILES times 16 outputs, TOKEN_TILES times 8 tokens. Vectors as they lie in the ring: a lane has
// rows lane / 4 of every 8, columns lane % 4 * 8 and the next 7.
template <class Half, int TILES, int TOKEN_TILES, class LoadX>
RRT_DEVICE void multiply_turn(const device::Vector (&w)[2 * TILES], LoadX load_x, float (&d)[TILES][TOKEN_TILES][4]) {
#pragma unroll
  for (int token_tile = 0; token_tile < TOKEN_TILES; ++token_tile) {
    const device::Vector x = load_x(token_tile);
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      const uint32_t b[2] = {x.word[2 * step], x.word[2 * step + 1]};
#pragma unroll
      for (int tile = 0; tile < TILES; ++tile) {
        const device::Vector &top = w[2 * tile], &bottom = w[2 * tile + 1];
        const uint32_t a[4] = {top.word[2 * step], bottom.word[2 * step], top.word[2 * step + 1],
                               bottom.word[2 * step + 1]};
        Half::multiply(d[tile][token_tile], a, b);
      }
    }
  }
}

// y[token, row] from its sum; NaN if the token's loop is none.
template <class Half>
RRT_DEVICE void store_result(const DecodeArgs& args, int token, int loop, int row, float sum) {
  using Storage = typename Half::Storage;
  const bool valid = 0 <= loop && loop < args.num_loops;
  if (valid && args.bias != nullptr) {
    sum += Half::widen(device::load_global(static_cast<const Storage*>(args.bias) + loop * args.bias_loop_stride + row));
  }
  device::store_global(static_cast<Storage*>(args.y) + static_cast<int64_t>(token) * args.n + row,
                       Half::narrow(valid ? sum : NAN));
}

// Block (tile of rows and of tokens, loop) of shrink, else (tile of rows and of tokens).
template <class Half, int TOKENS, int STAGES, bool SHRINK>
RRT_DEVICE void column_body(const DecodeArgs& args) {
  using Storage = typename Half::Storage;
  constexpr int kTokenTiles = TOKENS / 8, kVectors = 2 + kTokenTiles;
  const int token_tiles = ceil_div<TOKENS>(args.m);
  const device::Index block = device::block_index();
  const int warp = device::thread_index() / 32, lane = device::thread_index() % 32;
  const int lane_row = lane / 4, lane_column = lane % 4 * kVectorElements;
  const int row_begin = block.x / token_tiles * kColumnRows, token_begin = block.x % token_tiles * TOKENS;
  const int tokens = args.m - token_begin < TOKENS ? args.m - token_begin : TOKENS;
  if constexpr (SHRINK) {
    // Only then may the next kernel start: it reads x, which the kernel before this one may have written.
    device::dependency_wait();
    device::launch_dependents();
    if ((loops_present(args.loops, token_begin, tokens, args.num_loops) >> block.y & 1) == 0) return;
  }
  const int total_rows = SHRINK ? args.total_rank : args.n;
  const int rows = total_rows - row_begin < kColumnRows ? total_rows - row_begin : kColumnRows;
  const auto* matrix = static_cast<const Storage*>(SHRINK ? args.lora_a : args.weight);
  if (SHRINK) matrix += static_cast<int64_t>(block.y) * args.total_rank * args.k;
  auto cursor = make_cursor<Storage>(args, matrix, row_begin, token_begin, tokens, warp, warp + 1, !SHRINK);

  const auto slot = [&](int stage, int vector) {
    return reinterpret_cast<device::Vector*>(device::shared_memory()) +
           (stage * kVectors + vector) * kColumnThreads + device::thread_index();
  };
  const auto fetch = [&](int turn) {
    if (cursor.next()) {
      const bool in_columns = lane_column < cursor.columns;
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        const int row = (i < 2 ? 8 * i : 8 * (i - 2)) + lane_row;
        const Storage* from = i < 2 ? cursor.from : cursor.of_x;
        const bool valid = in_columns && row < (i < 2 ? rows : tokens);
        const int64_t stride = i < 2 ? cursor.stride : cursor.x_stride;
        device::copy_async(slot(turn % STAGES, i), valid ? from + row * stride + lane_column : from, valid);
      }
    }
    device::copy_commit();
  };

  float sums[1][kTokenTiles][4] = {};
  int turn = 0;
  const auto multiply_next = [&] {
    device::copy_wait<STAGES - 2>();
    const int stage = turn % STAGES;
    const device::Vector w[2] = {device::load_shared(slot(stage, 0)), device::load_shared(slot(stage, 1))};
    multiply_turn<Half, 1, kTokenTiles>(w, [&](int i) { return device::load_shared(slot(stage, 2 + i)); }, sums);
    fetch(turn + STAGES - 1);
    ++turn;
  };
#pragma unroll
  for (int i = 0; i < STAGES - 1; ++i) fetch(i);
  const int base_turns = first_block_of(warp + 1, cursor.column_blocks) - first_block_of(warp, cursor.column_blocks);
  while (turn < base_turns) multiply_next();
  const int turns = cursor.turns(warp);
  while (turn < turns) multiply_next();
  device::copy_wait<0>();
  // Whatever ends after this kernel must also come after the one before it.
  if (!SHRINK && !cursor.waited) device::dependency_wait();

  // The warps' sums, over the ring: [warp, token, row].
  device::block_barrier();
  float* partial = reinterpret_cast<float*>(device::shared_memory());
#pragma unroll
  for (int token_tile = 0; token_tile < kTokenTiles; ++token_tile) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i / 2 * 8, token = 8 * token_tile + lane % 4 * 2 + i % 2;
      device::store_shared(partial + (warp * TOKENS + token) * kSumStride + row, sums[0][token_tile][i]);
    }
  }
  device::block_barrier();
  for (int i = device::thread_index(); i < tokens * kColumnRows; i += kColumnThreads) {
    const int token = i / kColumnRows, row = i % kColumnRows;
    if (row >= rows) continue;
    float sum = 0;
    for (int part = 0; part < kParts; ++part) {
      sum += device::load_shared(partial + (part * TOKENS + token) * kSumStride + row);
    }
    const int loop = device::load_global(args.loops + token_begin + token);
    if constexpr (SHRINK) {
      Storage* t = static_cast<Storage*>(args.shrunk) +
                   (static_cast<int64_t>(block.y) * args.padded_m + token_begin + token) * args.total_rank;
      device::store_global(t + row_begin + row, Half::narrow(loop == block.y ? sum : 0.0f));
    } else {
      store_result<Half>(args, token_begin + token, loop, row_begin + row, sum);
    }
  }
}

// Block (tile of rows and of tokens, slice of the parts).
template <class Half, int TOKENS, int STAGES>
RRT_DEVICE void row_body(const DecodeArgs& args) {
  using Storage = typename Half::Storage;
  constexpr int kTokenTiles = TOKENS / 8, kWeightVectors = 2 * kWarpTiles;
  constexpr int kStageVectors = kWeightVectors * kRowThreads + kTokenTiles * 32;
  const bool whole = args.parts_per_block == kParts;
  if (!whole) device::launch_dependents();
  const int token_tiles = ceil_div<TOKENS>(args.m);
  const device::Index block = device::block_index();
  const int thread = device::thread_index(), warp = thread / 32, lane = thread % 32;
  const int lane_row = lane / 4, lane_column = lane % 4 * kVectorElements;
  const int row_begin = block.x / token_tiles * kBlockRows, token_begin = block.x % token_tiles * TOKENS;
  const int tokens = args.m - token_begin < TOKENS ? args.m - token_begin : TOKENS;
  const int first_part = block.y * args.parts_per_block;
  auto cursor = make_cursor<Storage>(args, static_cast<const Storage*>(args.weight), row_begin, token_begin, tokens,
                                     first_part, first_part + args.parts_per_block, true);

  const auto weights = [&](int stage, int vector) {
    return reinterpret_cast<device::Vector*>(device::shared_memory()) + stage * kStageVectors + vector * kRowThreads +
           thread;
  };
  const auto tokens_of = [&](int stage, int vector) {
    return reinterpret_cast<device::Vector*>(device::shared_memory()) + stage * kStageVectors +
           kWeightVectors * kRowThreads + vector;
  };
  const auto fetch = [&](int turn) {
    if (cursor.next()) {
      const bool in_columns = lane_column < cursor.columns;
#pragma unroll
      for (int i = 0; i < kWeightVectors; ++i) {
        const int row = warp * kWarpRows + 8 * i + lane_row;
        const bool valid = in_columns && row_begin + row < args.n;
        device::copy_async(weights(turn % STAGES, i),
                           valid ? cursor.from + row * cursor.stride + lane_column : cursor.from, valid);
      }
#pragma unroll
      for (int i = 0; i < ceil_div<kRowWarps>(kTokenTiles); ++i) {
        const int token_tile = i * kRowWarps + warp, token = 8 * token_tile + lane_row;
        if (token_tile >= kTokenTiles) break;
        const bool valid = in_columns && token < tokens;
        device::copy_async(tokens_of(turn % STAGES, token_tile * 32 + lane),
                           valid ? cursor.of_x + token * cursor.x_stride + lane_column : cursor.of_x, valid);
      }
    }
    device::copy_commit();
  };

  float sums[kWarpTiles][kTokenTiles][4], total[kWarpTiles][kTokenTiles][4] = {};
  // f(sum, total, row, token, which of the lane's tokens) for each of the lane's numbers.
  const auto for_each = [&](auto f) {
#pragma unroll
    for (int tile = 0; tile < kWarpTiles; ++tile) {
#pragma unroll
      for (int token_tile = 0; token_tile < kTokenTiles; ++token_tile) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          f(sums[tile][token_tile][i], total[tile][token_tile][i],
            row_begin + warp * kWarpRows + 16 * tile + lane / 4 + i / 2 * 8,
            token_begin + 8 * token_tile + lane % 4 * 2 + i % 2, 2 * token_tile + i % 2);
        }
      }
    }
  };
  int turn = 0;
  const auto multiply_next = [&] {
    device::copy_wait<STAGES - 2>();
    device::block_barrier();  // x of everybody is here, and the stage of the turn before has been read
    fetch(turn + STAGES - 1);
    const int stage = turn % STAGES;
    device::Vector w[kWeightVectors];
#pragma unroll
    for (int i = 0; i < kWeightVectors; ++i) w[i] = device::load_shared(weights(stage, i));
    multiply_turn<Half, kWarpTiles, kTokenTiles>(
        w, [&](int i) { return device::load_shared(tokens_of(stage, i * 32 + lane)); }, sums);
    ++turn;
  };
#pragma unroll
  for (int i = 0; i < STAGES - 1; ++i) fetch(i);
  int end = 0;
  for (int part = first_part; part < first_part + args.parts_per_block; ++part) {
    for_each([](float& sum, float&, int, int, int) { sum = 0; });
    const int base_end = end + first_block_of(part + 1, cursor.column_blocks) - first_block_of(part, cursor.column_blocks);
    while (turn < base_end) multiply_next();
    end += cursor.turns(part);
    while (turn < end) multiply_next();
    for_each([&](float sum, float& sum_of_parts, int row, int token, int) {
      if (whole) {
        sum_of_parts += sum;
      } else if (row < args.n && token < args.m) {
        device::store_global(args.part_sums + (static_cast<int64_t>(part) * args.m + token) * args.n + row, sum);
      }
    });
  }
  device::copy_wait<0>();
  // Whatever ends after this kernel must also come after the one before it.
  if (!cursor.waited) device::dependency_wait();
  if (!whole) return;
  int loops[2 * kTokenTiles];  // all at once: among the stores, each would be waited for
#pragma unroll
  for (int i = 0; i < 2 * kTokenTiles; ++i) {
    const int token = token_begin + i / 2 * 8 + lane % 4 * 2 + i % 2;
    loops[i] = token < args.m ? device::load_global(args.loops + token) : -1;
  }
  for_each([&](float, float sum_of_parts, int row, int token, int i) {
    if (row < args.n && token < args.m) store_result<Half>(args, token, loops[i], row, sum_of_parts);
  });
}

// After a row kernel whose blocks have some of the parts: block (256 outputs of one token after the other).
template <class Half>
RRT_DEVICE void add_parts_body(const DecodeArgs& args) {
  device::dependency_wait();
  const int64_t size = static_cast<int64_t>(args.m) * args.n;
  const int64_t i = static_cast<int64_t>(device::block_index().x) * kAddThreads + device::thread_index();
  if (i >= size) return;
  float sum = 0;
#pragma unroll
  for (int part = 0; part < kParts; ++part) sum += device::load_global(args.part_sums + part * size + i);
  const int token = static_cast<int>(i / args.n);
  store_result<Half>(args, token, device::load_global(args.loops + token), static_cast<int>(i % args.n), sum);
}

}  // namespace rrt::loop_lora
