// Chooses the decode kernel of a product, and the number of slices: by measurements where there are any, else by an
// estimate of the bytes that each choice moves. The choice changes no bit of a result. Host only.
#pragma once

#include <algorithm>
#include <cstdint>

#include "rounding.h"

namespace rrt::loop_lora {

enum class DecodeKernel { kColumns, kRows };

struct Tiling {
  DecodeKernel kernel;
  int slices;  // thread blocks that share a tile's 8 parts; always 1 for the column kernel
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

// Bytes of the sums that several slices leave in memory.
inline int64_t sum_bytes(int64_t m, int64_t n) { return 8 * m * n * static_cast<int64_t>(sizeof(float)); }

// Tokens of the tile for m rows: the smallest that holds them, or the largest.
inline int tile_tokens(int64_t m) { return m <= 8 ? 8 : m <= 16 ? 16 : m <= 32 ? 32 : kMaxTokens; }

// The time at an H200's rates per multiprocessor: 32 kB a microsecond from memory, 42 from the second-level cache.
// Every thread block reads its weights and its x; several slices leave sums, which take one more kernel to add.
inline double estimated_microseconds(const Tiling& tiling, int multiprocessors, int64_t n, int64_t k, int64_t m) {
  constexpr double kMemory = 32e3, kCache = 42e3, kLaunch = 1.0;
  const int64_t rows = tiling.kernel == DecodeKernel::kRows ? 128 : 16, tokens = tile_tokens(m);
  const int64_t tiles = ceil_div(n, rows) * ceil_div(m, tokens);
  const double blocks = static_cast<double>(tiles * tiling.slices);
  const double weights = 2.0 * static_cast<double>(rows * k) / tiling.slices;
  const double x = 2.0 * static_cast<double>(tokens * k) / tiling.slices;
  const double sums =
      tiling.slices > 1 ? 2.0 * 4 * 8 * static_cast<double>(rows * std::min(m, tokens)) / tiling.slices : 0;
  const double waves = std::max(1.0, blocks / multiprocessors);
  return waves * std::max(weights / kMemory, (weights + x + sums) / kCache) + (tiling.slices > 1 ? kLaunch : 0);
}

// `rows_fit` says whether the row kernel takes the layer.
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
