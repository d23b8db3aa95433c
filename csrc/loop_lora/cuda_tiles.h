// Which of the decode kernels runs a product, and how it is cut: from measurements where there are any, else from what
// each would have to move. The choice changes no bit of a result. Host only.
#pragma once

#include <algorithm>
#include <cstdint>

#include "rounding.h"

namespace rrt::loop_lora {

enum class DecodeKernel { kColumns, kRows };

struct Tiling {
  DecodeKernel kernel;
  int slices;  // of the row kernel: blocks that share a tile's 8 parts; else 1
};

// A line of cuda_tiles_measured.h: the fastest for [n, k] and up to `m` tokens, on a GPU of so many multiprocessors.
struct MeasuredTiling {
  int multiprocessors;  // 0: the end of the table
  int64_t n, k, m;
  Tiling tiling;
};

constexpr int kMaxTokens = 64;  // of a tile
constexpr int kSlices[] = {1, 2, 4, 8};
constexpr int64_t kMaxSumBytes = 64 << 20;

// Of the sums that blocks with some of the parts leave.
inline int64_t sum_bytes(int64_t m, int64_t n) { return 8 * m * n * static_cast<int64_t>(sizeof(float)); }

// Tokens of the tile for m rows: the smallest that holds them, or the largest.
inline int tile_tokens(int64_t m) { return m <= 8 ? 8 : m <= 16 ? 16 : m <= 32 ? 32 : kMaxTokens; }

// Microseconds at what an H200 moves per multiprocessor: 32 kB of memory, 42 of the second-level cache, in a microsecond;
// every block brings its weights and its x, and a block that has not all parts leaves sums for one more kernel.
inline double estimated_microseconds(const Tiling& tiling, int multiprocessors, int64_t n, int64_t k, int64_t m) {
  constexpr double kMemory = 32e3, kCache = 42e3, kLaunch = 1.0;
  const int64_t rows = tiling.kernel == DecodeKernel::kRows ? 128 : 16, tokens = tile_tokens(m);
  const int64_t tiles = ceil_div(n, rows) * ceil_div(m, tokens);
  const double blocks = static_cast<double>(tiles * tiling.slices);
  const double weights = 2.0 * static_cast<double>(rows * k) / tiling.slices;
  const double x = 2.0 * static_cast<double>(tokens * k) / tiling.slices;
  const double sums = tiling.slices > 1 ? 2.0 * 4 * 8 * static_cast<double>(rows * std::min(m, tokens)) / tiling.slices : 0;
  const double turns = std::max(1.0, blocks / multiprocessors);
  return turns * std::max(weights / kMemory, (weights + x + sums) / kCache) + (tiling.slices > 1 ? kLaunch : 0);
}

// `rows_fit`: whether the row kernel takes the layer.
inline Tiling choose_tiling(const MeasuredTiling* measured, int multiprocessors, int64_t n, int64_t k, int64_t m,
                            bool rows_fit) {
  Tiling best{DecodeKernel::kColumns, 1};
  if (!rows_fit) return best;
  const MeasuredTiling* found = nullptr;
  for (const MeasuredTiling* line = measured; line->multiprocessors != 0; ++line) {
    const bool fits = line->multiprocessors == multiprocessors && line->n == n && line->k == k && line->m >= m;
    if (fits && (found == nullptr || line->m < found->m)) found = line;
  }
  if (found != nullptr) return found->tiling;
  double fastest = estimated_microseconds(best, multiprocessors, n, k, m);
  for (int slices : kSlices) {
    if (slices > 1 && sum_bytes(m, n) > kMaxSumBytes) break;
    const Tiling tiling{DecodeKernel::kRows, slices};
    const double time = estimated_microseconds(tiling, multiprocessors, n, k, m);
    if (time < fastest) {
      fastest = time;
      best = tiling;
    }
  }
  return best;
}

}  // namespace rrt::loop_lora
