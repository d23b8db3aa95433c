// Compiled once per instruction set (CMakeLists.txt): RRT_KERNELS names the table, RRT_TILE_ROWS the rows whose
// accumulators its registers hold.
#include "loop_lora/cpu_kernels.h"
#include "simd_products.h"

namespace rrt::loop_lora {
namespace {

constexpr int kMaxAccumulators = 2 * RRT_TILE_ROWS;

// How each dtype multiplies. Operand: what a row holds for one step; its weights are kPanel * kStep values.
// multiply: acc[r] += weights * operands[r * kChunk], for VECTORS vectors of outputs.
template <class D>
struct Product {
  using Operand = typename D::Acc;
  using Vec = typename D::Vec;
  static constexpr int kStep = 1;
  static constexpr int kLanes = sizeof(Vec) / sizeof(typename D::Acc);

  static void set(Operand* to, int64_t column, typename D::Acc value) { to[column] = value; }

  template <int ROWS, int VECTORS>
  static inline __attribute__((always_inline)) void multiply(const typename D::Storage* w, const Operand* x,
                                                             Vec (&acc)[ROWS][VECTORS]) {
    Vec weights[VECTORS];
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) weights[v] = D::widen(w + v * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) {
      const Operand value = x[r * kChunk];
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; ++v) acc[r][v] += weights[v] * value;
    }
  }
};

#ifdef __AVX512BF16__
template <>
struct Product<BFloat16> {
  using Operand = uint32_t;  // two adjacent columns in bfloat16, the first in the low half
  using Vec = F32;
  static constexpr int kStep = 2;
  static constexpr int kLanes = 16;

  static void set(Operand* to, int64_t column, float value) {
    reinterpret_cast<uint16_t*>(to)[column] = BFloat16::narrow(value);
  }

  template <int ROWS, int VECTORS>
  static inline __attribute__((always_inline)) void multiply(const uint16_t* w, const Operand* x,
                                                             Vec (&acc)[ROWS][VECTORS]) {
    static_assert(VECTORS == 2);
    const auto w0 = load<__m512bh>(w), w1 = load<__m512bh>(w + 2 * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) {
      const auto pair = reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(x[r * kChunk])));
      acc[r][0] = _mm512_dpbf16_ps(acc[r][0], w0, pair);
      acc[r][1] = _mm512_dpbf16_ps(acc[r][1], w1, pair);
    }
  }
};
#else
template <>
struct Product<BFloat16> {
  struct Operand {
    float column[2];
  };
  using Vec = F32;
  static constexpr int kStep = 2;
  static constexpr int kLanes = sizeof(Vec) / sizeof(float);

  static void set(Operand* to, int64_t column, float value) { to[column / 2].column[column % 2] = value; }

  template <int ROWS, int VECTORS>
  static inline __attribute__((always_inline)) void multiply(const uint16_t* w, const Operand* x,
                                                             Vec (&acc)[ROWS][VECTORS]) {
    Vec low[VECTORS], high[VECTORS];
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) {
      const U32 pairs = load<U32>(w + v * 2 * kLanes);
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
using Operand = typename Product<D>::Operand;

template <class D>
constexpr int64_t kStepBytes = kPanel * Product<D>::kStep * sizeof(typename D::Storage);

// What a product brings to the cache meanwhile, `stride` bytes per step: the hardware's own prefetching ends at every
// page.
struct Ahead {
  const char* from;
  int64_t stride;
};

// Tiles of few rows: as many as take a panel in one pass, a single stream of memory, if the weights are multiplied as
// they lie. Widening them once per tile would cost more than that saves.
template <class D>
constexpr int64_t kFewTileRows = [] {
  constexpr int64_t kOnePass = kMaxAccumulators / (kPanel / Product<D>::kLanes);
  return sizeof(typename D::Storage) == sizeof(typename D::Acc) && kOnePass > 1 && kOnePass < RRT_TILE_ROWS
             ? kOnePass
             : RRT_TILE_ROWS;
}();

// c[r][n] += sum over `steps` of w[step][n] x[r][step], for a panel of outputs: all of them at once if their sums fit
// the registers, so that a single stream is read, else in passes.
template <class D, int ROWS>
void multiply_panel(const typename D::Storage* w, int64_t steps, const Operand<D>* x, typename D::Acc* c,
                    Ahead ahead, int64_t x_rows) {
  using P = Product<D>;
  constexpr int kPanelVectors = kPanel / P::kLanes;
  constexpr int kVectors = ROWS * kPanelVectors <= kMaxAccumulators ? kPanelVectors : 2;
  constexpr int kWidth = kVectors * P::kLanes;
  constexpr int64_t kPasses = kPanel / kWidth;
  static_assert(kPanel % kWidth == 0);
  const char* next_x = reinterpret_cast<const char*>(x + x_rows * kChunk);
  const int64_t stride = ahead.stride / kPasses;
  for (int64_t pass = 0; pass < kPasses; ++pass) {
    typename D::Vec acc[ROWS][kVectors] = {};
    const typename D::Storage* from = w + pass * kWidth * P::kStep;
    const char* next_w = ahead.from + pass * steps * stride;
    for (int64_t step = 0; step < steps; ++step) {
      __builtin_prefetch(next_w + step * stride, 0, 2);
      if (stride > 64) __builtin_prefetch(next_w + step * stride + 64, 0, 2);
      if (pass == 0) __builtin_prefetch(next_x + step * ROWS * sizeof(Operand<D>));
      P::template multiply<ROWS, kVectors>(from + step * kPanel * P::kStep, x + step, acc);
    }
    for (int r = 0; r < ROWS; ++r) {
      for (int v = 0; v < kVectors; ++v) {
        typename D::Acc* to = c + r * kPanel + pass * kWidth + v * P::kLanes;
        const typename D::Vec sum = load<typename D::Vec>(to) + acc[r][v];
        std::memcpy(to, &sum, sizeof(sum));
      }
    }
  }
}

template <class D, int ROWS = RRT_TILE_ROWS>
inline void multiply_rows(int64_t rows, const typename D::Storage* w, int64_t steps, const Operand<D>* x,
                          typename D::Acc* c, Ahead ahead, int64_t x_rows) {
  if constexpr (ROWS > 0) {
    if (rows == ROWS) {
      multiply_panel<D, ROWS>(w, steps, x, c, ahead, x_rows);
    } else {
      multiply_rows<D, ROWS - 1>(rows, w, steps, x, c, ahead, x_rows);
    }
  }
}

// What the `share`th of `shares` products with the same chunk of a stream of weights brings: its part of the next, as
// large, or memory would rest after the first of them.
template <class D>
inline Ahead next_chunk(const typename D::Storage* w, int64_t steps, int64_t share = 0, int64_t shares = 1) {
  const int64_t bytes = steps * kStepBytes<D>;
  return {reinterpret_cast<const char*>(w) + bytes + share * bytes / shares, kStepBytes<D> / shares};
}

// to[column][row] = from[row][column] for `columns` columns (rows missing up to kPanel are zeros) of elements of
// one step each.
template <class T>
inline void transpose(const T* from, int64_t stride, int64_t rows, int64_t columns, T* to) {
  constexpr int kBlock = 16 / sizeof(T);
  typedef T Block __attribute__((vector_size(16)));
  int64_t row = 0;
  if constexpr (kBlock == 4) {
    for (; row + kBlock <= rows; row += kBlock) {
      const T* f = from + row * stride;
      int64_t column = 0;
      for (; column + kBlock <= columns; column += kBlock) {
        if (column % 16 == 0) {
          // Rows lie too far apart for the hardware to foresee the next chunk.
          for (int i = 0; i < kBlock; ++i) __builtin_prefetch(f + i * stride + column + columns);
        }
        const Block a = load<Block>(f + column), b = load<Block>(f + stride + column);
        const Block c = load<Block>(f + 2 * stride + column), d = load<Block>(f + 3 * stride + column);
        const Block ab0 = RRT_SHUFFLE4(a, b, 0, 4, 1, 5), ab1 = RRT_SHUFFLE4(a, b, 2, 6, 3, 7);
        const Block cd0 = RRT_SHUFFLE4(c, d, 0, 4, 1, 5), cd1 = RRT_SHUFFLE4(c, d, 2, 6, 3, 7);
        const Block out[kBlock] = {
            RRT_SHUFFLE4(ab0, cd0, 0, 1, 4, 5), RRT_SHUFFLE4(ab0, cd0, 2, 3, 6, 7),
            RRT_SHUFFLE4(ab1, cd1, 0, 1, 4, 5), RRT_SHUFFLE4(ab1, cd1, 2, 3, 6, 7)};
        for (int i = 0; i < kBlock; ++i) std::memcpy(to + (column + i) * kPanel + row, &out[i], sizeof(Block));
      }
      for (; column < columns; ++column) {
        for (int i = 0; i < kBlock; ++i) to[column * kPanel + row + i] = load<T>(f + i * stride + column);
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

// Columns [begin, begin + columns) of `rows` rows, as steps of the packed form.
template <class D>
void pack_steps_of(const typename D::Storage* from, int64_t stride, int64_t rows, int64_t columns,
                   typename D::Storage* to) {
  if constexpr (Product<D>::kStep == 1) {
    transpose(from, stride, rows, columns, to);
  } else {
    const int64_t pairs = columns / 2;
    if (stride % 2 == 0) {
      transpose(reinterpret_cast<const uint32_t*>(from), stride / 2, rows, pairs, reinterpret_cast<uint32_t*>(to));
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
  static constexpr int64_t kStepSize = kPanel * Product<D>::kStep;

  // `columns` are read; a packed panel has the steps of all `stride` columns.
  Panel(bool packed, const Storage* matrix, int64_t first, int64_t n, int64_t stride, int64_t columns)
      : packed_(packed), stride_(stride), rows_(n - first < kPanel ? n - first : kPanel), columns_(columns) {
    constexpr int64_t kStep = Product<D>::kStep;
    from_ = matrix + (packed ? first * round_up(stride, kStep) : first * stride);
  }

  int64_t chunks() const { return num_chunks(total_steps()); }
  int64_t steps(int64_t chunk) const {
    const int64_t rest = total_steps() - chunk * kChunk;
    return rest < kChunk ? rest : kChunk;
  }
  const Storage* chunk(int64_t index) {
    if (packed_) return from_ + index * kChunk * kStepSize;
    const int64_t first = index * kChunk * Product<D>::kStep;
    const int64_t rest = columns_ - first;
    const int64_t size = rest < kChunk * Product<D>::kStep ? rest : kChunk * Product<D>::kStep;
    pack_steps_of<D>(from_ + first, stride_, rows_, size, buffer_);
    return buffer_;
  }

 private:
  int64_t total_steps() const { return ceil_div(columns_, Product<D>::kStep); }

  bool packed_;
  const Storage* from_;
  int64_t stride_;
  int64_t rows_;
  int64_t columns_;
  alignas(64) Storage buffer_[kChunk * kStepSize];
};

template <class D>
inline int64_t matrix_size(const Params& p, int64_t n, int64_t k) {
  constexpr int64_t kStep = Product<D>::kStep;
  return p.packed ? round_up(n, kPanel) * round_up(k, kStep) : n * k;
}

template <class D>
inline Operand<D>* operands(void* buffer, const CpuWork& work, int64_t chunk, int64_t row) {
  return static_cast<Operand<D>*>(buffer) + (chunk * work.rows + row) * kChunk;
}

template <class D>
void pack_rows(const CpuWork& work, int64_t begin, int64_t end) {
  constexpr int64_t kColumns = kChunk * Product<D>::kStep;
  const Params& p = *work.params;
  for (int64_t row = begin; row < end; ++row) {
    const auto* from = static_cast<const typename D::Storage*>(p.x) + work.order[row] * p.x_row_stride;
    for (int64_t first = 0; first < p.k; first += kColumns) {
      const int64_t columns = p.k - first < kColumns ? p.k - first : kColumns;
      Operand<D>* to = operands<D>(work.packed_x, work, first / kColumns, row);
      int64_t column = 0;
      if constexpr (Product<D>::kStep * sizeof(typename D::Storage) == sizeof(Operand<D>)) {
        std::memcpy(to, from + first, columns * sizeof(typename D::Storage));
        column = columns;
      } else {
        constexpr int kLanes = sizeof(typename D::Vec) / sizeof(typename D::Acc);
        for (; column + kLanes <= columns; column += kLanes) {
          const typename D::Vec wide = D::widen(from + first + column);
          std::memcpy(reinterpret_cast<typename D::Acc*>(to) + column, &wide, sizeof(wide));
        }
        for (; column < columns; ++column) Product<D>::set(to, column, widen_one<D>(from + first + column));
      }
      if (columns % Product<D>::kStep != 0) Product<D>::set(to, columns, 0);
    }
    for (int64_t s = 0; s < work.num_segments; ++s) {
      const int64_t rank = work.segments[s].rank;
      if (rank % Product<D>::kStep == 0) continue;
      Product<D>::set(operands<D>(work.shrunk, work, work.segment_chunk[s] + rank / kColumns, row), rank % kColumns, 0);
    }
  }
}

template <class D>
inline void clear(typename D::Acc* c, int64_t size) {
  std::memset(c, 0, size * sizeof(*c));
}

// Tasks: one panel of lora_a's ranks, for one of the present loops.
template <class D>
void shrink(const CpuWork& work, int64_t begin, int64_t end) {
  using Acc = typename D::Acc;
  constexpr int64_t kColumns = kChunk * Product<D>::kStep;
  const Params& p = *work.params;
  const int64_t panels = num_panels(p.total_rank);
  alignas(64) Acc sums[kMaxBlockRows * kPanel];
  for (int64_t task = begin; task < end; ++task) {
    const RowPiece* first = work.pieces + work.present[task / panels];
    const RowPiece* last = work.pieces + work.present[task / panels + 1];
    const int64_t row_begin = first->begin, row_end = (last - 1)->begin + (last - 1)->rows;
    const int64_t rank_begin = task % panels * kPanel;
    const auto* a = static_cast<const typename D::Storage*>(p.lora_a) + first->loop * matrix_size<D>(p, p.total_rank, p.k);
    Panel<D> panel(p.packed, a, rank_begin, p.total_rank, p.k, p.k);
    clear<D>(sums, (row_end - row_begin) * kPanel);
    for (int64_t chunk = 0; chunk < panel.chunks(); ++chunk) {
      const typename D::Storage* w = panel.chunk(chunk);
      for (const RowPiece* piece = first; piece < last; ++piece) {
        multiply_rows<D>(piece->rows, w, panel.steps(chunk), operands<D>(work.packed_x, work, chunk, piece->begin),
                         sums + (piece->begin - row_begin) * kPanel, next_chunk<D>(w, panel.steps(chunk)), work.rows);
      }
    }
    for (int64_t s = 0; s < work.num_segments; ++s) {
      const Segment& segment = work.segments[s];
      const int64_t lane_begin = segment.rank_begin > rank_begin ? segment.rank_begin - rank_begin : 0;
      const int64_t segment_end = segment.rank_begin + segment.rank - rank_begin;
      const int64_t lane_end = segment_end < kPanel ? segment_end : kPanel;
      for (int64_t lane = lane_begin; lane < lane_end; ++lane) {
        const int64_t column = rank_begin + lane - segment.rank_begin;
        Operand<D>* to = operands<D>(work.shrunk, work, work.segment_chunk[s] + column / kColumns, row_begin);
        for (int64_t row = 0; row < row_end - row_begin; ++row) {
          Product<D>::set(to + row * kChunk, column % kColumns, sums[row * kPanel + lane]);
        }
      }
    }
  }
}

// sums += lora_b of the rows' loops times their shrunk values, for lanes [lane_begin, lane_end) of the panel.
template <class D>
void add_lora(const CpuWork& work, int64_t out, int64_t segment_index, int64_t lane_begin, int64_t lane_end,
              typename D::Acc* sums) {
  using Acc = typename D::Acc;
  const Params& p = *work.params;
  const Segment& segment = work.segments[segment_index];
  const bool whole = lane_begin == 0 && lane_end == kPanel;
  alignas(64) Acc partial[kMaxBlockRows * kPanel];
  Acc* to = whole ? sums : partial;
  if (!whole) clear<D>(partial, work.rows * kPanel);
  for (int64_t i = 0; i < work.num_present; ++i) {
    const RowPiece* first = work.pieces + work.present[i];
    const RowPiece* last = work.pieces + work.present[i + 1];
    const auto* b = static_cast<const typename D::Storage*>(p.lora_b) + first->loop * matrix_size<D>(p, p.n, p.b_stride);
    Panel<D> panel(p.packed, b, out, p.n, p.b_stride, segment.rank);
    for (int64_t chunk = 0; chunk < panel.chunks(); ++chunk) {
      const typename D::Storage* w = panel.chunk(chunk);
      for (const RowPiece* piece = first; piece < last; ++piece) {
        multiply_rows<D>(piece->rows, w, panel.steps(chunk),
                         operands<D>(work.shrunk, work, work.segment_chunk[segment_index] + chunk, piece->begin),
                         to + piece->begin * kPanel, next_chunk<D>(w, panel.steps(chunk)), work.rows);
      }
    }
  }
  if (whole) return;
  for (int64_t row = 0; row < work.rows; ++row) {
    for (int64_t lane = lane_begin; lane < lane_end; ++lane) sums[row * kPanel + lane] += partial[row * kPanel + lane];
  }
}

template <class D>
void store(const CpuWork& work, int64_t out, int64_t lanes, const typename D::Acc* sums) {
  using Acc = typename D::Acc;
  const Params& p = *work.params;
  for (int64_t i = 0; i < work.present[work.num_present]; ++i) {
    const RowPiece& piece = work.pieces[i];
    alignas(64) Acc bias[kPanel] = {};
    if (p.bias != nullptr) {
      const auto* from = static_cast<const typename D::Storage*>(p.bias) + piece.loop * p.bias_loop_stride + out;
      for (int64_t lane = 0; lane < lanes; ++lane) bias[lane] = widen_one<D>(from + lane);
    }
    for (int64_t row = piece.begin; row < piece.begin + piece.rows; ++row) {
      typename D::Storage narrowed[kPanel];
      for (int lane = 0; lane < kPanel; ++lane) narrowed[lane] = D::narrow(sums[row * kPanel + lane] + bias[lane]);
      auto* to = static_cast<typename D::Storage*>(p.y) + work.order[row] * p.n + out;
      std::memcpy(to, narrowed, lanes * sizeof(narrowed[0]));
    }
  }
}

// Tasks: panels of the weight.
template <class D>
void expand(const CpuWork& work, int64_t begin, int64_t end) {
  using Acc = typename D::Acc;
  const Params& p = *work.params;
  alignas(64) Acc sums[kMaxBlockRows * kPanel];
  for (int64_t task = begin; task < end; ++task) {
    const int64_t out = task * kPanel;
    const int64_t lanes = p.n - out < kPanel ? p.n - out : kPanel;
    clear<D>(sums, work.rows * kPanel);
    Panel<D> panel(p.packed, static_cast<const typename D::Storage*>(p.weight), out, p.n, p.k, p.k);
    for (int64_t chunk = 0; chunk < panel.chunks(); ++chunk) {
      const typename D::Storage* w = panel.chunk(chunk);
      for (int64_t i = 0; i < work.num_tiles; ++i) {
        const RowTile& tile = work.tiles[i];
        multiply_rows<D>(tile.rows, w, panel.steps(chunk), operands<D>(work.packed_x, work, chunk, tile.begin),
                         sums + tile.begin * kPanel, next_chunk<D>(w, panel.steps(chunk), i, work.num_tiles), work.rows);
      }
    }
    for (int64_t s = 0; s < work.num_segments; ++s) {
      const Segment& segment = work.segments[s];
      const int64_t lane_begin = segment.out_begin > out ? segment.out_begin - out : 0;
      const int64_t segment_end = segment.out_begin + segment.out_size - out;
      // The last lanes of the last panel are of no segment, and come along for free.
      const int64_t lane_end = segment_end < lanes ? segment_end : kPanel;
      if (segment.rank > 0 && lane_begin < lane_end && segment_end > 0) {
        add_lora<D>(work, out, s, lane_begin, lane_end, sums);
      }
    }
    store<D>(work, out, lanes, sums);
  }
}

// The softmax of a row over the outputs so far.
template <class D>
struct RowStatistics {
  using Acc = typename D::Acc;
  using Vec = typename D::Vec;
  static constexpr int kVectors = kPanel / kLanes<D>;

  Acc max;
  Vec sum;  // of exp(logit - max), by lanes
  int64_t argmax;

  // A panel's logits; those of outputs that do not exist are minus infinity.
  void add(const Acc* logits, int64_t first_output) {
    const auto larger = [](auto a, auto b) { return a > b ? a : b; };
    Vec panel[kVectors], largest = load<Vec>(logits);
    for (int v = 0; v < kVectors; ++v) {
      panel[v] = load<Vec>(logits + v * kLanes<D>);
      largest = larger(panel[v], largest);
    }
    const Acc panel_max = reduce_lanes(largest, larger);
    if (panel_max > max) {
      sum *= exp_one<D>(max - panel_max);
      max = panel_max;
      int64_t lane = 0;
      while (lane < kPanel - 1 && logits[lane] != panel_max) ++lane;
      argmax = first_output + lane;
    }
    for (int v = 0; v < kVectors; ++v) sum += exp_negative(panel[v] - max);
  }
};

// Tasks: parts of the outputs.
template <class D>
void statistics(const StatisticsWork& work, int64_t begin, int64_t end) {
  using Acc = typename D::Acc;
  const CpuWork& block = work.block;
  alignas(64) Acc sums[kMaxBlockRows * kPanel];
  RowStatistics<D> rows[kMaxBlockRows];
  for (int64_t part = begin; part < end; ++part) {
    const int64_t first = part * kPartPanels * kPanel;
    for (int64_t row = 0; row < block.rows; ++row) rows[row] = RowStatistics<D>{kLowest<Acc>, typename D::Vec{}, first};
    const int64_t last = smaller((part + 1) * kPartPanels, num_panels(work.n));
    for (int64_t out = first; out < last * kPanel; out += kPanel) {
      clear<D>(sums, block.rows * kPanel);
      Panel<D> panel(true, static_cast<const typename D::Storage*>(work.weight), out, work.n, work.k, work.k);
      for (int64_t chunk = 0; chunk < panel.chunks(); ++chunk) {
        const typename D::Storage* w = panel.chunk(chunk);
        for (int64_t i = 0; i < block.num_tiles; ++i) {
          const RowTile& tile = block.tiles[i];
          multiply_rows<D>(tile.rows, w, panel.steps(chunk), operands<D>(block.packed_x, block, chunk, tile.begin),
                           sums + tile.begin * kPanel, next_chunk<D>(w, panel.steps(chunk), i, block.num_tiles),
                           block.rows);
        }
      }
      for (int64_t row = 0; row < block.rows; ++row) {
        for (int64_t lane = work.n - out; lane < kPanel; ++lane) sums[row * kPanel + lane] = kUnseen<Acc>;
        rows[row].add(sums + row * kPanel, out);
      }
    }
    for (int64_t row = 0; row < block.rows; ++row) {
      const Acc sum = reduce_lanes(rows[row].sum, [](Acc a, Acc b) { return a + b; });
      work.parts[part * block.rows + row] = {rows[row].max, sum, rows[row].argmax};
    }
  }
}

template <class D>
void pack_panels(const PackWork& work, int64_t begin, int64_t end) {
  constexpr int64_t kStep = Product<D>::kStep;
  const int64_t panels = num_panels(work.n);
  const int64_t panel_size = kPanel * round_up(work.k, kStep);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t matrix = task / panels, first = task % panels * kPanel;
    const auto* from = static_cast<const typename D::Storage*>(work.from) + (matrix * work.n + first) * work.k;
    auto* to = static_cast<typename D::Storage*>(work.to) + task * panel_size;
    pack_steps_of<D>(from, work.k, work.n - first < kPanel ? work.n - first : kPanel, work.k, to);
  }
}

}  // namespace

const CpuKernels RRT_KERNELS = {
    RRT_TILE_ROWS,
    {kFewTileRows<Float32>, kFewTileRows<Float64>, kFewTileRows<BFloat16>, kFewTileRows<Float16>},
    {sizeof(Operand<Float32>), sizeof(Operand<Float64>), sizeof(Operand<BFloat16>), sizeof(Operand<Float16>)},
    {pack_rows<Float32>, pack_rows<Float64>, pack_rows<BFloat16>, pack_rows<Float16>},
    {shrink<Float32>, shrink<Float64>, shrink<BFloat16>, shrink<Float16>},
    {expand<Float32>, expand<Float64>, expand<BFloat16>, expand<Float16>},
    {statistics<Float32>, statistics<Float64>, statistics<BFloat16>, statistics<Float16>},
    {pack_panels<Float32>, pack_panels<Float64>, pack_panels<BFloat16>, pack_panels<Float16>},
};

}  // namespace rrt::loop_lora
