// Chooses the decode kernel of a product, its tile and the number of slices, by measurements where there are any, else
// by an estimate of the time; and by estimates the kernel of shrink and whether the product starts early. The choice
// changes no bit of a result. Host only.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "rounding.h"

namespace rrt::loop_lora {

// The column kernel, and the row kernel with tiles of 128 or of 64 outputs.
enum class DecodeKernel { kColumns, kRows, kRows64 };

struct Tiling {
  DecodeKernel kernel;
  int slices;  // thread blocks that share a tile's 8 parts; always 1 for the column kernel
};

// Of shrink: the column kernel, whole or with its parts in thread blocks of their own, or the row kernel with tiles of
// 64 ranks and 32 or 64 tokens, a part in each thread block. Split parts take one more kernel to add them.
enum class ShrinkKernel { kColumns, kSplitColumns, kRows };

inline int64_t tile_rows(DecodeKernel kernel) {
  return kernel == DecodeKernel::kColumns ? 16 : kernel == DecodeKernel::kRows64 ? 64 : 128;
}

// A line of cuda_tiles_measured.h: the fastest for [n, k] and up to `m` tokens, on a GPU of so many multiprocessors.
struct MeasuredTiling {
  int multiprocessors;  // 0: the end of the table
  int64_t n, k, m;
  Tiling tiling;
};

constexpr int kMaxTokens = 64;  // of a tile of the row kernel
constexpr int kMaxColumnTokens = 32, kMaxShrinkTokens = 16;  // of the column kernel
constexpr int kRowShrinkRanks = 64;
constexpr int kSlices[] = {1, 2, 4, 8};
constexpr int64_t kMaxSumBytes = 64 << 20;

// Bytes of the sums that several slices leave in memory.
inline int64_t sum_bytes(int64_t m, int64_t n) { return 8 * m * n * static_cast<int64_t>(sizeof(float)); }

// Tokens of the tile for m rows: the smallest that holds them, or the largest.
inline int tile_tokens(int64_t m, int largest = kMaxTokens) {
  return std::min(m <= 8 ? 8 : m <= 16 ? 16 : m <= 32 ? 32 : kMaxTokens, largest);
}

inline int shrink_tokens(ShrinkKernel kernel, int64_t m) {
  return tile_tokens(m, kernel == ShrinkKernel::kRows ? kMaxTokens : kMaxShrinkTokens);
}

// Assumptions, none of them measured with these kernels; bench/kernel_times.py has their sources. An H200's rates, in
// bytes a microsecond: each multiprocessor's share of those of memory and of the second-level cache, what one may have
// while others are idle, and what passes its shared memory. Times in microseconds: one more kernel costs its wait for the
// last block of the one before it, and a trip to the cache and back; a block begins with the trip that brings its first
// bytes; a turn takes as long as its copies, loads and products wait for each other at least.
constexpr double kMemoryRate = 32e3, kCacheRate = 73e3, kBusiestRate = 100e3, kSharedRate = 128 * 1830;
constexpr double kOneMoreKernel = 1.7, kFirstBytes = 0.7, kTurnTime = 0.2, kLateStart = 1.2, kTrigger = 0.5;
constexpr double kRingBytes = 40e3, kRingBytesBeside64 = 32e3;  // of W, of a thread block; beside 64 tokens
constexpr int kBlocksSideBySide = 2;
constexpr double kGapsAlone = 1.2;  // of the row kernel, which nothing fills while its warps wait for each other

// Thread blocks of a product that a multiprocessor has to compute.
inline double blocks_evenly(const Tiling& tiling, int multiprocessors, int64_t n, int64_t m) {
  const int largest = tile_tokens(m, tiling.kernel == DecodeKernel::kColumns ? kMaxColumnTokens : kMaxTokens);
  const int64_t tiles = ceil_div(n, tile_rows(tiling.kernel)) * ceil_div(m, static_cast<int64_t>(largest));
  return static_cast<double>(tiles * tiling.slices) / multiprocessors;
}

struct StreamEstimate {
  double microseconds;
  double multiplying;  // what turns and shared memory take of it, wherever the bytes come from
};

// Of a product. Every thread block reads its weights from memory, and its x from the second-level cache. Only tokens that
// exist are read, however many the tile would hold.
inline StreamEstimate estimate_stream(const Tiling& tiling, int multiprocessors, int64_t n, int64_t k, int64_t m) {
  const bool columns = tiling.kernel == DecodeKernel::kColumns, sliced = tiling.slices > 1;
  const int64_t rows = tile_rows(tiling.kernel), largest = tile_tokens(m, columns ? kMaxColumnTokens : kMaxTokens);
  const int64_t tokens = std::min(m, largest);
  const double evenly = blocks_evenly(tiling, multiprocessors, n, m), on_busiest = std::ceil(evenly);
  const double side_by_side = std::min<double>(on_busiest, kBlocksSideBySide);
  const auto columns_of_block = static_cast<double>(k) / tiling.slices;
  const double weights = 2.0 * static_cast<double>(rows) * columns_of_block;
  const double sums = sliced ? 2.0 * 4 * 8 * static_cast<double>(rows * tokens) / tiling.slices : 0;
  const double bytes = weights + 2.0 * static_cast<double>(tokens) * columns_of_block + sums;
  const double parts_in_turn = columns ? 1 : 8.0 / tiling.slices;
  const double turns = std::ceil(static_cast<double>(k) / 8 / 64) * parts_in_turn;
  // Rows and tokens come into shared memory once; rows leave it once, tokens once for each warp that shares them.
  const double row_trips = 2, token_trips = columns ? 2 : 5;
  const double through_shared = 2.0 * columns_of_block *
                                (row_trips * static_cast<double>(rows) + token_trips * static_cast<double>(largest));
  // Gaps cost nothing where the cache, which all share, is what they would wait for.
  const double gaps = !columns && side_by_side < 2 ? kGapsAlone : 1;
  const double multiplying =
      std::max(on_busiest * through_shared / kSharedRate, on_busiest / side_by_side * turns * kTurnTime);
  const double own = std::max({evenly * weights / kMemoryRate, on_busiest * bytes / kBusiestRate, multiplying});
  return {std::max(evenly * bytes / kCacheRate, own * gaps), multiplying};
}

// Several slices leave sums, which take one more kernel to add.
inline double estimated_microseconds(const Tiling& tiling, int multiprocessors, int64_t n, int64_t k, int64_t m) {
  const double on_busiest = std::ceil(blocks_evenly(tiling, multiprocessors, n, m));
  const double begin = kFirstBytes * std::max(1.0, on_busiest / kBlocksSideBySide);
  return estimate_stream(tiling, multiprocessors, n, k, m).microseconds + begin + (tiling.slices > 1 ? kOneMoreKernel : 0);
}

// Of shrink, whose first bytes and last stores are a trip each.
inline double estimated_microseconds(ShrinkKernel kernel, int multiprocessors, int64_t total_rank, int64_t num_loops,
                                     int64_t k, int64_t m) {
  const bool by_rows = kernel == ShrinkKernel::kRows, split = kernel != ShrinkKernel::kColumns;
  const int64_t ranks = by_rows ? kRowShrinkRanks : 16, tokens = shrink_tokens(kernel, m), parts = split ? 8 : 1;
  const int64_t blocks = ceil_div(total_rank, ranks) * ceil_div(m, tokens) * std::min(num_loops, m) * parts;
  const double evenly = static_cast<double>(blocks) / multiprocessors, on_busiest = std::ceil(evenly);
  const int64_t rows = std::min(ranks, total_rank) + std::min(m, tokens);
  const double bytes = 2.0 * static_cast<double>(rows * k) / static_cast<double>(parts);
  const double stream = std::max(evenly * bytes / kCacheRate, on_busiest * bytes / kBusiestRate);
  return 2 * kFirstBytes + stream + (split ? kOneMoreKernel : 0);
}

// Shrink is split where its blocks are few and the columns many, and goes by rows where tokens and ranks are many: then
// it does not read A_l for every 16 tokens, and x for every 16 ranks.
inline ShrinkKernel choose_shrink(int multiprocessors, int64_t total_rank, int64_t num_loops, int64_t k, int64_t m) {
  if (sum_bytes(m, total_rank) > kMaxSumBytes) return ShrinkKernel::kColumns;
  const auto time = [&](ShrinkKernel kernel) {
    return estimated_microseconds(kernel, multiprocessors, total_rank, num_loops, k, m);
  };
  ShrinkKernel best = ShrinkKernel::kColumns;
  if (time(ShrinkKernel::kSplitColumns) < time(best)) best = ShrinkKernel::kSplitColumns;
  if (m > kMaxShrinkTokens && time(ShrinkKernel::kRows) < time(best)) best = ShrinkKernel::kRows;
  return best;
}

// Of a product's stream, the share that comes before its first turn of B_l, in the thread blocks that need T first.
// Every warp of the column kernel has one part, W first. In the row kernel the last parts have the ranks, 32 each, and
// with several slices the first part's sums are not written before T is there.
inline double share_before_rank(const Tiling& tiling, int64_t rank) {
  if (tiling.kernel == DecodeKernel::kColumns) return 1;
  if (tiling.slices > 1) return tiling.slices / 8.0;
  return static_cast<double>(9 - std::max<int64_t>(1, std::min<int64_t>(8, ceil_div(rank, int64_t{32})))) / 8;
}

// Whether the product should start before shrink has waited (cuda_decode.h). Shrink takes `shrink` microseconds and
// reads `a_bytes`; `rank` is the largest of a segment. Beside the product's stream,
//   early  all of shrink is waited for, and x brought then; but the ring has filled meanwhile, and what is in it has only
//          to be multiplied;
//   late   shrink's wait must end before the product's launch and first bytes; then A_l shares memory with W, and what
//          is left of shrink is waited for at B_l.
inline bool should_start_early(double shrink, double a_bytes, const Tiling& tiling, int multiprocessors, int64_t n,
                               int64_t k, int64_t m, int64_t rank) {
  const double evenly = blocks_evenly(tiling, multiprocessors, n, m);
  const StreamEstimate stream = estimate_stream(tiling, multiprocessors, n, k, m);
  const double ring_bytes = m > 32 ? kRingBytesBeside64 : kRingBytes;
  const double ring = std::min(evenly, 1.0 * kBlocksSideBySide) * ring_bytes / kMemoryRate;
  const double early = shrink + kTrigger + std::max(stream.multiplying, stream.microseconds - ring);
  const double late = kLateStart + kFirstBytes + a_bytes / multiprocessors / kMemoryRate + stream.microseconds;
  const double left = shrink - kFirstBytes - share_before_rank(tiling, rank) * stream.microseconds;
  return early < late + std::max(0.0, left);
}

// `rows_fit` and `rows64_fit` say whether the row kernel takes the layer with tiles of 128 and 64 outputs.
inline Tiling choose_tiling(const MeasuredTiling* measured, int multiprocessors, int64_t n, int64_t k, int64_t m,
                            bool rows_fit, bool rows64_fit = true) {
  const auto fits = [&](DecodeKernel kernel) {
    return kernel == DecodeKernel::kColumns || (kernel == DecodeKernel::kRows64 ? rows64_fit : rows_fit);
  };
  const MeasuredTiling* found = nullptr;
  for (const MeasuredTiling* line = measured; line->multiprocessors != 0; ++line) {
    const bool matches = line->multiprocessors == multiprocessors && line->n == n && line->k == k && line->m >= m;
    if (matches && fits(line->tiling.kernel) && (found == nullptr || line->m < found->m)) found = line;
  }
  if (found != nullptr) return found->tiling;
  Tiling best{DecodeKernel::kColumns, 1};
  double fastest = estimated_microseconds(best, multiprocessors, n, k, m);
  for (DecodeKernel kernel : {DecodeKernel::kRows, DecodeKernel::kRows64}) {
    for (int slices : kSlices) {
      if (!fits(kernel) || (slices > 1 && sum_bytes(m, n) > kMaxSumBytes)) break;
      const Tiling tiling{kernel, slices};
      const double time = estimated_microseconds(tiling, multiprocessors, n, k, m);
      if (time < fastest) {
        fastest = time;
        best = tiling;
      }
    }
  }
  return best;
}

}  // namespace rrt::loop_lora
