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

// Of a GPU, what the choice depends on; bytes of shared memory are those of a multiprocessor.
struct Gpu {
  int multiprocessors;
  int64_t shared_bytes;
};

// Bytes of the sums that several slices leave in memory.
inline int64_t sum_bytes(int64_t m, int64_t n) { return 8 * m * n * static_cast<int64_t>(sizeof(float)); }

// Tokens of the tile for m rows: the smallest that holds them, or the largest.
inline int tile_tokens(int64_t m, int largest = kMaxTokens) {
  return std::min(m <= 8 ? 8 : m <= 16 ? 16 : m <= 32 ? 32 : kMaxTokens, largest);
}

inline int shrink_tokens(ShrinkKernel kernel, int64_t m) {
  return tile_tokens(m, kernel == ShrinkKernel::kRows ? kMaxTokens : kMaxShrinkTokens);
}

// Stages of the rings: as many as let an H100's multiprocessor hold two thread blocks of the column kernel (one with 32
// tokens), and an A100's two of the row kernel. Those of a warp that has a thread block of its own may be more.
constexpr int kSplitShrinkStages = 16;
constexpr int ring_stages(DecodeKernel kernel, int tokens) {
  switch (kernel) {
    case DecodeKernel::kColumns: return tokens == 8 ? 4 : 3;
    case DecodeKernel::kRows: return tokens == 64 ? 3 : 4;
    case DecodeKernel::kRows64: return tokens == 8 ? 8 : tokens == 16 ? 7 : tokens == 32 ? 6 : 5;
  }
  return 0;
}

// What a thread block is made of.
struct Block {
  int warps, rows, tokens, stages;
  int rings;         // one of each warp, or one of all
  int most;          // of them on a multiprocessor, by registers
  double turn;       // cycles that a lone warp takes for 64 columns (csrc/cuda/instructions.txt)
  int warp_rows() const { return rows * rings / warps; }
  int64_t shared_bytes() const { return int64_t{128} * rings * stages * (rows + tokens + 1); }
};

inline Block block_of(DecodeKernel kernel, int tokens) {
  const int size = tokens == 8 ? 0 : tokens == 16 ? 1 : tokens == 32 ? 2 : 3, stages = ring_stages(kernel, tokens);
  constexpr double kColumnTurns[] = {175, 175, 195};
  constexpr double kTurns[] = {215, 225, 330, 525}, kTurns64[] = {180, 185, 200, 275};
  switch (kernel) {
    case DecodeKernel::kColumns: return {8, 16, tokens, stages, 8, 2, kColumnTurns[std::min(size, 2)]};
    case DecodeKernel::kRows: return {4, 128, tokens, stages, 1, tokens >= 32 ? 2 : 3, kTurns[size]};
    case DecodeKernel::kRows64: break;
  }
  return {4, 64, tokens, stages, 1, tokens >= 64 ? 2 : 3, kTurns64[size]};
}

inline Block block_of(ShrinkKernel kernel, int64_t m) {
  const int tokens = shrink_tokens(kernel, m);
  if (kernel == ShrinkKernel::kRows) return block_of(DecodeKernel::kRows64, tokens);
  Block block = block_of(DecodeKernel::kColumns, tokens);
  if (kernel == ShrinkKernel::kSplitColumns) {
    block.warps = block.rings = 1;
    block.stages = kSplitShrinkStages;
    block.most = 16;
  }
  return block;
}

// How many thread blocks a multiprocessor holds at a time; 1 KiB is taken by each beside what it asks for.
inline int blocks_side_by_side(const Gpu& gpu, const Block& block) {
  return static_cast<int>(std::min<int64_t>(block.most, gpu.shared_bytes / (block.shared_bytes() + 1024)));
}

// The estimates are bench/kernel_times.py's model, simplified: its docstrings have the sources of these rates, in bytes
// a microsecond and multiprocessor, and of the times, in microseconds. None has been measured with these kernels.
struct Rates {
  double memory, cache, cycles;  // cycles: of a microsecond
  double mma;                    // cycles of a scheduler for one
};
// Whether it is an H100 or H200, which alone have dependent launch; their multiprocessors have 228 KiB, an A100's 164.
inline bool is_hopper(const Gpu& gpu) { return gpu.shared_bytes > 200 << 10; }
inline Rates rates_of(const Gpu& gpu) {
  constexpr Rates kA100{15.7e3, 50e3, 1410, 8}, kH200{32.6e3, 73.5e3, 1830, 6.4};
  return is_hopper(gpu) ? kH200 : kA100;
}
constexpr double kLatency = 0.7, kFarTrip = 0.26;  // of memory under load, and of the cache's far half
constexpr double kBegin = 0.9, kEnd = 0.3;         // of a launch: until its first bytes, and after its last turn
constexpr double kTrigger = 0.5, kLaunch = 1.0;    // from an end to what waits; from launch_dependents to the next
constexpr double kShrinkBegin = 0.65;              // from the wait's end to the first turn, if A_l has been fetched
constexpr double kShrinkLoops = 0.45;              // the loops' trip, if A_l is fetched only then
constexpr int64_t kMaxBytesInVain = 2 << 20;       // which memory brings in the time between two kernels
constexpr double kFirstHint = 0.25, kRingTurn = 0.03, kHint = 0.023;  // of shrink: a turn of its ring, and each hint
constexpr int64_t kMostHints = 16;                 // of a warp
constexpr int64_t kHintBytes = 128 << 10;          // that a multiprocessor asks for by hints until the product comes
constexpr int64_t kSmallWeight = 16 << 20;         // W that stays in the second-level cache

// Of a launch whose rings may have been filled with W before x is there.
struct StreamEstimate {
  double whole, filled;  // from the first bytes to the last turn
  double x;              // what brings the x of the rings
};

// `columns`: of each of the blocks; `turns`: that each warp goes through; `tokens` that a tile has.
inline StreamEstimate estimate_stream(const Gpu& gpu, const Block& block, int64_t blocks, double columns, double turns,
                                      int64_t tokens, double memory_bytes, double sums = 0) {
  const Rates rates = rates_of(gpu);
  const double all = gpu.multiprocessors;
  const double busiest = std::ceil(static_cast<double>(blocks) / all), fit = blocks_side_by_side(gpu, block);
  const double resident = std::min(busiest, fit), waves = std::ceil(busiest / resident);
  const double bytes = 2.0 * static_cast<double>(block.rows + tokens) * columns + sums;
  const double x_share = static_cast<double>(tokens) / static_cast<double>(block.rows + tokens);
  const double in_ring = std::min(bytes, static_cast<double>(block.shared_bytes()) * (block.stages - 1) / block.stages);
  const double in_rings = std::min(static_cast<double>(blocks), all * fit) * in_ring;
  const double share = in_rings / (static_cast<double>(blocks) * bytes);
  // In a turn a warp loads 64 columns of its rows and the tokens, by 16 bytes a lane; all of them are copied once.
  const double loads = block.warp_rows() / 4.0 + block.tokens / 4.0;
  const double copies = (block.rows + block.tokens) / 4.0 * block.rings / block.warps;
  const double mmas = block.warp_rows() / 4.0 * block.tokens / 8.0 * rates.mma;
  const double turn = block.turn * (is_hopper(gpu) || block.tokens < 32 ? 1 : 1.15);  // an A100's mmas take longer
  const auto multiply = [&](double copied) {
    const double shared = resident * block.warps * (loads + copied) * 4;
    return waves * turns * std::max({turn, resident * block.warps / 4.0 * mmas, shared}) / rates.cycles;
  };
  const double last_turn = turn / rates.cycles, gap = fit == 1 ? kBegin + kEnd : 0;  // between waves
  const double latency = busiest * bytes / (resident * in_ring) * kLatency;
  const double common = std::max(memory_bytes / rates.memory, static_cast<double>(blocks) * bytes / rates.cache) / all;
  const auto stream = [&](double filled, double copied) {
    return std::max({multiply(copied) + (waves - 1) * gap, latency * (1 - filled) + last_turn + (waves - 1) * gap,
                     common * (1 - filled) + last_turn + std::min(1.0, waves - 1) * gap});
  };
  return {stream(0, copies), stream(share, copies * (1 - share * (1 - x_share))),
          kFarTrip + in_rings * x_share / rates.cache / all};
}

// Of the kernel that adds the parts' sums.
inline double estimate_adding(const Gpu& gpu, int64_t m, int64_t n) {
  return kTrigger + 0.35 + 34.0 * static_cast<double>(m * n) / rates_of(gpu).cache / gpu.multiprocessors;
}

// Whether shrink fetches A_l before it knows which loops there are: if so, what it may have fetched in vain is little.
inline bool should_prefetch(ShrinkKernel kernel, int64_t total_rank, int64_t num_loops, int64_t k, int64_t m) {
  const int64_t ring_columns = int64_t{8} * 64 * (block_of(kernel, m).stages - 1);  // of all parts
  return (num_loops - 1) * total_rank * 2 * std::min(k, ring_columns) <= kMaxBytesInVain;
}

// Microseconds of shrink, from when it has waited.
inline double estimated_microseconds(ShrinkKernel kernel, const Gpu& gpu, int64_t total_rank, int64_t num_loops,
                                     int64_t k, int64_t m) {
  const Block block = block_of(kernel, m);
  const int64_t parts = kernel == ShrinkKernel::kColumns ? 1 : 8, loops = std::min(num_loops, m);
  const int64_t blocks = ceil_div(loops * total_rank, block.rows) * ceil_div(m, block.tokens) * parts;
  const double columns = static_cast<double>(k) / static_cast<double>(parts);
  const double turns = std::ceil(static_cast<double>(k) / 8 / 64);
  const double bytes = 2.0 * static_cast<double>(loops * total_rank * k);
  const int64_t tokens = std::min<int64_t>(m, block.tokens);
  const StreamEstimate stream = estimate_stream(gpu, block, blocks, columns, turns, tokens, bytes);
  const bool prefetches = should_prefetch(kernel, total_rank, num_loops, k, m);
  const double streams = prefetches ? kShrinkBegin + stream.filled : kShrinkLoops + kLatency + stream.whole;
  return streams + kEnd / 2 + (parts > 1 ? estimate_adding(gpu, m, total_rank) : 0);
}

// Shrink is split where its blocks are few and the columns many, and goes by rows where tokens and ranks are many: then
// it does not read A_l for every 16 tokens, and x for every 16 ranks.
inline ShrinkKernel choose_shrink(const Gpu& gpu, int64_t total_rank, int64_t num_loops, int64_t k, int64_t m) {
  if (sum_bytes(m, total_rank) > kMaxSumBytes) return ShrinkKernel::kColumns;
  const auto time = [&](ShrinkKernel kernel) {
    return estimated_microseconds(kernel, gpu, total_rank, num_loops, k, m);
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

// What a product waits for: shrink takes so many microseconds, after it has waited itself, and reads `a_bytes`; `rank`
// is the largest of a segment. Of its hints: thread blocks, all their warps, and how many turns these fetch before.
struct ShrinkEstimate {
  double microseconds, a_bytes;
  int64_t rank, blocks = 0, warps = 0, turns = 0;
};

inline ShrinkEstimate estimate_shrink(ShrinkKernel kernel, const Gpu& gpu, int64_t total_rank, int64_t num_loops,
                                      int64_t k, int64_t m, int64_t rank) {
  const Block block = block_of(kernel, m);
  const int64_t blocks = ceil_div(total_rank, block.rows) * num_loops * ceil_div(m, block.tokens) *
                         (kernel == ShrinkKernel::kColumns ? 1 : 8);
  return {estimated_microseconds(kernel, gpu, total_rank, num_loops, k, m),
          2.0 * static_cast<double>(num_loops * total_rank * k),
          rank,
          blocks,
          blocks * block.warps,
          std::min<int64_t>(block.stages - 1, ceil_div(k, int64_t{8 * 64}))};
}

// Of W, what shrink asks the second-level cache for in the late order: `columns` of every row_step-th of the first `rows`
// rows (0: nothing), from the begin of every parts-th part on.
struct WeightHints {
  int64_t rows = 0, row_step = 1, parts = 8, columns = 0;
  int64_t count() const { return ceil_div(rows, row_step) * (8 / parts); }
  int64_t bytes() const { return 2 * count() * columns; }
};

// As many bytes as memory brings from the end of the kernel before shrink to the product's launch: of rows that the
// first wave of thread blocks has, from where each block, or warp of the column kernel, begins. Of a small W whole rows,
// which take fewer hints.
inline WeightHints choose_hints(const Tiling& tiling, const Gpu& gpu, int64_t n, int64_t k, int64_t m,
                                const ShrinkEstimate& shrink) {
  if (m == 0 || k == 0) return {};
  const bool columns = tiling.kernel == DecodeKernel::kColumns, whole_rows = 2 * n * k <= kSmallWeight;
  const Block block = block_of(tiling.kernel, tile_tokens(m, columns ? kMaxColumnTokens : kMaxTokens));
  const int64_t runs = whole_rows ? 1 : columns ? 8 : tiling.slices;
  const int64_t longest = whole_rows ? k : (k / runs - 32) / 64 * 64;  // a run may be 31 columns shorter than others
  const int64_t tiles = int64_t{gpu.multiprocessors} * blocks_side_by_side(gpu, block) /
                        (ceil_div(m, block.tokens) * tiling.slices);
  const int64_t rows = std::min(n, tiles * block.rows);
  const double brought = (kTrigger + kLaunch) * rates_of(gpu).memory * gpu.multiprocessors;
  const int64_t asked = std::min<int64_t>(shrink.blocks, gpu.multiprocessors) * kHintBytes;
  const int64_t bytes = std::min(static_cast<int64_t>(brought), asked);
  int64_t hinted_rows = std::min(rows, shrink.warps * kMostHints / runs);
  if (whole_rows) hinted_rows = std::min(hinted_rows, bytes / (2 * k));
  if (!is_hopper(gpu) || hinted_rows == 0 || longest <= 0) return {};
  WeightHints hints{rows, ceil_div(rows, hinted_rows), 8 / runs, longest};
  if (!whole_rows) hints.columns = std::min(longest, bytes / (2 * hints.count()) / 64 * 64);
  return hints.columns > 0 ? hints : WeightHints{};
}

struct OrderEstimates {
  double early, late, hinted;
};

// Microseconds of a product in the two orders (cuda_decode.h), from the end of the kernel before shrink on.
//   early  all of shrink is waited for, and x brought then; but the ring has filled meanwhile, and what is in it has
//          only to be multiplied;
//   late   shrink's wait must end before the product's launch and first bytes; then A_l shares memory with W, and what
//          is left of shrink is waited for at B_l;
//   hinted the same, but memory brings what shrink's hints ask for until the product comes, which may be later.
inline OrderEstimates estimate_orders(const Tiling& tiling, const Gpu& gpu, int64_t n, int64_t k, int64_t m,
                                      const ShrinkEstimate& shrink) {
  const bool columns = tiling.kernel == DecodeKernel::kColumns;
  const Block block = block_of(tiling.kernel, tile_tokens(m, columns ? kMaxColumnTokens : kMaxTokens));
  const int64_t tokens = std::min<int64_t>(m, block.tokens), token_tiles = ceil_div(m, block.tokens);
  const int64_t blocks = ceil_div(n, block.rows) * token_tiles * tiling.slices;
  const double parts = 8.0 / tiling.slices, turns = std::ceil(static_cast<double>(k) / 8 / 64) * (columns ? 1 : parts);
  const double sums = tiling.slices > 1 ? 4 * parts * static_cast<double>(block.rows * tokens) : 0;
  const double weight_bytes = 2.0 * static_cast<double>(n * k);
  const auto stream = [&](double memory_bytes) {
    const double columns_of_block = static_cast<double>(k) / tiling.slices;
    return estimate_stream(gpu, block, blocks, columns_of_block, turns, tokens, memory_bytes, sums);
  };
  const StreamEstimate alone = stream(weight_bytes), beside = stream(weight_bytes + shrink.a_bytes);
  const double end = kEnd + (tiling.slices > 1 ? estimate_adding(gpu, m, n) : 0);
  const double waited = shrink.microseconds > 0 ? shrink.microseconds + kTrigger : 0;
  const double rest = std::max(alone.filled, kBegin + beside.whole - kTrigger - waited - alone.x);
  const auto late = [&](double hinted_bytes) {
    const double streamed = stream(weight_bytes + shrink.a_bytes - hinted_bytes).whole;
    const double left = shrink.microseconds - kBegin - share_before_rank(tiling, shrink.rank) * streamed;
    return kTrigger + kLaunch + kBegin + streamed + std::max(0.0, left) + end;
  };
  const WeightHints hints = choose_hints(tiling, gpu, n, k, m, shrink);
  const double each = shrink.warps > 0 ? static_cast<double>(ceil_div(hints.count(), shrink.warps)) : 0;
  const double given = kFirstHint + kRingTurn * static_cast<double>(shrink.turns) + kHint * each;
  return {kTrigger + waited + alone.x + rest + end, late(0),
          late(static_cast<double>(hints.bytes())) + std::max(0.0, given - kTrigger)};
}

// Whether the product should start before shrink has waited.
inline bool should_start_early(const ShrinkEstimate& shrink, const Tiling& tiling, const Gpu& gpu, int64_t n, int64_t k,
                               int64_t m) {
  const OrderEstimates orders = estimate_orders(tiling, gpu, n, k, m, shrink);
  return orders.early < std::min(orders.late, orders.hinted);
}

// Whether shrink should give hints if the product does not start early.
inline bool should_give_hints(const ShrinkEstimate& shrink, const Tiling& tiling, const Gpu& gpu, int64_t n, int64_t k,
                              int64_t m) {
  const OrderEstimates orders = estimate_orders(tiling, gpu, n, k, m, shrink);
  return orders.hinted < orders.late;
}

// Of a product with two LoRAs of rank 64 for two loops: measured tilings don't depend on the LoRA either.
inline double estimated_microseconds(const Tiling& tiling, const Gpu& gpu, int64_t n, int64_t k, int64_t m) {
  constexpr int64_t kRank = 64, kTotalRank = 2 * kRank, kLoops = 2;
  const ShrinkKernel kernel = choose_shrink(gpu, kTotalRank, kLoops, k, m);
  const ShrinkEstimate shrink = estimate_shrink(kernel, gpu, kTotalRank, kLoops, k, m, kRank);
  const OrderEstimates orders = estimate_orders(tiling, gpu, n, k, m, shrink);
  return is_hopper(gpu) ? std::min({orders.early, orders.late, orders.hinted}) : orders.late;
}

// `rows_fit` and `rows64_fit` say whether the row kernel takes the layer with tiles of 128 and 64 outputs.
inline Tiling choose_tiling(const MeasuredTiling* measured, const Gpu& gpu, int64_t n, int64_t k, int64_t m,
                            bool rows_fit, bool rows64_fit = true) {
  const auto fits = [&](DecodeKernel kernel) {
    return kernel == DecodeKernel::kColumns || (kernel == DecodeKernel::kRows64 ? rows64_fit : rows_fit);
  };
  const MeasuredTiling* found = nullptr;
  for (const MeasuredTiling* line = measured; line->multiprocessors != 0; ++line) {
    const bool matches = line->multiprocessors == gpu.multiprocessors && line->n == n && line->k == k && line->m >= m;
    if (matches && fits(line->tiling.kernel) && (found == nullptr || line->m < found->m)) found = line;
  }
  if (found != nullptr) return found->tiling;
  Tiling best{DecodeKernel::kColumns, 1};
  double fastest = estimated_microseconds(best, gpu, n, k, m);
  for (DecodeKernel kernel : {DecodeKernel::kRows, DecodeKernel::kRows64}) {
    for (int slices : kSlices) {
      if (!fits(kernel) || (slices > 1 && sum_bytes(m, n) > kMaxSumBytes)) break;
      const Tiling tiling{kernel, slices};
      const double time = estimated_microseconds(tiling, gpu, n, k, m);
      if (time < fastest) {
        fastest = time;
        best = tiling;
      }
    }
  }
  return best;
}

}  // namespace rrt::loop_lora
