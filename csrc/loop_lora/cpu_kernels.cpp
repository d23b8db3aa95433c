// Compiled once per instruction set (CMakeLists.txt): RRT_KERNELS names the table.
#include "loop_lora/cpu_kernels.h"

#include "elementwise/gate.h"
#include "packed_linear/panel_products.h"

namespace rrt::loop_lora {
namespace {

using namespace packed_linear;

// A small batch is cut into tiles of as many rows as take a panel in one pass, a single stream of memory, if the
// weights are multiplied as they lie. Widening them once per tile would cost more than that saves.
template <class D>
constexpr int64_t kFewTileRows = [] {
  constexpr int64_t kOnePass = kMaxAccumulators / (kPanel / kLanes<D>);
  if (kOnTiles<D>) return kTileRows<D>;
  return sizeof(typename D::Storage) == sizeof(typename D::Acc) && kOnePass > 1 && kOnePass < RRT_TILE_ROWS
             ? kOnePass
             : kTileRows<D>;
}();

// Elements of a matrix [n, k] as the weights come.
template <class D>
inline int64_t matrix_size(const Params& p, int64_t n, int64_t k) {
  return p.packed ? round_up(n, kPanel) * round_up(k, kStepColumns<D>) : n * k;
}

// Where the block's shrunk values of `row` begin, in chunk `chunk` of a segment's ranks.
template <class D>
inline PanelUnit<D>* shrunk_at(const CpuWork& work, int64_t segment, int64_t chunk, int64_t row) {
  return operands_at<D>(work.shrunk, work.x.rows, work.segment_chunk[segment] + chunk, row);
}

template <class D>
void pack_rows(const RowOperands& block, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) pack_row<D>(block, row);
}

// Tasks: one panel of lora_a's ranks, for one of the block's loops.
template <class D>
void shrink(const CpuWork& work, int64_t begin, int64_t end) {
  using Acc = typename D::Acc;
  const Params& p = *work.params;
  const int64_t panels = num_panels(p.total_rank) - p.first_rank_panel;
  [[maybe_unused]] TileRegisters<D> registers;
  alignas(64) Acc sums[kMaxBlockRows * kPanel];
  for (int64_t task = begin; task < end; ++task) {
    const RowPiece* first = work.pieces + work.loop_starts[task / panels];
    const RowPiece* last = work.pieces + work.loop_starts[task / panels + 1];
    const int64_t row_begin = first->begin, row_end = (last - 1)->begin + (last - 1)->rows;
    const int64_t rank_begin = (p.first_rank_panel + task % panels) * kPanel;
    const auto* a = static_cast<const typename D::Storage*>(p.lora_a);
    const int64_t size = matrix_size<D>(p, p.total_rank, p.k);
    Panel<D> panel(p.packed, a + first->loop * size, rank_begin, p.total_rank, p.k, p.k, a + p.num_loops * size);
    clear<D>(sums, (row_end - row_begin) * kPanel);
    for (int64_t chunk = 0; chunk < panel.chunks(); ++chunk) {
      const typename D::Storage* w = panel.chunk(chunk);
      for (const RowPiece* piece = first; piece < last; ++piece) {
        multiply_panel<D>(piece->rows, w, panel.steps(chunk),
                          operands_at<D>(work.x.operands, work.x.rows, chunk, piece->begin),
                          sums + (piece->begin - row_begin) * kPanel, panel.next(chunk, w));
      }
    }
    for (int64_t s = 0; s < work.num_segments; ++s) {
      const Segment& segment = work.segments[s];
      const int64_t lane_begin = segment.rank_begin > rank_begin ? segment.rank_begin - rank_begin : 0;
      const int64_t segment_end = segment.rank_begin + segment.rank - rank_begin;
      const int64_t lane_end = segment_end < kPanel ? segment_end : kPanel;
      for (int64_t lane = lane_begin; lane < lane_end; ++lane) {
        const int64_t column = rank_begin + lane - segment.rank_begin;
        PanelUnit<D>* to = shrunk_at<D>(work, s, column / kChunkColumns<D>, row_begin);
        for (int64_t row = 0; row < row_end - row_begin; ++row) {
          PanelProduct<D>::set(to + row * kChunk, column % kChunkColumns<D>, sums[row * kPanel + lane]);
        }
      }
      // The last steps may have columns of no rank.
      if (lane_begin >= lane_end || segment_end > kPanel) continue;
      for (int64_t column = segment.rank; column % kOperandColumns<D> != 0; ++column) {
        PanelUnit<D>* to = shrunk_at<D>(work, s, column / kChunkColumns<D>, row_begin);
        for (int64_t row = 0; row < row_end - row_begin; ++row) {
          PanelProduct<D>::set(to + row * kChunk, column % kChunkColumns<D>, 0);
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
  if (!whole) clear<D>(partial, work.x.rows * kPanel);
  for (int64_t i = 0; i < work.num_loops; ++i) {
    const RowPiece* first = work.pieces + work.loop_starts[i];
    const RowPiece* last = work.pieces + work.loop_starts[i + 1];
    const auto* b = static_cast<const typename D::Storage*>(p.lora_b);
    const int64_t size = matrix_size<D>(p, p.n, p.b_stride);
    Panel<D> panel(p.packed, b + first->loop * size, out, p.n, p.b_stride, segment.rank, b + p.num_loops * size);
    for (int64_t chunk = 0; chunk < panel.chunks(); ++chunk) {
      const typename D::Storage* w = panel.chunk(chunk);
      for (const RowPiece* piece = first; piece < last; ++piece) {
        multiply_panel<D>(piece->rows, w, panel.steps(chunk), shrunk_at<D>(work, segment_index, chunk, piece->begin),
                          to + piece->begin * kPanel, panel.next(chunk, w));
      }
    }
  }
  if (whole) return;
  for (int64_t row = 0; row < work.x.rows; ++row) {
    for (int64_t lane = lane_begin; lane < lane_end; ++lane) sums[row * kPanel + lane] += partial[row * kPanel + lane];
  }
}

// `lanes` entries of a bias from output `out` on, and zeros behind them or if there is none.
template <class D>
struct PanelBias {
  using Vec = typename D::Vec;
  static constexpr int kVectors = kPanel / kLanes<D>;
  Vec values[kVectors];

  PanelBias(const void* bias, int64_t out, int64_t lanes) {
    alignas(64) typename D::Acc wide[kPanel] = {};
    if (bias != nullptr) {
      const auto* from = static_cast<const typename D::Storage*>(bias) + out;
      for (int64_t lane = 0; lane < lanes; ++lane) wide[lane] = widen_one<D>(from + lane);
    }
    for (int v = 0; v < kVectors; ++v) values[v] = load<Vec>(wide + v * kLanes<D>);
  }
};

// y = sums + bias for the block's pieces [begin, end).
template <class D>
void store(const CpuWork& work, int64_t out, int64_t lanes, const typename D::Acc* sums, int64_t begin, int64_t end) {
  using Storage = typename D::Storage;
  const Params& p = *work.params;
  const auto store_pieces = [&](int64_t width) __attribute__((always_inline)) {
    for (int64_t i = begin; i < end; ++i) {
      const RowPiece& piece = work.pieces[i];
      const auto* loop_bias = static_cast<const Storage*>(p.bias);
      if (loop_bias != nullptr) loop_bias += piece.loop * p.bias_loop_stride;
      const PanelBias<D> bias(loop_bias, out, lanes);
      for (int64_t row = piece.begin; row < piece.begin + piece.rows; ++row) {
        const typename D::Acc* from = sums + row * kPanel;
        Storage* to = static_cast<Storage*>(p.y) + work.x.order[row] * p.n + out;
        for (int v = 0; v < bias.kVectors && v * kLanes<D> < width; ++v) {
          const auto sum = load<typename D::Vec>(from + v * kLanes<D>) + bias.values[v];
          write<D>(sum, to + v * kLanes<D>, width - v * kLanes<D>);
        }
      }
    }
  };
  // Of a whole panel there is no end to look for.
  if (lanes == kPanel) {
    store_pieces(kPanel);
  } else {
    store_pieces(lanes);
  }
}

template <class D, elementwise::Activation A>
void store_gated(const CpuWork& work, int64_t out, int64_t lanes, const typename D::Acc* gates,
                 const typename D::Acc* sums, const RowTile& tile) {
  using Vec = typename D::Vec;
  using Storage = typename D::Storage;
  const Params& p = *work.params;
  const PanelBias<D> gate_bias(p.gate_bias, out, lanes), bias(p.bias, out, lanes);
  const auto store_rows = [&](int64_t width) __attribute__((always_inline)) {
    for (int64_t row = tile.begin; row < tile.begin + tile.rows; ++row) {
      Storage* to = static_cast<Storage*>(p.y) + work.x.order[row] * p.n + out;
      for (int v = 0; v < bias.kVectors && v * kLanes<D> < width; ++v) {
        const int64_t first = row * kPanel + v * kLanes<D>;
        const Vec gate = rounded<D>(load<Vec>(gates + first) + gate_bias.values[v]);
        const Vec up = rounded<D>(load<Vec>(sums + first) + bias.values[v]);
        write<D>(elementwise::gated<D, A>(gate, up), to + v * kLanes<D>, width - v * kLanes<D>);
      }
    }
  };
  // As in store.
  if (lanes == kPanel) {
    store_rows(kPanel);
  } else {
    store_rows(lanes);
  }
}

// sums = panel `out` of a weight [n, k] times every row of the block; finish(tile) is called when a tile is done.
template <class D, class Finish>
void multiply_weight(const CpuWork& work, const void* weight, int64_t out, typename D::Acc* sums,
                     const Finish& finish) {
  const Params& p = *work.params;
  clear<D>(sums, work.x.rows * kPanel);
  const auto* w = static_cast<const typename D::Storage*>(weight);
  Panel<D> panel(p.packed, w, out, p.n, p.k, p.k, w + matrix_size<D>(p, p.n, p.k));
  // The store would wait for these lines, two or so per row and far apart.
  const auto prefetch_results = [&](const RowTile& tile) {
    for (int64_t row = tile.begin; row < tile.begin + tile.rows; ++row) {
      const auto* to = static_cast<const typename D::Storage*>(p.y) + work.x.order[row] * p.n + out;
      for (int64_t i = 0; i < kPanel; i += 64 / sizeof(*to)) __builtin_prefetch(to + i, 1);
    }
  };
  multiply_block<D>(panel, work.x, sums, prefetch_results, finish);
}

template <class D>
void expand_gated(const CpuWork& work, int64_t begin, int64_t end) {
  using elementwise::Activation;
  const Params& p = *work.params;
  [[maybe_unused]] TileRegisters<D> registers;
  alignas(64) typename D::Acc sums[kMaxBlockRows * kPanel], gates[kMaxBlockRows * kPanel];
  const auto store = p.activation == Activation::kSilu ? store_gated<D, Activation::kSilu>
                                                       : store_gated<D, Activation::kGeluTanh>;
  for (int64_t out = begin * kPanel; out < smaller(end * kPanel, p.n); out += kPanel) {
    multiply_weight<D>(work, p.gate_weight, out, gates, [](const RowTile&) {});
    multiply_weight<D>(work, p.weight, out, sums, [&](const RowTile& tile) {
      store(work, out, smaller(kPanel, p.n - out), gates, sums, tile);
    });
  }
}

// Tasks: panels of the weight.
template <class D>
void expand(const CpuWork& work, int64_t begin, int64_t end) {
  const Params& p = *work.params;
  if (p.gate_weight != nullptr) return expand_gated<D>(work, begin, end);
  [[maybe_unused]] TileRegisters<D> registers;
  alignas(64) typename D::Acc sums[kMaxBlockRows * kPanel];
  const int64_t num_pieces = work.loop_starts[work.num_loops];
  for (int64_t task = begin; task < end; ++task) {
    const int64_t out = (p.first_panel + task) * kPanel;
    const int64_t lanes = smaller(kPanel, p.n - out);
    // Without LoRA a tile's results are stored while the next tile is multiplied.
    int64_t piece = 0;
    multiply_weight<D>(work, p.weight, out, sums, [&](const RowTile& tile) {
      if (p.total_rank > 0) return;
      const int64_t first = piece;
      while (piece < num_pieces && work.pieces[piece].begin < tile.begin + tile.rows) ++piece;
      store<D>(work, out, lanes, sums, first, piece);
    });
    if (p.total_rank == 0) continue;
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
    store<D>(work, out, lanes, sums, 0, num_pieces);
  }
}

}  // namespace

const CpuKernels RRT_KERNELS = {
    {kTileRows<Float32>, kTileRows<Float64>, kTileRows<BFloat16>, kTileRows<Float16>},
    {kFewTileRows<Float32>, kFewTileRows<Float64>, kFewTileRows<BFloat16>, kFewTileRows<Float16>},
    {sizeof(PanelUnit<Float32>), sizeof(PanelUnit<Float64>), sizeof(PanelUnit<BFloat16>), sizeof(PanelUnit<Float16>)},
    {pack_rows<Float32>, pack_rows<Float64>, pack_rows<BFloat16>, pack_rows<Float16>},
    {shrink<Float32>, shrink<Float64>, shrink<BFloat16>, shrink<Float16>},
    {expand<Float32>, expand<Float64>, expand<BFloat16>, expand<Float16>},
};

}  // namespace rrt::loop_lora
