// The CUDA decode kernel's body under emulation, against sums in double; see emulation/device.h.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "loop_lora/cuda_plain.h"

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

  Problem(const Shape& s, uint64_t seed) : shape(s), padded_m((s.m + 7) / 8 * 8) {
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

  std::vector<emulation::Region> regions(bool shrink) {
    return {region("x", x, false),         region("loops", loops, false),   region("weight", weight, false),
            region("bias", bias, false),   region("lora_a", lora_a, false), region("lora_b", lora_b, false),
            region("shrunk", shrunk, shrink, !shrink), region("y", y, !shrink)};
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

  int present_loops() const {
    std::vector<bool> seen(shape.num_loops);
    for (int loop : loops) seen[loop] = true;
    int count = 0;
    for (bool is : seen) count += is;
    return count;
  }
};

struct Outcome {
  emulation::Report shrink, expand;
  std::string violation() const { return shrink.violation.empty() ? expand.violation : shrink.violation; }
};

template <class Half, int TILES, int TOKENS, int STAGES>
Outcome launch(Problem<Half>& problem, uint64_t seed = 1, emulation::Sabotage sabotage = emulation::Sabotage::kNone) {
  const DecodeArgs args = problem.args();
  const int token_tiles = (args.m + TOKENS - 1) / TOKENS;
  const int shared = decode_shared_bytes<TILES, TOKENS, STAGES>();
  const auto tiles_of = [](int rows) { return (rows + 16 * TILES - 1) / (16 * TILES); };
  Outcome outcome;
  if (args.total_rank > 0) {
    outcome.shrink = emulation::run({{tiles_of(args.total_rank), args.num_loops, token_tiles}, kThreads, shared, seed,
                                     problem.regions(true), sabotage},
                                    [&] { decode_body<Half, TILES, TOKENS, STAGES, true>(args); });
    if (!outcome.shrink.violation.empty()) return outcome;
  }
  outcome.expand = emulation::run({{tiles_of(args.n), 1, token_tiles}, kThreads, shared, seed, problem.regions(false), sabotage},
                                  [&] { decode_body<Half, TILES, TOKENS, STAGES, false>(args); });
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

const std::vector<Shape> kShapes = {
    {1, 64, 256, 1, {64}, {32}, false, 1},
    {5, 80, 264, 2, {80}, {8}, true, 1},
    {8, 128, 512, 3, {64, 64}, {64, 24}, true, 3},
    {3, 64, 1032, 2, {64}, {0}, false, 1},
    {13, 64, 96, 3, {64}, {304}, true, 1},
    {9, 72, 8, 2, {72}, {16}, false, 1},
    {37, 64, 128, 4, {64}, {40}, false, 1},
};

template <class Number>
void test_plain(const char* name, double tolerance) {
  std::vector<Shape> shapes = kShapes;
  shapes.push_back({11, 37, 45, 3, {30, 7}, {5, 3}, true, 3});
  for (const Shape& shape : shapes) {
    Problem<Number> problem(shape, 7);
    problem.plain_shrunk.assign(problem.shrunk.size(), NAN);
    DecodeArgs args = problem.args();
    args.shrunk = problem.plain_shrunk.data();
    const auto regions = [&](bool shrink) {
      std::vector<emulation::Region> all = problem.regions(shrink);
      all[6] = Problem<Number>::region("shrunk", problem.plain_shrunk, shrink, !shrink);
      return all;
    };
    const int token_tiles = (args.m + kPlainTokens - 1) / kPlainTokens;
    emulation::Report report;
    if (args.total_rank > 0) {
      report = emulation::run({{(args.total_rank + kWarps - 1) / kWarps, args.num_loops, token_tiles}, kThreads, 0, 1,
                               regions(true)},
                              [&] { plain_body<Number, true>(args); });
    }
    if (report.violation.empty()) {
      report = emulation::run({{(args.n + kWarps - 1) / kWarps, 1, token_tiles}, kThreads, 0, 1, regions(false)},
                              [&] { plain_body<Number, false>(args); });
    }
    EXPECT(report.violation.empty(), "%s m=%d n=%d k=%d: %s", name, shape.m, shape.n, shape.k, report.violation.c_str());
    if (!report.violation.empty()) continue;
    const double error = relative_error(problem);
    EXPECT(error < tolerance, "%s m=%d n=%d k=%d: relative error %g", name, shape.m, shape.n, shape.k, error);
  }
}

template <class Half, int TILES, int TOKENS, int STAGES>
void test_instance(const char* name, double tolerance, size_t every) {
  for (size_t i = 0; i < kShapes.size(); i += every) {
    const Shape& shape = kShapes[i];
    Problem<Half> problem(shape, 7);
    const Outcome outcome = launch<Half, TILES, TOKENS, STAGES>(problem);
    EXPECT(outcome.violation().empty(), "%s m=%d n=%d k=%d: %s", name, shape.m, shape.n, shape.k, outcome.violation().c_str());
    if (!outcome.violation().empty()) continue;
    const double error = relative_error(problem);
    EXPECT(error < tolerance, "%s m=%d n=%d k=%d: relative error %g", name, shape.m, shape.n, shape.k, error);

    // W once per tile of tokens, A and B of each present loop likewise: the floor's accounting.
    if (shape.m > TOKENS) continue;
    const int64_t loops = problem.present_loops();
    const auto bytes = [](int64_t elements) { return 2 * elements; };
    EXPECT(outcome.expand.bytes_read("weight") == bytes(int64_t{shape.n} * shape.k), "%s", name);
    int64_t b_elements = 0;
    for (size_t s = 0; s < shape.segment_out.size(); ++s) b_elements += int64_t{shape.segment_out[s]} * shape.segment_rank[s];
    EXPECT(outcome.expand.bytes_read("lora_b") == bytes(loops * b_elements), "%s", name);
    if (problem.total_rank > 0) {
      EXPECT(outcome.shrink.bytes_read("lora_a") == bytes(loops * problem.total_rank * shape.k), "%s", name);
    }
  }
}

// A row has the same bits alone, in any order, and under any tiling.
template <class Half>
void test_row_independence() {
  const Shape shape{13, 64, 520, 3, {64}, {72}, true, 1};
  Problem<Half> whole(shape, 11);
  launch<Half, 1, 16, 4>(whole);
  Problem<Half> tiled(shape, 11);
  launch<Half, 4, 8, 3>(tiled, 5);
  EXPECT(std::memcmp(whole.y.data(), tiled.y.data(), whole.y.size() * 2) == 0, "tiles change bits");
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
    launch<Half, 1, 8, 4>(alone);
    EXPECT(std::memcmp(alone.y.data(), whole.y.data() + row * shape.n, shape.n * 2) == 0, "row %d", row);
  }
}

void test_faults_are_noticed() {
  using emulation::Sabotage;
  const Shape shape{8, 64, 2048, 2, {64}, {64}, false, 1};
  const struct {
    Sabotage sabotage;
    const char* report;  // empty: only the numbers tell
  } faults[] = {{Sabotage::kSkipBarrier, "race"},
                {Sabotage::kSkipCopyWait, "before the copy"},
                {Sabotage::kSkipDependencyWait, "before dependency_wait"},
                {Sabotage::kWrongLaneMap, ""}};
  for (const auto& fault : faults) {
    Problem<device::BFloat16> problem(shape, 3);
    const std::string violation = launch<device::BFloat16, 1, 8, 4>(problem, 1, fault.sabotage).violation();
    if (*fault.report) {
      EXPECT(violation.find(fault.report) != std::string::npos, "expected '%s', found '%s'", fault.report, violation.c_str());
    } else {
      EXPECT(violation.empty() && relative_error(problem) > 0.1, "found '%s'", violation.c_str());
    }
  }
}

}  // namespace

int main() {
#define RRT_TEST(TILES, TOKENS, STAGES)                                                              \
  test_instance<device::BFloat16, TILES, TOKENS, STAGES>("bf16 " #TILES " x " #TOKENS, 4e-3, 1);     \
  test_instance<device::Float16, TILES, TOKENS, STAGES>("fp16 " #TILES " x " #TOKENS, 5e-4, 3);
  RRT_NARROW_TILES(RRT_TEST)
  RRT_WIDE_TILES(RRT_TEST)
#undef RRT_TEST
  test_plain<device::Float32>("fp32 plain", 1e-6);
  test_plain<device::Float64>("fp64 plain", 1e-6);  // the reference here rounds T to float
  test_plain<device::BFloat16>("bf16 plain", 4e-3);
  test_plain<device::Float16>("fp16 plain", 5e-4);
  test_row_independence<device::BFloat16>();
  test_row_independence<device::Float16>();
  test_faults_are_noticed();
  std::printf(failures ? "%d failures\n" : "ok\n", failures);
  return failures != 0;
}
