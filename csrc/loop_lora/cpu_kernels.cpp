// Compiled once per instruction set: RRT_KERNELS names the table, RRT_VECTOR_BYTES is its registers' size,
// RRT_TILE_COLS the columns of accumulators that its registers hold.
#include "loop_lora/cpu_kernels.h"
#include "simd.h"

namespace rrt::loop_lora {
namespace {

// Fixed tree, so that a sum does not depend on how columns and rows were tiled.
template <class D>
inline typename D::Acc sum_lanes(const typename D::Vec (&v)[kParts]) {
  typename D::Acc lane[kLanes<D>];
  std::memcpy(lane, v, sizeof(v));
  for (int half = kLanes<D> / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
  }
  return lane[0];
}

// acc[c][r] += w[c] * x[r], over 64 bytes of accumulators each.
template <class D, int COLS, int ROWS>
inline void multiply_add(const typename D::Storage* w, int64_t w_stride, const typename D::Acc* x, int64_t x_stride,
                         typename D::Vec (&acc)[COLS][ROWS][kParts]) {
  using Vec = typename D::Vec;
  for (int part = 0; part < kParts; ++part) {
    const int lane = part * kPartLanes<D>;
    Vec wv[COLS];
    for (int c = 0; c < COLS; ++c) wv[c] = D::widen(w + c * w_stride + lane);
    for (int r = 0; r < ROWS; ++r) {
      const Vec xv = load<Vec>(x + r * x_stride + lane);
      for (int c = 0; c < COLS; ++c) acc[c][r][part] += wv[c] * xv;
    }
  }
}

// out[c][r] = dot(w + c * w_stride, x + r * x_stride) over `size` columns; x has zeros up to a whole vector.
template <class D, int COLS, int ROWS>
inline void dot_tile(const typename D::Storage* w, int64_t w_stride, int64_t size, const typename D::Acc* x,
                     int64_t x_stride, typename D::Acc (&out)[COLS][ROWS]) {
  constexpr int lanes = kLanes<D>;
  typename D::Vec acc[COLS][ROWS][kParts] = {};
  int64_t k = 0;
  for (; k + lanes <= size; k += lanes) {
    multiply_add<D, COLS, ROWS>(w + k, w_stride, x + k, x_stride, acc);
  }
  if (k < size) {
    typename D::Storage rest[COLS][lanes] = {};
    for (int c = 0; c < COLS; ++c) std::memcpy(rest[c], w + c * w_stride + k, (size - k) * sizeof(rest[c][0]));
    multiply_add<D, COLS, ROWS>(rest[0], lanes, x + k, x_stride, acc);
  }
  for (int c = 0; c < COLS; ++c) {
    for (int r = 0; r < ROWS; ++r) out[c][r] = sum_lanes<D>(acc[c][r]);
  }
}

template <class D>
void pack(const CpuWork& work, int64_t begin, int64_t end) {
  const Params& p = *work.params;
  for (int64_t i = begin; i < end; ++i) {
    const auto* from = static_cast<const typename D::Storage*>(p.x) + work.order[i] * p.x_row_stride;
    auto* to = static_cast<typename D::Acc*>(work.packed) + i * work.packed_stride;
    constexpr int lanes = kPartLanes<D>;
    for (int64_t k = 0; k < p.k; k += lanes) {
      typename D::Storage chunk[lanes] = {};
      std::memcpy(chunk, from + k, (p.k - k < lanes ? p.k - k : lanes) * sizeof(chunk[0]));
      const typename D::Vec wide = D::widen(chunk);
      std::memcpy(to + k, &wide, sizeof(wide));
    }
  }
}

template <class D, int COLS, int ROWS>
void shrink_tile(const CpuWork& work, const RowTile& tile, int64_t rank, int64_t column) {
  const Params& p = *work.params;
  const auto* a = static_cast<const typename D::Storage*>(p.lora_a) + (tile.loop * p.total_rank + rank) * p.k;
  const auto* x = static_cast<const typename D::Acc*>(work.packed) + tile.begin * work.packed_stride;
  auto* t = static_cast<typename D::Acc*>(work.shrunk) + tile.begin * work.shrunk_stride + column;
  typename D::Acc sums[COLS][ROWS];
  dot_tile<D, COLS, ROWS>(a, p.k, p.k, x, work.packed_stride, sums);
  for (int r = 0; r < ROWS; ++r) {
    for (int c = 0; c < COLS; ++c) t[r * work.shrunk_stride + c] = sums[c][r];
  }
}

template <class D, int COLS, int ROWS>
void expand_tile(const CpuWork& work, const RowTile& tile, int64_t column, int64_t segment_index) {
  using Acc = typename D::Acc;
  const Params& p = *work.params;
  const Segment& segment = work.segments[segment_index];
  const auto* w = static_cast<const typename D::Storage*>(p.weight) + column * p.k;
  const auto* b = static_cast<const typename D::Storage*>(p.lora_b) + (tile.loop * p.n + column) * p.b_stride;
  const auto* x = static_cast<const Acc*>(work.packed) + tile.begin * work.packed_stride;
  const auto* t =
      static_cast<const Acc*>(work.shrunk) + tile.begin * work.shrunk_stride + work.shrunk_begin[segment_index];
  Acc base[COLS][ROWS];
  Acc lora[COLS][ROWS];
  dot_tile<D, COLS, ROWS>(w, p.k, p.k, x, work.packed_stride, base);
  dot_tile<D, COLS, ROWS>(b, p.b_stride, segment.rank, t, work.shrunk_stride, lora);
  Acc bias[COLS] = {};
  if (p.bias != nullptr) {
    for (int c = 0; c < COLS; ++c) bias[c] = widen_one<D>(static_cast<const typename D::Storage*>(p.bias) + column + c);
  }
  for (int r = 0; r < ROWS; ++r) {
    auto* y = static_cast<typename D::Storage*>(p.y) + work.order[tile.begin + r] * p.n + column;
    for (int c = 0; c < COLS; ++c) y[c] = D::narrow(base[c][r] + bias[c] + lora[c][r]);
  }
}

template <class D, int COLS>
void shrink_columns(const CpuWork& work, int64_t rank, int64_t column) {
  for (int64_t i = 0; i < work.num_tiles; ++i) {
    const RowTile& tile = work.tiles[i];
    switch (tile.rows) {
      case 1: shrink_tile<D, COLS, 1>(work, tile, rank, column); break;
      case 2: shrink_tile<D, COLS, 2>(work, tile, rank, column); break;
      case 3: shrink_tile<D, COLS, 3>(work, tile, rank, column); break;
      default: shrink_tile<D, COLS, 4>(work, tile, rank, column);
    }
  }
}

template <class D, int COLS>
void expand_columns(const CpuWork& work, int64_t column, int64_t segment) {
  for (int64_t i = 0; i < work.num_tiles; ++i) {
    const RowTile& tile = work.tiles[i];
    switch (tile.rows) {
      case 1: expand_tile<D, COLS, 1>(work, tile, column, segment); break;
      case 2: expand_tile<D, COLS, 2>(work, tile, column, segment); break;
      case 3: expand_tile<D, COLS, 3>(work, tile, column, segment); break;
      default: expand_tile<D, COLS, 4>(work, tile, column, segment);
    }
  }
}
static_assert(kTileRows == 4);

// Calls f(first, last, segment) for the part of [begin, end) in each segment; `start` and `size` name its range.
template <class F>
inline void for_each_segment(const CpuWork& work, int64_t Segment::*start, int64_t Segment::*size,
                             int64_t begin, int64_t end, F f) {
  for (int64_t s = 0; s < work.num_segments; ++s) {
    const int64_t first = work.segments[s].*start;
    const int64_t last = first + work.segments[s].*size;
    f(begin > first ? begin : first, end < last ? end : last, s);
  }
}

template <class D>
void shrink(const CpuWork& work, int64_t begin, int64_t end) {
  for_each_segment(work, &Segment::rank_begin, &Segment::rank, begin, end, [&](int64_t i, int64_t last, int64_t s) {
    const int64_t shift = work.shrunk_begin[s] - work.segments[s].rank_begin;
    for (; i + RRT_TILE_COLS <= last; i += RRT_TILE_COLS) shrink_columns<D, RRT_TILE_COLS>(work, i, i + shift);
    for (; i < last; ++i) shrink_columns<D, 1>(work, i, i + shift);
  });
}

template <class D>
void expand(const CpuWork& work, int64_t begin, int64_t end) {
  for_each_segment(work, &Segment::out_begin, &Segment::out_size, begin, end, [&](int64_t i, int64_t last, int64_t s) {
    for (; i + RRT_TILE_COLS <= last; i += RRT_TILE_COLS) expand_columns<D, RRT_TILE_COLS>(work, i, s);
    for (; i < last; ++i) expand_columns<D, 1>(work, i, s);
  });
}

}  // namespace

const CpuKernels RRT_KERNELS = {
    {pack<Float32>, pack<Float64>, pack<BFloat16>, pack<Float16>},
    {shrink<Float32>, shrink<Float64>, shrink<BFloat16>, shrink<Float16>},
    {expand<Float32>, expand<Float64>, expand<BFloat16>, expand<Float16>},
};

}  // namespace rrt::loop_lora
