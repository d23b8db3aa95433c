// The CUDA decode kernels' bodies under emulation, against sums in double; see emulation/device/primitives.h.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <type_traits>
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
  std::vector<float> part_sums;

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

  // Which regions a kernel may write, and which it may read only after dependency_wait since the kernel before writes
  // them. Before shrink, that may be any kernel.
  enum class Stage { kShrink, kProduct, kAddParts };
  std::vector<emulation::Region> regions(Stage stage) {
    const bool shrink = stage == Stage::kShrink, product = stage == Stage::kProduct, add = stage == Stage::kAddParts;
    return {region("x", x, false, shrink),
            region("loops", loops, false, shrink),
            region("weight", weight, false, shrink),
            region("bias", bias, false, shrink),
            region("lora_a", lora_a, false, shrink),
            region("lora_b", lora_b, false, shrink),
            region("shrunk", shrunk, shrink, product),
            region("part_sums", part_sums, product, add),
            region("y", y, !shrink)};
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
  emulation::Report shrink, product, add;
  std::string violation() const {
    for (const emulation::Report* report : {&shrink, &product, &add}) {
      if (!report->violation.empty()) return report->violation;
    }
    return "";
  }
};

// The column kernel.
struct Columns {
  template <class Half, int TOKENS, int STAGES>
  static emulation::Report product(Problem<Half>& problem, const DecodeArgs& args, uint64_t seed,
                                   emulation::Sabotage sabotage) {
    return emulation::run({{ceil_div(args.n, kColumnTileRows) * ceil_div(args.m, TOKENS), 1, 1}, kColumnThreads,
                           column_shared_bytes<TOKENS, STAGES>(), seed,
                           problem.regions(Problem<Half>::Stage::kProduct), sabotage},
                          [&] { column_body<Half, TOKENS, STAGES, false>(args); });
  }
  static constexpr int kSlices = 1;
};

template <int SLICES>
struct Rows {
  template <class Half, int TOKENS, int STAGES>
  static emulation::Report product(Problem<Half>& problem, const DecodeArgs& args, uint64_t seed,
                                   emulation::Sabotage sabotage) {
    return emulation::run({{ceil_div(args.n, kRowTileRows) * ceil_div(args.m, TOKENS), SLICES, 1}, kRowThreads,
                           row_shared_bytes<TOKENS, STAGES>(), seed,
                           problem.regions(Problem<Half>::Stage::kProduct), sabotage},
                          [&] { row_body<Half, TOKENS, STAGES>(args); });
  }
  static constexpr int kSlices = SLICES;
};

template <class Half, class Kernel, int TOKENS, int STAGES>
Outcome launch(Problem<Half>& problem, uint64_t seed = 1, emulation::Sabotage sabotage = emulation::Sabotage::kNone) {
  using Stage = typename Problem<Half>::Stage;
  DecodeArgs args = problem.args();
  args.parts_per_block = kParts / Kernel::kSlices;
  Outcome outcome;
  if (args.total_rank > 0) {
    outcome.shrink = emulation::run(
        {{ceil_div(args.total_rank, kColumnTileRows) * ceil_div(args.m, TOKENS), args.num_loops, 1}, kColumnThreads,
         column_shared_bytes<TOKENS, STAGES>(), seed, problem.regions(Stage::kShrink), sabotage},
        [&] { column_body<Half, TOKENS, STAGES, true>(args); });
    if (!outcome.shrink.violation.empty()) return outcome;
  }
  outcome.product = Kernel::template product<Half, TOKENS, STAGES>(problem, args, seed, sabotage);
  if (!outcome.product.violation.empty() || Kernel::kSlices == 1) return outcome;
  outcome.add = emulation::run({{ceil_div(args.m * args.n, kAddThreads), 1, 1}, kAddThreads, 0, seed,
                                problem.regions(Stage::kAddParts), sabotage},
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

// The first output of every segment but the first is a multiple of `kRowTileRows`, so that both kernels take them.
const std::vector<Shape> kShapes = {
    {5, 80, 264, 2, {80}, {8}, true, 1},     {1, 64, 256, 1, {64}, {32}, false, 1},
    {8, 144, 520, 3, {128, 16}, {64, 24}, true, 3}, {3, 16, 1032, 2, {16}, {0}, false, 1},
    {13, 64, 96, 3, {64}, {304}, true, 1},   {9, 72, 8, 2, {72}, {16}, false, 1},
    {37, 64, 128, 4, {64}, {40}, false, 1},  {64, 16, 64, 2, {16}, {8}, false, 2},
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
      std::vector<emulation::Region> all = problem.regions(shrink ? Stage::kShrink : Stage::kProduct);
      all[0].dependent = all[1].dependent = true;  // x and loops; nothing is read early here
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

template <class Half, class Kernel, int TOKENS, int STAGES>
void test_instance(const std::string& label, double tolerance, size_t first, size_t step) {
  const char* name = label.c_str();
  for (size_t i = first; i < kShapes.size(); i += step) {
    const Shape& shape = kShapes[i];
    Problem<Half> problem(shape, 7);
    const Outcome outcome = launch<Half, Kernel, TOKENS, STAGES>(problem);
    EXPECT(outcome.violation().empty(), "%s m=%d n=%d k=%d: %s", name, shape.m, shape.n, shape.k, outcome.violation().c_str());
    if (!outcome.violation().empty()) continue;
    const double error = relative_error(problem);
    EXPECT(error < tolerance, "%s m=%d n=%d k=%d: relative error %g", name, shape.m, shape.n, shape.k, error);

    // W once per tile of tokens, A and B of each loop in the batch likewise: the floor's accounting.
    if (shape.m > TOKENS) continue;
    const int64_t loops = problem.num_loops_present();
    const auto bytes = [](int64_t elements) { return 2 * elements; };
    EXPECT(outcome.product.bytes_read("weight") == bytes(int64_t{shape.n} * shape.k), "%s", name);
    int64_t b_elements = 0;
    for (size_t s = 0; s < shape.segment_out.size(); ++s) b_elements += int64_t{shape.segment_out[s]} * shape.segment_rank[s];
    EXPECT(outcome.product.bytes_read("lora_b") == bytes(loops * b_elements), "%s", name);
    if (problem.total_rank > 0) {
      // The product reads x at once, which the kernel before shrink may have written.
      EXPECT(!outcome.shrink.early_dependents, "%s", name);
      EXPECT(outcome.shrink.bytes_read("lora_a") == bytes(loops * problem.total_rank * shape.k), "%s", name);
    }
    // Not in the floor: x once per tile of outputs, and the sums of parts where there are several slices.
    const int rows = std::is_same_v<Kernel, Columns> ? kColumnTileRows : kRowTileRows;
    EXPECT(outcome.product.bytes_read("x") == bytes(int64_t{shape.m} * shape.k * ceil_div(shape.n, rows)), "%s", name);
    if (Kernel::kSlices > 1) {
      EXPECT(outcome.add.bytes_read("part_sums") == int64_t{4} * kParts * shape.m * shape.n, "%s", name);
    }
  }
}

// Each instance on a half of the shapes in bfloat16, and on a quarter in float16.
template <class Kernel, class Instances>
void test_instances(const std::string& kernel, Instances instances) {
  for_each_type(instances, [&](auto instance) {
    using I = decltype(instance);
    const std::string label = " " + kernel + " x " + std::to_string(I::kTokens);
    test_instance<device::BFloat16, Kernel, I::kTokens, I::kStages>("bf16" + label, 4e-3, 0, 2);
    test_instance<device::Float16, Kernel, I::kTokens, I::kStages>("fp16" + label, 5e-4, 1, 4);
  });
}

// A row has the same bits alone, in any order, under any tiling and either kernel.
template <class Half>
void test_row_independence() {
  const Shape shape{9, 144, 520, 3, {128, 16}, {72, 264}, true, 1};
  Problem<Half> whole(shape, 11);
  launch<Half, Columns, 16, 6>(whole);
  uint64_t seed = 5;
  const auto expect_the_same = [&](const std::string& name, auto tiled_launch) {
    Problem<Half> tiled(shape, 11);
    tiled_launch(tiled, ++seed);
    EXPECT(std::memcmp(whole.y.data(), tiled.y.data(), whole.y.size() * 2) == 0, "%s changes bits", name.c_str());
  };
  for_each_type(RowInstances{}, [&](auto instance) {
    using I = decltype(instance);
    const std::string tokens = " x " + std::to_string(I::kTokens);
    constexpr int kTokens = I::kTokens, kStages = I::kStages;
    expect_the_same("columns" + tokens, [](auto& p, uint64_t s) { launch<Half, Columns, kTokens, kStages>(p, s); });
    expect_the_same("rows" + tokens, [](auto& p, uint64_t s) { launch<Half, Rows<1>, kTokens, kStages>(p, s); });
    expect_the_same("8 slices" + tokens, [](auto& p, uint64_t s) { launch<Half, Rows<8>, kTokens, kStages>(p, s); });
  });
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
    launch<Half, Columns, 8, 8>(alone);
    EXPECT(std::memcmp(alone.y.data(), whole.y.data() + row * shape.n, shape.n * 2) == 0, "row %d", row);
  }
}

// `barrier` is in the report of a product without barriers.
template <class Kernel>
void test_faults_are_noticed(const char* barrier) {
  using emulation::Sabotage;
  const Shape shape{8, 64, 2048, 2, {64}, {64}, false, 1};
  const struct {
    Sabotage sabotage;
    const char* report;  // empty: only the numbers tell
  } faults[] = {{Sabotage::kSkipBarrier, barrier},
                {Sabotage::kSkipCopyWait, "before the copy"},
                {Sabotage::kSkipDependencyWait, "before dependency_wait"},
                {Sabotage::kWrongLaneMap, ""}};
  for (const auto& fault : faults) {
    // Shrink is sound, the product is not.
    Problem<device::BFloat16> problem(shape, 3);
    launch<device::BFloat16, Kernel, 8, 8>(problem);
    DecodeArgs args = problem.args();
    args.parts_per_block = kParts / Kernel::kSlices;
    const std::string violation =
        Kernel::template product<device::BFloat16, 8, 8>(problem, args, 1, fault.sabotage).violation;
    if (*fault.report) {
      EXPECT(violation.find(fault.report) != std::string::npos, "expected '%s', found '%s'", fault.report, violation.c_str());
    } else {
      EXPECT(violation.empty() && relative_error(problem) > 0.1, "found '%s'", violation.c_str());
    }
  }
  Problem<device::BFloat16> problem(shape, 3);
  const std::string early = launch<device::BFloat16, Kernel, 8, 8>(problem, 1, Sabotage::kSkipDependencyWait).shrink.violation;
  EXPECT(early.find("before dependency_wait") != std::string::npos, "found '%s'", early.c_str());
}

}  // namespace

int main() {
  test_instances<Columns>("columns", ColumnInstances{});
  test_instances<Rows<1>>("rows", RowInstances{});
  test_instances<Rows<4>>("4 slices", RowInstances{});
  test_plain<device::Float32>("fp32 plain", 1e-6);
  test_plain<device::Float64>("fp64 plain", 1e-6);  // the reference here rounds T to float
  test_plain<device::BFloat16>("bf16 plain", 4e-3);
  test_plain<device::Float16>("fp16 plain", 5e-4);
  test_row_independence<device::BFloat16>();
  test_faults_are_noticed<Columns>("before the copy");
  test_faults_are_noticed<Rows<1>>("race");
  std::printf(failures ? "%d failures\n" : "ok\n", failures);
  return failures != 0;
}
