// Products of rows with panels of weights (see launch.h), for the per-instruction-set files and under their rules (see
// simd.h). RRT_TILE_ROWS is the number of rows whose accumulators the registers hold.
#pragma once

#include "packed_linear/launch.h"
#include "packed_linear/row_operands.h"
#include "simd_products.h"

namespace rrt::packed_linear {
namespace {

constexpr int kMaxAccumulators = 2 * RRT_TILE_ROWS;

// How rows meet the steps of a panel: a row has one Unit per step.
template <class D>
struct PanelProduct {
  using Op = Operands<D>;
  using Unit = typename Op::Unit;
  using Vec = typename D::Vec;
  static constexpr int kStep = kPair<D>;

  static void set(Unit* to, int64_t column, typename D::Acc value) {
    if constexpr (kStep == 1) {
      to[column] = value;
    } else {
      reinterpret_cast<typename D::Storage*>(to)[column] = D::narrow(value);
    }
  }

  // acc[r] += weights * x[r * kChunk], for VECTORS vectors of outputs.
  template <int ROWS, int VECTORS>
  static inline __attribute__((always_inline)) void multiply(const typename D::Storage* w, const Unit* x,
                                                             Vec (&acc)[ROWS][VECTORS]) {
    typename Op::Vec weights[VECTORS];
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) weights[v] = Op::load_units(w + v * kLanes<D> * kStep);
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) {
      const auto value = Op::broadcast(x[r * kChunk]);
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; ++v) Op::multiply_add(acc[r][v], weights[v], value);
    }
  }
};

#ifndef RRT_BF16_PAIRS
// The packed form pairs the columns of bfloat16 on every instruction set, but without the instruction for pairs
// Operands has single elements. So each vector of pairs is widened to two vectors here.
template <>
struct PanelProduct<BFloat16> {
  struct Unit {
    float column[2];
  };
  using Vec = F32;
  static constexpr int kStep = 2;

  static void set(Unit* to, int64_t column, float value) { to[column / 2].column[column % 2] = value; }

  template <int ROWS, int VECTORS>
  static inline __attribute__((always_inline)) void multiply(const uint16_t* w, const Unit* x,
                                                             Vec (&acc)[ROWS][VECTORS]) {
    Vec low[VECTORS], high[VECTORS];
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) {
      const U32 pairs = load<U32>(w + v * 2 * kLanes<BFloat16>);
      low[v] = bit_cast<Vec>(pairs << 16);
      high[v] = bit_cast<Vec>(pairs & 0xffff0000u);
    }
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) {
      const float first = x[r * kChunk].column[0], second = x[r * kChunk].column[1];
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; ++v) acc[r][v] += low[v] * first;
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; ++v) acc[r][v] += high[v] * second;
    }
  }
};
#endif

template <class D>
using PanelUnit = typename PanelProduct<D>::Unit;

template <class D>
constexpr int64_t kStepColumns = PanelProduct<D>::kStep;
template <class D>
constexpr int64_t kChunkColumns = kChunk * kStepColumns<D>;
// Operands have zeros from a row's last column to a multiple of so many.
template <class D>
constexpr int64_t kOperandColumns = kStepColumns<D> * (kOnTiles<D> ? kTileSteps : 1);
// Rows that are multiplied by a panel at a time; tiles take any number.
template <class D>
constexpr int64_t kTileRows = kOnTiles<D> ? kMaxBlockRows : RRT_TILE_ROWS;
template <class D>
constexpr int64_t kStepSize = kPanel * kStepColumns<D>;
template <class D>
constexpr int64_t kStepBytes = kStepSize<D> * sizeof(typename D::Storage);

// Weights to bring into the cache during a product, `stride` bytes per step: the hardware's own prefetching ends at
// every page.
struct Prefetch {
  const char* from;
  int64_t stride;
};

// c[r][n] += sum over `steps` of w[step][n] x[r][step], for a panel of outputs: all of them at once if their sums fit
// the registers, so that a single stream is read, else in passes. Unlike multiply_rows of simd_products.h, which takes
// any matrix that is in the cache, this goes along the stream of weights that all rows of a tile share. Not
// inlined: the loop needs all registers.
template <class D, int ROWS>
__attribute__((noinline)) void multiply_panel_by(const typename D::Storage* w, int64_t steps, const PanelUnit<D>* x,
                                                 typename D::Acc* c, Prefetch prefetch) {
  using P = PanelProduct<D>;
  constexpr int kPanelVectors = kPanel / kLanes<D>;
  constexpr int kVectors = ROWS * kPanelVectors <= kMaxAccumulators ? kPanelVectors : 2;
  constexpr int kWidth = kVectors * kLanes<D>;
  constexpr int64_t kPasses = kPanel / kWidth;
  static_assert(kPanel % kWidth == 0 && ROWS <= kReadBehind);
  // A chunk of weights and a tile of rows are more than the first-level cache holds. Whether a step has slots for hints
  // of what is in the second, beside its multiply-adds: AVX2 reads two operands for three of them.
  constexpr bool kHasSlots = ROWS * kVectors >= 16;
  constexpr int64_t kAhead = 4;  // steps
  // The next tile, or the next chunk of the first; behind the last of all is kReadBehind.
  const char* next_x = reinterpret_cast<const char*>(x + ROWS * kChunk);
  const int64_t stride = prefetch.stride / kPasses;
  for (int64_t pass = 0; pass < kPasses; ++pass) {
    typename D::Vec acc[ROWS][kVectors] = {};
    const typename D::Storage* from = w + pass * kWidth * P::kStep;
    const char* next_w = prefetch.from + pass * steps * stride;
    for (int64_t step = 0; step < steps; ++step) {
      __builtin_prefetch(next_w + step * stride, 0, 2);
      if (stride > 64) __builtin_prefetch(next_w + step * stride + 64, 0, 2);
      if (kPasses == 1 || (kHasSlots && pass == 0)) __builtin_prefetch(next_x + step * ROWS * sizeof(PanelUnit<D>));
      const typename D::Storage* weights = from + step * kStepSize<D>;
      if constexpr (kHasSlots) {
#pragma GCC unroll 8
        for (int line = 0; line < kWidth * P::kStep; line += 64 / sizeof(*w)) {
          __builtin_prefetch(weights + kAhead * kStepSize<D> + line);
        }
      }
      P::template multiply<ROWS, kVectors>(weights, x + step, acc);
    }
    for (int r = 0; r < ROWS; ++r) {
      for (int v = 0; v < kVectors; ++v) {
        typename D::Acc* to = c + r * kPanel + pass * kWidth + v * kLanes<D>;
        const typename D::Vec sum = load<typename D::Vec>(to) + acc[r][v];
        std::memcpy(to, &sum, sizeof(sum));
      }
    }
  }
}

// The same for a number of rows up to RRT_TILE_ROWS that is known at run time.
template <class D, int ROWS = RRT_TILE_ROWS>
inline void multiply_few_rows(int64_t rows, const typename D::Storage* w, int64_t steps, const PanelUnit<D>* x,
                              typename D::Acc* c, Prefetch prefetch) {
  if constexpr (ROWS > 0) {
    if (rows == ROWS) {
      multiply_panel_by<D, ROWS>(w, steps, x, c, prefetch);
    } else {
      multiply_few_rows<D, ROWS - 1>(rows, w, steps, x, c, prefetch);
    }
  }
}

#ifdef RRT_TILES
// The same on tiles, for any number of rows. A panel's steps are the rows of right operands as they lie: pairs of columns
// of 16 outputs beside those of the next 16. Two tiles of rows by two of outputs are summed at a time, on top of what c
// holds, 16 steps in an instruction; x has zeros up to a multiple of 16. Whatever memory follows the last row (see
// kReadBehind) is multiplied too, and dropped: one set-up of the registers serves all numbers of rows.
struct TilePanel {
  static constexpr int64_t kRowStride = kChunk * sizeof(uint32_t);  // of x, in bytes
  static constexpr int64_t kWeightStride = kPanel * sizeof(uint32_t);
  static constexpr int64_t kBlockWeights = kTileSteps * kPanel * 2;
  static_assert(kPanel == 2 * tiles::kRows && kTileSteps == tiles::kRows);
  static_assert(kTileSteps * sizeof(uint32_t) == tiles::kRowBytes);
  static_assert(kChunk % kTileSteps == 0 && kReadBehind == tiles::kRows - 1);

  template <bool BOTH>
  static inline void multiply_steps(const uint32_t* x, const uint16_t* w) {
    tiles::load<6>(w, kWeightStride);
    tiles::load<7>(w + kPanel, kWeightStride);
    tiles::load<4>(x, kRowStride);
    tiles::multiply_add_bf16<0, 4, 6>();
    tiles::multiply_add_bf16<1, 4, 7>();
    if constexpr (BOTH) {
      tiles::load<5>(x + tiles::kRows * kChunk, kRowStride);
      tiles::multiply_add_bf16<2, 5, 6>();
      tiles::multiply_add_bf16<3, 5, 7>();
    }
  }

  // `rows` rows, at most two tiles of them, as BOTH says. `tail`: the steps behind the last 16 that are whole, with zeros;
  // null: none.
  template <bool BOTH>
  static void multiply(int64_t rows, const uint32_t* x, const uint16_t* w, int64_t steps, const uint16_t* tail, float* c,
                       const char* next_w, int64_t next_bytes, int64_t next_stride) {
    TileSums upper(c, kPanel, rows), lower(c + tiles::kRows * kPanel, kPanel, rows - tiles::kRows);
    upper.load<0, 1>();
    if constexpr (BOTH) lower.load<2, 3>();
    int64_t step = 0;
    for (; step + kTileSteps <= steps; step += kTileSteps) {
      for (int64_t byte = 0; byte < next_bytes; byte += 64) __builtin_prefetch(next_w + byte, 0, 2);
      next_w += next_stride;
      multiply_steps<BOTH>(x + step, w + step * kPanel * 2);
    }
    if (tail != nullptr) multiply_steps<BOTH>(x + step, tail);
    upper.store<0, 1>();
    if constexpr (BOTH) lower.store<2, 3>();
  }
};

inline void multiply_panel_on_tiles(int64_t rows, const uint16_t* w, int64_t steps, const uint32_t* x, float* c,
                                    Prefetch prefetch) {
  constexpr int64_t kRows = 2 * tiles::kRows;
  alignas(64) uint16_t zero_padded[TilePanel::kBlockWeights];
  const uint16_t* tail = nullptr;
  if (const int64_t rest = steps % kTileSteps; rest > 0) {
    std::memcpy(zero_padded, w + (steps - rest) * kPanel * 2, rest * TilePanel::kWeightStride);
    std::memset(zero_padded + rest * kPanel * 2, 0, (kTileSteps - rest) * TilePanel::kWeightStride);
    tail = zero_padded;
  }
  // Every pair of tiles brings its share of each 16 steps.
  const int64_t next_stride = kTileSteps * prefetch.stride, next_bytes = next_stride / ceil_div(rows, kRows);
  const char* next_w = prefetch.from;
  for (; rows > 0; rows -= kRows, x += kRows * kChunk, c += kRows * kPanel, next_w += next_bytes) {
    const auto multiply = rows > tiles::kRows ? TilePanel::multiply<true> : TilePanel::multiply<false>;
    multiply(rows, x, w, steps, tail, c, next_w, next_bytes, next_stride);
  }
}
#endif

// The same for a number of rows up to kTileRows that is known at run time.
template <class D>
inline void multiply_panel(int64_t rows, const typename D::Storage* w, int64_t steps, const PanelUnit<D>* x,
                           typename D::Acc* c, Prefetch prefetch) {
  if constexpr (kOnTiles<D>) {
    multiply_panel_on_tiles(rows, w, steps, x, c, prefetch);
  } else {
    multiply_few_rows<D>(rows, w, steps, x, c, prefetch);
  }
}

// to[column][row] = from[row][column] for `columns` columns (rows missing up to kPanel are zeros) of elements of
// one step each.
template <class T>
inline void transpose_to_panel(const T* from, int64_t stride, int64_t rows, int64_t columns, T* to) {
  using Vec = typename Register<T, 16>::Type;
  constexpr int kSide = kNumLanes<Vec>;
  int64_t row = 0;
  if constexpr (kSide == 4) {
    for (; row + kSide <= rows; row += kSide) {
      const T* f = from + row * stride;
      int64_t column = 0;
      for (; column + kSide <= columns; column += kSide) {
        if (column % 16 == 0) {
          // Rows lie too far apart for the hardware to foresee the next chunk.
          for (int i = 0; i < kSide; ++i) __builtin_prefetch(f + i * stride + column + columns);
        }
        Vec square[kSide];
        for (int i = 0; i < kSide; ++i) square[i] = load<Vec>(f + i * stride + column);
        transpose(square);
        for (int i = 0; i < kSide; ++i) std::memcpy(to + (column + i) * kPanel + row, &square[i], sizeof(Vec));
      }
      for (; column < columns; ++column) {
        for (int i = 0; i < kSide; ++i) to[column * kPanel + row + i] = load<T>(f + i * stride + column);
      }
    }
  }
  for (; row < rows; ++row) {
    const T* f = from + row * stride;
    for (int64_t column = 0; column < columns; ++column) to[column * kPanel + row] = load<T>(f + column);
  }
  for (; row < kPanel; ++row) {
    for (int64_t column = 0; column < columns; ++column) to[column * kPanel + row] = 0;
  }
}

// `columns` columns of `rows` rows, as steps of the packed form.
template <class D>
void pack_columns(const typename D::Storage* from, int64_t stride, int64_t rows, int64_t columns,
                  typename D::Storage* to) {
  if constexpr (kStepColumns<D> == 1) {
    transpose_to_panel(from, stride, rows, columns, to);
  } else {
    const int64_t pairs = columns / 2;
    if (stride % 2 == 0) {
      transpose_to_panel(reinterpret_cast<const uint32_t*>(from), stride / 2, rows, pairs,
                         reinterpret_cast<uint32_t*>(to));
    } else {
      for (int64_t row = 0; row < kPanel; ++row) {
        for (int64_t column = 0; column < 2 * pairs; ++column) {
          to[(column / 2 * kPanel + row) * 2 + column % 2] = row < rows ? from[row * stride + column] : 0;
        }
      }
    }
    if (columns % 2 == 0) return;
    for (int64_t row = 0; row < kPanel; ++row) {
      to[(pairs * kPanel + row) * 2] = row < rows ? from[row * stride + columns - 1] : 0;
      to[(pairs * kPanel + row) * 2 + 1] = 0;
    }
  }
}

// The panel of a matrix [n, columns of `stride`] that begins at output `first`, chunk by chunk: as it lies if
// packed, else packed here.
template <class D>
class Panel {
 public:
  using Storage = typename D::Storage;

  // `columns` are read; a packed panel has the steps of all `stride` columns. The memory of weights ends at `end`.
  Panel(bool packed, const Storage* matrix, int64_t first, int64_t n, int64_t stride, int64_t columns,
        const Storage* end)
      : packed_(packed), stride_(stride), rows_(n - first < kPanel ? n - first : kPanel), columns_(columns), end_(end) {
    from_ = matrix + (packed ? first * round_up(stride, kStepColumns<D>) : first * stride);
  }

  // At least one, of no steps if there are no columns.
  int64_t chunks() const { return columns_ == 0 ? 1 : num_chunks(total_steps()); }
  int64_t steps(int64_t chunk) const {
    const int64_t rest = total_steps() - chunk * kChunk;
    return rest < kChunk ? rest : kChunk;
  }
  const Storage* chunk(int64_t index) {
    if (packed_) return from_ + index * kChunk * kStepSize<D>;
    const int64_t first = index * kChunkColumns<D>;
    const int64_t rest = columns_ - first;
    const int64_t size = rest < kChunkColumns<D> ? rest : kChunkColumns<D>;
    pack_columns<D>(from_ + first, stride_, rows_, size, buffer_);
    return buffer_;
  }
  // As much as the chunk of what follows it, for the first of `products` products with it that each prefetch a part: if
  // the first brought all of it, memory would rest during the others. Nothing from behind the weights: where no memory
  // is, a prefetch walks through the page tables each time, and a product with one per step takes twice as long.
  Prefetch next(int64_t index, const Storage* chunk, int64_t products = 1) const {
    const Storage* from = chunk + steps(index) * kStepSize<D>;
    if (!packed_ || end_ - from < from - chunk) return {reinterpret_cast<const char*>(chunk), 0};
    return {reinterpret_cast<const char*>(from), kStepBytes<D> / products};
  }

 private:
  int64_t total_steps() const { return ceil_div(columns_, kStepColumns<D>); }

  bool packed_;
  const Storage* from_;
  int64_t stride_;
  int64_t rows_;
  int64_t columns_;
  const Storage* end_;
  alignas(64) Storage buffer_[kChunk * kStepSize<D>];
};

// Where `row` of a block of `rows` begins in chunk `chunk` of operands [chunks, rows, kChunk].
template <class D>
inline PanelUnit<D>* operands_at(void* operands, int64_t rows, int64_t chunk, int64_t row) {
  return static_cast<PanelUnit<D>*>(operands) + (chunk * rows + row) * kChunk;
}

template <class D>
void pack_row(const RowOperands& block, int64_t row) {
  using P = PanelProduct<D>;
  const auto* from = static_cast<const typename D::Storage*>(block.x) + block.order[row] * block.x_row_stride;
  for (int64_t first = 0; first < block.k; first += kChunkColumns<D>) {
    const int64_t columns = block.k - first < kChunkColumns<D> ? block.k - first : kChunkColumns<D>;
    PanelUnit<D>* to = operands_at<D>(block.operands, block.rows, first / kChunkColumns<D>, row);
    int64_t column = 0;
    if constexpr (P::kStep * sizeof(typename D::Storage) == sizeof(PanelUnit<D>)) {
      // By vectors: of a call per chunk, half the time would go into waiting for the rows.
      using Full = typename Register<typename D::Storage>::Type;
      auto* storage = reinterpret_cast<typename D::Storage*>(to);
      for (; column + kNumLanes<Full> <= columns; column += kNumLanes<Full>) {
        const Full values = load<Full>(from + first + column);
        std::memcpy(storage + column, &values, sizeof(values));
      }
      std::memcpy(storage + column, from + first + column, (columns - column) * sizeof(*storage));
      column = columns;
    } else {
      for (; column + kLanes<D> <= columns; column += kLanes<D>) {
        const typename D::Vec wide = D::widen(from + first + column);
        std::memcpy(reinterpret_cast<typename D::Acc*>(to) + column, &wide, sizeof(wide));
      }
      for (; column < columns; ++column) P::set(to, column, widen_one<D>(from + first + column));
    }
    for (column = columns; column % kOperandColumns<D> != 0; ++column) P::set(to, column, 0);
  }
}

template <class D>
inline void clear(typename D::Acc* c, int64_t size) {
  std::memset(c, 0, size * sizeof(*c));
}

// sums [rows, kPanel] += a panel of weights times every row of the block, tile by tile. Before and after the last
// product with a tile, prepare(tile) and finish(tile) are called.
template <class D, class Prepare, class Finish>
void multiply_block(Panel<D>& panel, const RowOperands& block, typename D::Acc* sums, const Prepare& prepare,
                    const Finish& finish) {
  for (int64_t chunk = 0; chunk < panel.chunks(); ++chunk) {
    const typename D::Storage* w = panel.chunk(chunk);
    const int64_t steps = panel.steps(chunk);
    const bool is_last = chunk + 1 == panel.chunks();
    Prefetch prefetch = panel.next(chunk, w, block.num_tiles);
    for (int64_t i = 0; i < block.num_tiles; ++i, prefetch.from += steps * prefetch.stride) {
      const RowTile& tile = block.tiles[i];
      if (is_last) prepare(tile);
      multiply_panel<D>(tile.rows, w, steps, operands_at<D>(block.operands, block.rows, chunk, tile.begin),
                        sums + tile.begin * kPanel, prefetch);
      if (is_last) finish(tile);
    }
  }
}

}  // namespace
}  // namespace rrt::packed_linear
