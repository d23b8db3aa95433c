// Compiled once per instruction set (CMakeLists.txt): RRT_KERNELS names the table.
#include "packed_linear/cpu_kernels.h"

#include "packed_linear/panel_products.h"

namespace rrt::packed_linear {
namespace {

template <class D>
void pack_panels(const PackWork& work, int64_t begin, int64_t end) {
  const int64_t panels = num_panels(work.n);
  const int64_t panel_size = kPanel * round_up(work.k, kStepColumns<D>);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t matrix = task / panels, first = task % panels * kPanel;
    const auto* from = static_cast<const typename D::Storage*>(work.from) + (matrix * work.n + first) * work.k;
    auto* to = static_cast<typename D::Storage*>(work.to) + task * panel_size;
    pack_columns<D>(from, work.k, work.n - first < kPanel ? work.n - first : kPanel, work.k, to);
  }
}

template <class D>
void pack_rows(const RowOperands& block, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) pack_row<D>(block, row);
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
    // Of few panels. Beside a NaN the reduction may miss the larger one.
    const Acc panel_max = any(largest > max) ? reduce_lanes(largest, larger) : max;
    if (panel_max > max) {
      sum *= exp_for<D>(Vec{} + (max - panel_max));
      max = panel_max;
      int64_t lane = 0;
      while (lane < kPanel - 1 && logits[lane] != panel_max) ++lane;
      argmax = first_output + lane;
    }
    for (int v = 0; v < kVectors; ++v) sum += exp_for<D>(panel[v] - max);
  }
};

// Tasks: parts of the outputs.
template <class D>
void statistics(const StatisticsWork& work, int64_t begin, int64_t end) {
  using Acc = typename D::Acc;
  const int64_t num_rows = work.x.rows;
  [[maybe_unused]] TileRegisters<D> registers;
  const auto* weight = static_cast<const typename D::Storage*>(work.weight);
  const auto* weight_end = weight + num_panels(work.n) * kPanel * round_up(work.x.k, kStepColumns<D>);
  alignas(64) Acc sums[kMaxBlockRows * kPanel];
  RowStatistics<D> rows[kMaxBlockRows];
  for (int64_t part = begin; part < end; ++part) {
    const int64_t first = part * kPartPanels * kPanel;
    for (int64_t row = 0; row < num_rows; ++row) rows[row] = RowStatistics<D>{kLowest<Acc>, typename D::Vec{}, first};
    const int64_t last = smaller((part + 1) * kPartPanels, num_panels(work.n));
    for (int64_t out = first; out < last * kPanel; out += kPanel) {
      clear<D>(sums, num_rows * kPanel);
      Panel<D> panel(true, weight, out, work.n, work.x.k, work.x.k, weight_end);
      multiply_block<D>(panel, work.x, sums, [](const RowTile&) {}, [](const RowTile&) {});
      for (int64_t row = 0; row < num_rows; ++row) {
        for (int64_t lane = work.n - out; lane < kPanel; ++lane) sums[row * kPanel + lane] = kUnseen<Acc>;
        rows[row].add(sums + row * kPanel, out);
      }
    }
    for (int64_t row = 0; row < num_rows; ++row) {
      const Acc sum = reduce_lanes(rows[row].sum, [](Acc a, Acc b) { return a + b; });
      work.parts[part * num_rows + row] = {rows[row].max, sum, rows[row].argmax};
    }
  }
}

}  // namespace

const CpuKernels RRT_KERNELS = {
    {kTileRows<Float32>, kTileRows<Float64>, kTileRows<BFloat16>, kTileRows<Float16>},
    {sizeof(PanelUnit<Float32>), sizeof(PanelUnit<Float64>), sizeof(PanelUnit<BFloat16>), sizeof(PanelUnit<Float16>)},
    {pack_panels<Float32>, pack_panels<Float64>, pack_panels<BFloat16>, pack_panels<Float16>},
    {pack_rows<Float32>, pack_rows<Float64>, pack_rows<BFloat16>, pack_rows<Float16>},
    {statistics<Float32>, statistics<Float64>, statistics<BFloat16>, statistics<Float16>},
};

}  // namespace rrt::packed_linear
