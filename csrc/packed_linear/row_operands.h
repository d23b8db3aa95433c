// Rows of x as the operands of products with packed weights.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "rounding.h"

namespace rrt::packed_linear {

// Sums run over chunks of kChunk steps (of columns, or of ranks), each from zero: so their order depends on the layer's
// shape alone, not on the batch. The longer, the fewer times sums are loaded and stored; but in bfloat16 on
// AVX512-BF16, where 128, 192, 256, 288 and 384 were tried, products of many rows got slower again from 384 on. As the stride
// of 4-byte units, an odd number of pairs of cache lines spreads rows over the sets of a cache.
constexpr int64_t kChunk = 288;
// Bounds the scratch memory; at this many rows, reading the weight once per block costs little.
constexpr int64_t kMaxBlockRows = 192;

// Steps, and rows, that are multiplied at a time on tiles (AMX). Where there are fewer rows, those that follow in memory are
// read too: operands end so many rows before their memory does.
constexpr int64_t kTileSteps = 16;
constexpr int64_t kReadBehind = 15;

static constexpr int64_t num_chunks(int64_t steps) { return ceil_div(steps, kChunk); }

// Rows that are multiplied by a panel together, counted from the start of their block.
struct RowTile {
  int64_t begin;
  int64_t rows;
};

// As few tiles of at most `tile_rows` as hold `rows`, and of nearly equal size.
inline std::vector<RowTile> split_rows(int64_t rows, int64_t tile_rows) {
  std::vector<RowTile> tiles;
  const int64_t num_tiles = ceil_div(rows, tile_rows);
  for (int64_t tile = 0; tile < num_tiles; ++tile) {
    const int64_t first = rows * tile / num_tiles;
    tiles.push_back({first, rows * (tile + 1) / num_tiles - first});
  }
  return tiles;
}

// One block of rows, at most kMaxBlockRows.
struct RowOperands {
  const void* x;
  int64_t k;
  int64_t x_row_stride;
  const int64_t* order;  // [rows]: the block's rows of x
  int64_t rows;
  const RowTile* tiles;
  int64_t num_tiles;
  void* operands;  // [chunks, rows, kChunk] units (panel_products.h): x in `order`, zeros beyond column k
};

// The bytes of operands for `steps` steps of `rows` rows.
static constexpr int64_t operands_size(int64_t steps, int64_t rows, int64_t step_bytes) {
  return (num_chunks(steps) * rows + kReadBehind) * kChunk * step_bytes;
}

}  // namespace rrt::packed_linear
