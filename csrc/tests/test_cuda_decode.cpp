// The CUDA decode kernels' bodies under emulation, against sums in double; see emulation/device/primitives.h.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "loop_lora/cuda_column_kernel.h"
#include "loop_lora/cuda_plain.h"
#include "loop_lora/cuda_row_kernel.h"

using namespace rrt;
using namespace rrt::loop_lora;

namespace {

int failures = 0;

#define EXPECT(condition, ...)                                      \
  do {                                                              \
    if (!(condition)) {                                             \
      std::printf("%s:%d: %s: ", __FILE__, __LINE__, #condition);   \
      std::printf(__VA_ARGS__);                                     \
      std::printf("\n");                                            \
      ++failures;                                                   \
    }                                                               \
  } while (0)

struct Shape {
  int m, n, k, num_loops;
  std::vector<int> segment_out, segment_rank;
  bool bias;
  int bias_loops;
};

template <class Half>
struct Problem {
  using Storage = typename Half::Storage;
  Shape shape;
  int total_rank = 0, b_stride = 0, padded_m;
  std::vector<int32_t> loops;
  // Aligned to 16 by the allocator, as torch aligns.
  std::vector<Storage> x, weight, bias, lora_a, lora_b, shrunk, y;
  std::vector<typename Half::Acc> plain_shrunk;
  std::vector<float> shrink_sums, part_sums;
  bool split_weight = false;  // into a region for each row

  Problem(const Shape& s, uint64_t seed) : shape(s), padded_m(round_up(s.m, 8)) {
    for (int rank : s.segment_rank) {
      total_rank += rank;
      b_stride = std::max(b_stride, rank);
    }
    std::mt19937_64 random(seed);
    std::normal_distribution<float> normal;
    const auto fill = [&](std::vector<Storage>& to, int64_t size) {
      to.resize(size);
      for (Storage& value : to) value = Half::narrow(normal(random));
    };
    fill(x, int64_t{s.m} * s.k);
    fill(weight, int64_t{s.n} * s.k);
    fill(bias, s.bias ? int64_t{s.n} * s.bias_loops : 0);
    fill(lora_a, int64_t{s.num_loops} * total_rank * s.k);
    fill(lora_b, int64_t{s.num_loops} * s.n * b_stride);
    for (int i = 0; i < s.m; ++i) loops.push_back(static_cast<int32_t>(random() % s.num_loops));
    shrunk.assign(int64_t{s.num_loops} * padded_m * total_rank, Half::narrow(NAN));
    y.assign(int64_t{s.m} * s.n, Half::narrow(NAN));
    shrink_sums.assign(int64_t{kParts} * s.m * total_rank, NAN);
    part_sums.assign(kParts * y.size(), NAN);
  }

  DecodeArgs args() {
    DecodeArgs a{};
    a.x = x.data();
    a.x_stride = shape.k;
    a.loops = loops.data();
    a.weight = weight.data();
    a.bias = shape.bias ? bias.data() : nullptr;
    a.bias_loop_stride = shape.bias_loops > 1 ? shape.n : 0;
    a.lora_a = lora_a.data();
    a.lora_b = lora_b.data();
    a.shrunk = shrunk.data();
    a.shrink_sums = shrink_sums.data();
    a.part_sums = part_sums.data();
    a.y = y.data();
    a.m = shape.m;
    a.n = shape.n;
    a.k = shape.k;
    a.num_loops = shape.num_loops;
    a.total_rank = total_rank;
    a.b_stride = b_stride;
    a.padded_m = padded_m;
    a.num_segments = static_cast<int>(shape.segment_out.size());
    int out = 0, rank = 0;
    for (int s = 0; s < a.num_segments; ++s) {
      a.segment_out[s] = out;
      a.segment_rank[s] = rank;
      a.segment_size[s] = shape.segment_rank[s];
      out += shape.segment_out[s];
      rank += shape.segment_rank[s];
    }
    return a;
  }

  template <class T>
  static emulation::Region region(const char* name, std::vector<T>& data, bool writable, bool dependent = false) {
    return {name, reinterpret_cast<const char*>(data.data()), static_cast<int64_t>(data.size() * sizeof(T)), writable,
            dependent};
  }

  // Which regions a kernel may write, and which it may read only after dependency_wait: every kernel before this one may
  // still run until then, so what it reads but W and A_l, and what it writes. In the late order the kernels before shrink
  // have ended when the others start, and x and loops are there.
  enum class Stage { kShrink, kAddShrunk, kProduct, kAddParts };
  std::vector<emulation::Region> regions(Stage stage, bool early) {
    const bool before_shrink = early || stage == Stage::kShrink;
    const bool shrink = stage == Stage::kShrink, product = stage == Stage::kProduct;
    const bool add_shrunk = stage == Stage::kAddShrunk, add_parts = stage == Stage::kAddParts;
    std::vector<emulation::Region> all = {region("x", x, false, before_shrink),
                                          region("loops", loops, false, before_shrink),
                                          region("weight", weight, false),
                                          region("bias", bias, false, before_shrink),
                                          region("lora_a", lora_a, false),
                                          region("lora_b", lora_b, false, before_shrink),
                                          region("shrunk", shrunk, shrink || add_shrunk, product),
                                          region("shrink_sums", shrink_sums, shrink, add_shrunk),
                                          region("part_sums", part_sums, product, add_parts),
                                          region("y", y, product || add_parts)};
    const int64_t row_bytes = shape.k * static_cast<int64_t>(sizeof(Storage));
    for (int row = 0; split_weight && row < shape.n; ++row) {
      all[2].size = 0;
      const auto* begin = reinterpret_cast<const char*>(weight.data()) + row * row_bytes;
      all.push_back({"weight" + std::to_string(row), begin, row_bytes});
    }
    return all;
  }

  // The definition in double, from T rounded as the kernel rounds it.
  std::vector<double> expected() const {
    std::vector<double> result(y.size());
    for (int i = 0; i < shape.m; ++i) {
      const int loop = loops[i];
      std::vector<double> t(total_rank);
      for (int r = 0; r < total_rank; ++r) {
        double sum = 0;
        for (int k = 0; k < shape.k; ++k) {
          sum += static_cast<double>(Half::widen(lora_a[(int64_t{loop} * total_rank + r) * shape.k + k])) *
                 Half::widen(x[int64_t{i} * shape.k + k]);
        }
        t[r] = Half::widen(Half::narrow(static_cast<float>(sum)));
      }
      int n = 0, rank_begin = 0;
      for (size_t s = 0; s < shape.segment_out.size(); ++s) {
        for (int end = n + shape.segment_out[s]; n < end; ++n) {
          double sum = shape.bias ? Half::widen(bias[(shape.bias_loops > 1 ? int64_t{loop} * shape.n : 0) + n]) : 0;
          for (int k = 0; k < shape.k; ++k) {
            sum += static_cast<double>(Half::widen(weight[int64_t{n} * shape.k + k])) * Half::widen(x[int64_t{i} * shape.k + k]);
          }
          for (int r = 0; r < shape.segment_rank[s]; ++r) {
            sum += static_cast<double>(Half::widen(lora_b[(int64_t{loop} * shape.n + n) * b_stride + r])) * t[rank_begin + r];
          }
          result[int64_t{i} * shape.n + n] = sum;
        }
        rank_begin += shape.segment_rank[s];
      }
    }
    return result;
  }

  int num_loops_present() const {
    std::vector<bool> seen(shape.num_loops);
    for (int loop : loops) seen[loop] = true;
    int count = 0;
    for (bool is : seen) count += is;
    return count;
  }
};

struct Outcome {
  emulation::Report shrink, add_shrunk, product, add;
  std::string violation() const {
    for (const emulation::Report* report : {&shrink, &add_shrunk, &product, &add}) {
      if (!report->violation.empty()) return report->violation;
    }
    return "";
  }
};

// Shrink by instance I.
template <class I>
struct Shrink {
  static constexpr bool kIsSplit = I::kBlockParts < kParts;
  template <class Half>
  static emulation::Report run(Problem<Half>& problem, const DecodeArgs& args, uint64_t seed,
                               emulation::Sabotage sabotage) {
    return emulation::run({{ceil_div(args.total_rank, kColumnTileRows) * ceil_div(args.m, I::kTokens), args.num_loops,
                            kParts / I::kBlockParts},
                           32 * I::kBlockParts,
                           column_shared_bytes<I::kTokens, I::kBlockParts, I::kStages>(), seed,
                           problem.regions(Problem<Half>::Stage::kShrink, args.starts_early), sabotage},
                          [&] { column_body<Half, I::kTokens, I::kBlockParts, I::kStages, true>(args); });
  }
};

// Shrink by instance I of the row kernel.
template <class I>
struct RowShrink {
  static constexpr bool kIsSplit = true;
  template <class Half>
  static emulation::Report run(Problem<Half>& problem, const DecodeArgs& args, uint64_t seed,
                               emulation::Sabotage sabotage) {
    return emulation::run({{ceil_div(args.total_rank, I::kRows) * ceil_div(args.m, I::kTokens), args.num_loops, kParts},
                           kRowThreads, row_shared_bytes<I::kTokens, I::kWarpTiles, I::kStages>(), seed,
                           problem.regions(Problem<Half>::Stage::kShrink, args.starts_early), sabotage},
                          [&] { row_body<Half, I::kTokens, I::kWarpTiles, I::kStages, true>(args); });
  }
};

// The product by instance I of the column kernel.
template <class I>
struct Columns {
  template <class Half>
  static emulation::Report product(Problem<Half>& problem, const DecodeArgs& args, uint64_t seed,
                                   emulation::Sabotage sabotage, bool early) {
    return emulation::run({{ceil_div(args.n, kColumnTileRows) * ceil_div(args.m, I::kTokens), 1, 1}, 32 * kParts,
                           column_shared_bytes<I::kTokens, kParts, I::kStages>(), seed,
                           problem.regions(Problem<Half>::Stage::kProduct, early), sabotage},
                          [&] { column_body<Half, I::kTokens, kParts, I::kStages, false>(args); });
  }
  static constexpr int kSlices = 1, kRows = kColumnTileRows, kTokens = I::kTokens;
};

// The product by instance I of the row kernel.
template <class I, int SLICES>
struct Rows {
  template <class Half>
  static emulation::Report product(Problem<Half>& problem, const DecodeArgs& args, uint64_t seed,
                                   emulation::Sabotage sabotage, bool early) {
    return emulation::run({{ceil_div(args.n, I::kRows) * ceil_div(args.m, I::kTokens), SLICES, 1}, kRowThreads,
                           row_shared_bytes<I::kTokens, I::kWarpTiles, I::kStages>(), seed,
                           problem.regions(Problem<Half>::Stage::kProduct, early), sabotage},
                          [&] { row_body<Half, I::kTokens, I::kWarpTiles, I::kStages, false>(args); });
  }
  static constexpr int kSlices = SLICES, kRows = I::kRows, kTokens = I::kTokens;
};

// In every row_step-th row, as long hints at the begin of each run as the matrix has room for.
void give_hints(DecodeArgs& args, int runs, int row_step) {
  args.hint_columns = (args.k / runs - 31) / kVectorElements * kVectorElements;
  args.hint_rows = args.hint_columns > 0 ? args.n : 0;
  args.hint_row_step = row_step;
  args.hint_parts = kParts / runs;
}

using WholeShrink = Shrink<ColumnInstance<8, kParts, 4>>;
using SplitShrink = Shrink<ColumnInstance<8, 1, 16>>;

template <class Half, class Kernel, class ShrinkKernel = WholeShrink>
Outcome launch(Problem<Half>& problem, uint64_t seed = 1, bool early = true,
               emulation::Sabotage sabotage = emulation::Sabotage::kNone, bool prefetches = false) {
  using Stage = typename Problem<Half>::Stage;
  DecodeArgs args = problem.args();
  args.parts_per_block = kParts / Kernel::kSlices;
  args.starts_early = early;
  args.prefetches = prefetches;
  if (!early) give_hints(args, Kernel::kRows == kColumnTileRows ? kParts : Kernel::kSlices, 3);
  Outcome outcome;
  if (args.total_rank > 0) {
    outcome.shrink = ShrinkKernel::run(problem, args, seed, sabotage);
    if (!outcome.shrink.violation.empty()) return outcome;
    if (ShrinkKernel::kIsSplit) {
      outcome.add_shrunk = emulation::run({{args.m, ceil_div(args.total_rank, kAddThreads), 1}, kAddThreads, 0, seed,
                                           problem.regions(Stage::kAddShrunk, early), sabotage},
                                          [&] { add_shrunk_body<Half>(args); });
      if (!outcome.add_shrunk.violation.empty()) return outcome;
    }
  }
  outcome.product = Kernel::product(problem, args, seed, sabotage, early);
  if (!outcome.product.violation.empty() || Kernel::kSlices == 1) return outcome;
  outcome.add = emulation::run({{args.m, ceil_div(args.n, kAddThreads), 1}, kAddThreads, 0, seed,
                                problem.regions(Stage::kAddParts, early), sabotage},
                               [&] { add_parts_body<Half>(args); });
  return outcome;
}

template <class Half>
double relative_error(const Problem<Half>& problem) {
  const std::vector<double> expected = problem.expected();
  double error = 0, norm = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    const double difference = Half::widen(problem.y[i]) - expected[i];
    error += difference * difference;
    norm += expected[i] * expected[i];
  }
  return std::sqrt(error / norm);
}

// The first output of every segment but the first is a multiple of 128, so that all kernels take them. Columns and ranks
// end in the first and in the second k-step of a turn, and inside of one.
const std::vector<Shape> kShapes = {
    {5, 80, 264, 2, {80}, {8}, true, 1},     {1, 64, 256, 1, {64}, {32}, false, 1},
    {8, 144, 520, 3, {128, 16}, {64, 24}, true, 3}, {3, 16, 1032, 2, {16}, {0}, false, 1},
    {13, 64, 96, 3, {64}, {304}, true, 1},   {9, 72, 8, 2, {72}, {16}, false, 1},
    {37, 64, 128, 4, {64}, {40}, false, 1},  {64, 16, 64, 2, {16}, {8}, false, 2},
    {6, 203, 584, 2, {128, 75}, {288, 8}, true, 1},  {33, 69, 1096, 3, {69}, {24}, true, 3},
    {2, 16, 9224, 1, {16}, {8}, false, 1},  // a part has more turns than any ring has stages
    {3, 272, 72, 2, {272}, {8}, true, 2},   // more outputs than a thread block adds
};

template <class Number>
void test_plain(const char* name, double tolerance) {
  std::vector<Shape> shapes = kShapes;
  shapes.push_back({11, 37, 45, 3, {30, 7}, {5, 3}, true, 3});
  shapes.push_back({9, 8, 16, 40, {8}, {8}, false, 1});  // more loops than the decode kernels' mask has bits
  for (const Shape& shape : shapes) {
    Problem<Number> problem(shape, 7);
    problem.plain_shrunk.assign(problem.shrunk.size(), NAN);
    DecodeArgs args = problem.args();
    args.shrunk = problem.plain_shrunk.data();
    const auto regions = [&](bool shrink) {
      using Stage = typename Problem<Number>::Stage;
      std::vector<emulation::Region> all = problem.regions(shrink ? Stage::kShrink : Stage::kProduct, true);
      all[6] = Problem<Number>::region("shrunk", problem.plain_shrunk, shrink, !shrink);
      return all;
    };
    const int token_tiles = ceil_div(args.m, kPlainTokens);
    emulation::Report report;
    if (args.total_rank > 0) {
      report = emulation::run({{ceil_div(args.total_rank, kPlainRows) * token_tiles, args.num_loops, 1}, kPlainThreads,
                               0, 1, regions(true)},
                              [&] { plain_body<Number, true>(args); });
      EXPECT(!report.early_dependents, "%s", name);
    }
    if (report.violation.empty()) {
      report = emulation::run({{ceil_div(args.n, kPlainRows) * token_tiles, 1, 1}, kPlainThreads, 0, 1, regions(false)},
                              [&] { plain_body<Number, false>(args); });
    }
    EXPECT(report.violation.empty(), "%s m=%d n=%d k=%d: %s", name, shape.m, shape.n, shape.k, report.violation.c_str());
    if (!report.violation.empty()) continue;
    const double error = relative_error(problem);
    EXPECT(error < tolerance, "%s m=%d n=%d k=%d: relative error %g", name, shape.m, shape.n, shape.k, error);
    // W once per tile of tokens; B once per token, since lanes share its columns and not its rows.
    int64_t b_elements = 0;
    for (size_t s = 0; s < shape.segment_out.size(); ++s) b_elements += int64_t{shape.segment_out[s]} * shape.segment_rank[s];
    const int64_t size = sizeof(typename Number::Storage);
    EXPECT(report.bytes_read("weight") == size * token_tiles * shape.n * shape.k, "%s", name);
    EXPECT(report.bytes_read("lora_b") == size * shape.m * b_elements, "%s", name);
    EXPECT(report.bytes_written("y") == size * shape.m * shape.n, "%s", name);
  }
}

// Hints are of the rows that were chosen, each once, as long as there are lanes for them; whatever loops there are.
template <class ShrinkKernel>
void test_hints(const char* name, int warps, int blocks) {
  using Half = device::BFloat16;
  const Shape shape{9, 272, 1032, 3, {272}, {72}, false, 1};
  for (int runs : {1, 2, 8}) {
    for (int row_step : {1, 5}) {
      Problem<Half> problem(shape, 3);
      problem.split_weight = true;
      DecodeArgs args = problem.args();
      args.prefetches = true;
      give_hints(args, runs, row_step);
      const emulation::Report report = ShrinkKernel::run(problem, args, 1, emulation::Sabotage::kNone);
      EXPECT(report.violation.empty(), "%s: %s", name, report.violation.c_str());
      int left = 32 * warps * blocks;
      for (int row = 0; row < shape.n; ++row) {
        const int hints = row % row_step == 0 ? std::min(runs, left) : 0;
        left -= hints;
        int64_t found = 0;
        for (const auto& [begin, end] : report.region("weight" + std::to_string(row)).prefetched) found += end - begin;
        EXPECT(found == int64_t{hints} * args.hint_columns * 2, "%s, %d runs, row %d of step %d: %d bytes", name, runs,
               row, row_step, static_cast<int>(found));
      }
    }
  }
}

template <class Half, class Kernel, class ShrinkKernel>
void test_instance(const std::string& label, double tolerance, size_t first, size_t step) {
  const char* name = label.c_str();
  for (size_t i = first; i < kShapes.size(); i += step) {
    const Shape& shape = kShapes[i];
    Problem<Half> problem(shape, 7);
    const bool early = i % 4 < 2, prefetches = i % 2 == 0;
    const Outcome outcome =
        launch<Half, Kernel, ShrinkKernel>(problem, 1, early, emulation::Sabotage::kNone, prefetches);
    EXPECT(outcome.violation().empty(), "%s m=%d n=%d k=%d: %s", name, shape.m, shape.n, shape.k, outcome.violation().c_str());
    if (!outcome.violation().empty()) continue;
    const double error = relative_error(problem);
    EXPECT(error < tolerance, "%s m=%d n=%d k=%d: relative error %g", name, shape.m, shape.n, shape.k, error);

    // Every kernel lets the next one start at once, but for shrink in the late order; what that may then read, `regions`
    // says.
    EXPECT(outcome.product.early_dependents, "%s", name);
    // W once per tile of tokens, A and B of each loop in the batch likewise: the floor's accounting.
    const auto bytes = [](int64_t elements) { return 2 * elements; };
    const int64_t loops = problem.num_loops_present();
    if (problem.total_rank > 0) {
      EXPECT(outcome.shrink.early_dependents == early, "%s", name);
      if (ShrinkKernel::kIsSplit) EXPECT(outcome.add_shrunk.early_dependents, "%s", name);
      if (shape.m <= 8) {
        // What is fetched before the loops are known may be of others, too.
        const int64_t of_loop = bytes(problem.total_rank * shape.k), read = outcome.shrink.bytes_read("lora_a");
        EXPECT(read >= loops * of_loop && read <= (prefetches ? shape.num_loops : loops) * of_loop, "%s", name);
      }
      if (ShrinkKernel::kIsSplit) {
        EXPECT(outcome.add_shrunk.bytes_read("shrink_sums") == int64_t{4} * kParts * shape.m * problem.total_rank, "%s", name);
      }
    }
    if (shape.m > Kernel::kTokens) continue;
    EXPECT(outcome.product.bytes_read("weight") == bytes(int64_t{shape.n} * shape.k), "%s", name);
    int64_t b_elements = 0;
    for (size_t s = 0; s < shape.segment_out.size(); ++s) b_elements += int64_t{shape.segment_out[s]} * shape.segment_rank[s];
    EXPECT(outcome.product.bytes_read("lora_b") == bytes(loops * b_elements), "%s", name);
    // Not in the floor: x once per tile of outputs, and the sums of parts where there are several slices.
    const int64_t tiles = ceil_div(shape.n, Kernel::kRows);
    EXPECT(outcome.product.bytes_read("x") == bytes(int64_t{shape.m} * shape.k * tiles), "%s", name);
    if (Kernel::kSlices > 1) {
      EXPECT(outcome.add.bytes_read("part_sums") == int64_t{4} * kParts * shape.m * shape.n, "%s", name);
    }
  }
}

// Each kernel on a third of the shapes, from `first` on, half of them in float16.
template <class Kernel, class ShrinkKernel = WholeShrink>
void test_kernel(const std::string& label, size_t first) {
  test_instance<device::BFloat16, Kernel, ShrinkKernel>("bf16 " + label, 4e-3, first % 3, 6);
  test_instance<device::Float16, Kernel, ShrinkKernel>("fp16 " + label, 5e-4, first % 3 + 3, 6);
}

void test_kernels() {
  size_t first = 0;
  for_each_type(ColumnInstances{}, [&](auto instance) {
    using I = decltype(instance);
    test_kernel<Columns<I>>("columns x " + std::to_string(I::kTokens), first++);
  });
  for_each_type(RowInstances{}, [&](auto instance) {
    using I = decltype(instance);
    const std::string tile = std::to_string(I::kRows) + " rows x " + std::to_string(I::kTokens);
    test_kernel<Rows<I, 1>>(tile, first++);
    test_kernel<Rows<I, 4>, SplitShrink>("4 slices, " + tile, first++);
  });
  for_each_type(ShrinkInstances{}, [&](auto instance) {
    test_kernel<Columns<ColumnInstance<8, kParts, 4>>, Shrink<decltype(instance)>>("shrink", first++);
  });
  for_each_type(SplitShrinkInstances{}, [&](auto instance) {
    test_kernel<Columns<ColumnInstance<8, kParts, 4>>, Shrink<decltype(instance)>>("split shrink", first++);
  });
  for_each_type(RowShrinkInstances{}, [&](auto instance) {
    test_kernel<Columns<ColumnInstance<8, kParts, 4>>, RowShrink<decltype(instance)>>("shrink by rows", first++);
  });
}

// A row has the same bits alone, in any order, under any tiling and either kernel, however shrink is split.
template <class Half>
void test_row_independence() {
  using Alone = Columns<ColumnInstance<8, kParts, 4>>;
  const Shape shape{9, 144, 584, 3, {128, 16}, {72, 264}, true, 1};
  Problem<Half> whole(shape, 11);
  launch<Half, Alone>(whole);
  uint64_t seed = 5;
  const auto expect_the_same = [&](const std::string& name, auto tiled_launch) {
    Problem<Half> tiled(shape, 11);
    tiled_launch(tiled, ++seed);
    EXPECT(std::memcmp(whole.shrunk.data(), tiled.shrunk.data(), whole.shrunk.size() * 2) == 0, "%s changes T", name.c_str());
    EXPECT(std::memcmp(whole.y.data(), tiled.y.data(), whole.y.size() * 2) == 0, "%s changes bits", name.c_str());
  };
  for_each_type(ColumnInstances{}, [&](auto instance) {
    using I = decltype(instance);
    for (bool early : {true, false}) {
      expect_the_same("columns x " + std::to_string(I::kTokens),
                      [&](auto& p, uint64_t s) { launch<Half, Columns<I>>(p, s, early); });
    }
  });
  for_each_type(RowInstances{}, [&](auto instance) {
    using I = decltype(instance);
    const std::string tile = std::to_string(I::kRows) + " rows x " + std::to_string(I::kTokens);
    for (bool early : {true, false}) {
      expect_the_same(tile, [&](auto& p, uint64_t s) { launch<Half, Rows<I, 1>>(p, s, early); });
      expect_the_same("8 slices, " + tile,
                      [&](auto& p, uint64_t s) { launch<Half, Rows<I, 8>, SplitShrink>(p, s, early); });
    }
  });
  const auto expect_the_same_of_shrink = [&](const char* name, auto shrink) {
    using ShrinkKernel = decltype(shrink);
    for (bool prefetches : {true, false}) {
      expect_the_same(name, [&](auto& p, uint64_t s) {
        launch<Half, Alone, ShrinkKernel>(p, s, s % 2 == 0, emulation::Sabotage::kNone, prefetches);
      });
    }
  };
  for_each_type(ShrinkInstances{}, [&](auto i) { expect_the_same_of_shrink("shrink", Shrink<decltype(i)>{}); });
  for_each_type(SplitShrinkInstances{}, [&](auto i) { expect_the_same_of_shrink("split shrink", Shrink<decltype(i)>{}); });
  for_each_type(RowShrinkInstances{}, [&](auto i) { expect_the_same_of_shrink("shrink by rows", RowShrink<decltype(i)>{}); });
  for (int row = 0; row < shape.m; row += 4) {
    Shape one = shape;
    one.m = 1;
    Problem<Half> alone(one, 11);
    // The same parameters: only x and loops depend on m.
    alone.weight = whole.weight;
    alone.bias = whole.bias;
    alone.lora_a = whole.lora_a;
    alone.lora_b = whole.lora_b;
    alone.x.assign(whole.x.begin() + row * shape.k, whole.x.begin() + (row + 1) * shape.k);
    alone.loops = {whole.loops[row]};
    launch<Half, Alone>(alone);
    EXPECT(std::memcmp(alone.y.data(), whole.y.data() + row * shape.n, shape.n * 2) == 0, "row %d", row);
  }
}

// A token of a loop that does not exist gets NaN and changes no other; a tile of shrink may lack a loop that the tile of
// the product has.
template <class Kernel, class ShrinkKernel>
void test_loops_outside_the_range_and_far_between(const char* name) {
  const Shape shape{32, 16, 264, 3, {16}, {24}, true, 1};
  Problem<device::BFloat16> sound(shape, 13);
  for (int i = 0; i < shape.m; ++i) sound.loops[i] = i < 16 ? 0 : 2;
  Problem<device::BFloat16> spoiled = sound;
  spoiled.loops[3] = -1;
  spoiled.loops[20] = 3;
  launch<device::BFloat16, Kernel, ShrinkKernel>(sound);
  // Of a tile without a loop, what has been fetched is left.
  const Outcome outcome = launch<device::BFloat16, Kernel, ShrinkKernel>(spoiled, 1, true, emulation::Sabotage::kNone, true);
  EXPECT(outcome.violation().empty(), "%s: %s", name, outcome.violation().c_str());
  EXPECT(relative_error(sound) < 4e-3, "%s", name);
  for (int i = 0; i < shape.m * shape.n; ++i) {
    const int token = i / shape.n;
    const bool invalid = token == 3 || token == 20;
    const bool right = invalid ? std::isnan(device::BFloat16::widen(spoiled.y[i])) : spoiled.y[i].bits == sound.y[i].bits;
    EXPECT(right, "%s token %d", name, token);
  }
}

struct Fault {
  emulation::Sabotage sabotage;
  const char* report;  // empty: only the numbers tell
};

template <class Kernel>
void test_faults_are_noticed(const std::vector<Fault>& faults) {
  using emulation::Sabotage;
  const Shape shape{8, 64, 2048, 2, {64}, {64}, false, 1};
  for (size_t i = 0; i < 2 * faults.size(); ++i) {
    const Fault& fault = faults[i / 2];
    const bool early = i % 2 == 0;
    // Shrink is sound, the product is not.
    Problem<device::BFloat16> problem(shape, 3);
    launch<device::BFloat16, Kernel>(problem);
    DecodeArgs args = problem.args();
    args.parts_per_block = kParts / Kernel::kSlices;
    args.starts_early = early;
    const std::string violation = Kernel::product(problem, args, 1, fault.sabotage, early).violation;
    if (*fault.report) {
      EXPECT(violation.find(fault.report) != std::string::npos, "expected '%s', found '%s'", fault.report, violation.c_str());
    } else {
      EXPECT(violation.empty() && relative_error(problem) > 0.1, "found '%s'", violation.c_str());
    }
  }
  Problem<device::BFloat16> problem(shape, 3);
  for (bool prefetches : {true, false}) {
    const std::string early =
        launch<device::BFloat16, Kernel>(problem, 1, true, Sabotage::kSkipDependencyWait, prefetches).shrink.violation;
    EXPECT(early.find("before dependency_wait") != std::string::npos, "found '%s'", early.c_str());
  }
  // x that comes with W at once, where the kernel that writes it may still run.
  DecodeArgs args = problem.args();
  args.parts_per_block = kParts / Kernel::kSlices;
  const std::string x_early = Kernel::product(problem, args, 1, Sabotage::kNone, true).violation;
  EXPECT(x_early.find("region 'x' is read before") != std::string::npos, "found '%s'", x_early.c_str());
  // The product may not write before it has waited, though it reads no T.
  const Shape without_rank{8, 64, 2048, 2, {64}, {0}, false, 1};
  Problem<device::BFloat16> no_rank(without_rank, 3);
  const std::string written =
      launch<device::BFloat16, Kernel>(no_rank, 1, false, Sabotage::kSkipDependencyWait).product.violation;
  EXPECT(written.find("is written before dependency_wait") != std::string::npos, "found '%s'", written.c_str());
}

}  // namespace

int main() {
  using emulation::Sabotage;
  using Columns8 = Columns<ColumnInstance<8, kParts, 4>>;
  using Rows64 = Rows<RowInstance<8, 1, 8>, 1>;
  using Rows128 = Rows<RowInstance<8, 2, 4>, 1>;
  using Sliced = Rows<RowInstance<8, 1, 8>, 4>;
  test_kernels();
  test_plain<device::Float32>("fp32 plain", 1e-6);
  test_plain<device::Float64>("fp64 plain", 1e-6);  // the reference here rounds T to float
  test_plain<device::BFloat16>("bf16 plain", 4e-3);
  test_plain<device::Float16>("fp16 plain", 5e-4);
  test_row_independence<device::BFloat16>();
  test_loops_outside_the_range_and_far_between<Columns<ColumnInstance<32, kParts, 3>>, WholeShrink>("columns");
  test_loops_outside_the_range_and_far_between<Rows<RowInstance<32, 1, 6>, 2>, SplitShrink>("rows, 2 slices");
  test_loops_outside_the_range_and_far_between<Rows<RowInstance<32, 2, 4>, 1>, WholeShrink>("rows");
  test_loops_outside_the_range_and_far_between<Rows<RowInstance<32, 1, 6>, 2>, RowShrink<RowInstance<32, 1, 6>>>("shrink by rows");
  const std::vector<Fault> faults = {{Sabotage::kSkipCopyWait, "before the copy"},
                                     {Sabotage::kSkipDependencyWait, "before dependency_wait"},
                                     {Sabotage::kWrongLaneMap, ""},
                                     {Sabotage::kSkipBarrier, "shared byte"}};
  test_faults_are_noticed<Rows64>(faults);
  test_faults_are_noticed<Rows128>(faults);
  test_faults_are_noticed<Sliced>({{Sabotage::kSkipDependencyWait, "before dependency_wait"}});
  test_faults_are_noticed<Columns8>(faults);
  test_faults_are_noticed<Columns8>({{Sabotage::kSkipWarpBarrier, "race"}});
  test_hints<Shrink<ColumnInstance<16, kParts, 3>>>("hints of columns", kParts, 5 * 3);
  test_hints<SplitShrink>("hints of split columns", 1, 5 * 2 * 3 * kParts);
  test_hints<RowShrink<RowInstance<32, 1, 6>>>("hints of rows", kRowThreads / 32, 2 * 3 * kParts);
  std::printf(failures ? "%d failures\n" : "ok\n", failures);
  return failures != 0;
}
