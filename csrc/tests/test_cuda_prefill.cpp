// The CUDA prefill kernel's body under emulation, against sums in double; see emulation/device/primitives.h.
#include <cmath>
#include <cstring>
#include <set>
#include <string>
#include <tuple>
#include <vector>

#include "loop_lora/cuda_prefill.h"
#include "tests/check.h"

using namespace rrt;
using namespace rrt::loop_lora;

namespace {

struct Shape {
  int m, k;
  std::vector<int> out, rank;  // of the segments
  bool bias;

  int n() const { return sum(out); }
  int total_rank() const { return sum(rank); }
  int max_rank() const { return *std::max_element(rank.begin(), rank.end()); }
  std::string text() const {
    return " m=" + std::to_string(m) + " n=" + std::to_string(n()) + " k=" + std::to_string(k);
  }
  static int sum(const std::vector<int>& values) {
    int total = 0;
    for (int value : values) total += value;
    return total;
  }
};

void expect(bool condition, const std::string& what) {
  if (!condition) tests::report(__FILE__, __LINE__, what.c_str());
}

// Elements that must not be read are NaN: of x beyond its columns, and of B beyond a segment's rank.
template <class Half>
struct Problem {
  using Storage = typename Half::Storage;
  Shape shape;
  int x_stride, b_stride;
  std::vector<Storage> x, weight, bias, lora_a, lora_b, shrunk, y;

  Problem(const Shape& s, uint64_t seed) : shape(s), x_stride(s.k + 8), b_stride(s.max_rank() + 8) {
    std::mt19937_64 random(seed);
    std::normal_distribution<float> normal;
    const auto fill = [&](std::vector<Storage>& to, int rows, int columns, int stride) {
      to.assign(int64_t{rows} * stride, Half::narrow(NAN));
      for (int row = 0; row < rows; ++row) {
        for (int i = 0; i < columns; ++i) to[int64_t{row} * stride + i] = Half::narrow(normal(random));
      }
    };
    fill(x, s.m, s.k, x_stride);
    fill(weight, s.n(), s.k, s.k);
    fill(bias, s.bias ? s.n() : 0, 1, 1);
    fill(lora_a, s.total_rank(), s.k, s.k);
    lora_b.assign(int64_t{s.n()} * b_stride, Half::narrow(NAN));
    int row = 0;
    for (size_t i = 0; i < s.out.size(); ++i) {
      for (int end = row + s.out[i]; row < end; ++row) {
        for (int r = 0; r < s.rank[i]; ++r) lora_b[int64_t{row} * b_stride + r] = Half::narrow(normal(random));
      }
    }
    shrunk.assign(int64_t{s.m} * s.total_rank(), Half::narrow(NAN));
    y.assign(int64_t{s.m} * s.n(), Half::narrow(NAN));
  }

  PrefillArgs args() {
    PrefillArgs a{};
    a.x = x.data();
    a.x_stride = x_stride;
    a.weight = weight.data();
    a.bias = shape.bias ? bias.data() : nullptr;
    a.shrunk = shrunk.data();
    a.lora_b = lora_b.data();
    a.y = y.data();
    a.m = shape.m;
    a.n = shape.n();
    a.k = shape.k;
    a.total_rank = shape.total_rank();
    a.b_stride = b_stride;
    a.num_segments = static_cast<int>(shape.out.size());
    int rank = 0;
    for (int s = 0; s < a.num_segments; ++s) {
      a.segment_out[s + 1] = a.segment_out[s] + shape.out[s];
      a.segment_rank[s] = rank;
      a.segment_size[s] = shape.rank[s];
      rank += shape.rank[s];
    }
    return a;
  }

  static emulation::Region region(const char* name, std::vector<Storage>& data, bool writable, bool dependent = false) {
    return {name, reinterpret_cast<const char*>(data.data()), static_cast<int64_t>(data.size() * 2), writable, dependent};
  }

  std::vector<emulation::Region> regions(bool shrink) {
    return {region("x", x, false),
            region("weight", weight, false),
            region("bias", bias, false),
            region("lora_a", lora_a, false),
            region("lora_b", lora_b, false),
            region("shrunk", shrunk, shrink, !shrink),
            region("y", y, !shrink)};
  }

  // The definition in double, from T rounded as the kernel rounds it.
  std::vector<double> expected() const {
    const auto dot = [](const Storage* a, const Storage* b, int size) {
      double sum = 0;
      for (int i = 0; i < size; ++i) sum += static_cast<double>(Half::widen(a[i])) * Half::widen(b[i]);
      return sum;
    };
    std::vector<double> result;
    for (int token = 0; token < shape.m; ++token) {
      const Storage* row = &x[int64_t{token} * x_stride];
      std::vector<Storage> t;
      for (int r = 0; r < shape.total_rank(); ++r) {
        t.push_back(Half::narrow(static_cast<float>(dot(&lora_a[int64_t{r} * shape.k], row, shape.k))));
      }
      int n = 0;
      const Storage* t_of_segment = t.data();
      for (size_t s = 0; s < shape.out.size(); ++s) {
        for (int end = n + shape.out[s]; n < end; ++n) {
          result.push_back(dot(&weight[int64_t{n} * shape.k], row, shape.k) +
                           dot(&lora_b[int64_t{n} * b_stride], t_of_segment, shape.rank[s]) +
                           (shape.bias ? Half::widen(bias[n]) : 0));
        }
        t_of_segment += shape.rank[s];
      }
    }
    return result;
  }

  double relative_error() const {
    const std::vector<double> wanted = expected();
    double error = 0, norm = 0;
    for (size_t i = 0; i < wanted.size(); ++i) {
      const double difference = Half::widen(y[i]) - wanted[i];
      error += difference * difference;
      norm += wanted[i] * wanted[i];
    }
    return std::sqrt(error / norm);
  }
};

struct Outcome {
  emulation::Report shrink, product;
  std::string violation() const { return shrink.violation.empty() ? product.violation : shrink.violation; }
};

template <class Tile, class Half>
Outcome launch(Problem<Half>& problem, uint64_t seed = 1, emulation::Sabotage sabotage = emulation::Sabotage::kNone) {
  const auto run = [&](const PrefillArgs& args, bool shrink) {
    const device::Index grid{ceil_div(args.m, Tile::kTokens), Tile::out_tiles(args), 1};
    return emulation::run({grid, Tile::kThreads, Tile::kSharedBytes, seed, problem.regions(shrink), sabotage},
                          [&] { prefill_body<Tile>(args); });
  };
  const PrefillArgs args = problem.args();
  Outcome outcome;
  if (args.total_rank > 0) {
    outcome.shrink = run(shrink_args(args, problem.lora_a.data(), problem.shrunk.data()), true);
    if (!outcome.shrink.violation.empty()) return outcome;
  }
  outcome.product = run(args, false);
  return outcome;
}

const std::vector<Shape> kShapes = {
    {1, 8, {8}, {8}, false},
    {67, 72, {136}, {40}, true},
    {130, 200, {64, 8, 24}, {24, 8, 72}, true},
    {33, 96, {5, 0, 78}, {16, 8, 0}, true},  // rows of outputs that are not whole vectors
    {12, 16, {64, 5, 75}, {8, 16, 0}, true}, // segments that are not
    {9, 264, {200}, {0}, false},
};

template <class Half, class Tile>
void test_instance(const std::string& name, double tolerance) {
  for (const Shape& shape : kShapes) {
    Problem<Half> problem(shape, 7);
    const Outcome outcome = launch<Tile>(problem);
    expect(outcome.violation().empty(), name + shape.text() + ": " + outcome.violation());
    if (!outcome.violation().empty()) continue;
    const double error = problem.relative_error();
    expect(error < tolerance, name + shape.text() + ": relative error " + std::to_string(error));

    // Every tile of tokens reads W, A and B once, every tile of outputs x and its segment's columns of T.
    const PrefillArgs args = problem.args();
    const int64_t token_tiles = ceil_div(shape.m, Tile::kTokens);
    int64_t b_elements = 0, t_reads = 0;
    for (size_t s = 0; s < shape.out.size(); ++s) {
      b_elements += int64_t{shape.out[s]} * shape.rank[s];
      t_reads += ceil_div(shape.out[s], Tile::kOuts) * int64_t{shape.m} * shape.rank[s];
    }
    CHECK_EQ(outcome.product.bytes_read("weight"), 2 * token_tiles * shape.n() * shape.k);
    CHECK_EQ(outcome.product.bytes_read("lora_b"), 2 * token_tiles * b_elements);
    CHECK_EQ(outcome.product.bytes_read("x"), 2 * Tile::out_tiles(args) * int64_t{shape.m} * shape.k);
    CHECK_EQ(outcome.product.bytes_read("shrunk"), 2 * t_reads);
    CHECK_EQ(outcome.product.bytes_written("y"), 2 * int64_t{shape.m} * shape.n());
    if (shape.total_rank() == 0) continue;
    const int rank_tiles = Tile::out_tiles(shrink_args(args, nullptr, nullptr));
    CHECK_EQ(outcome.shrink.bytes_read("lora_a"), 2 * token_tiles * shape.total_rank() * shape.k);
    CHECK_EQ(outcome.shrink.bytes_read("x"), 2 * rank_tiles * int64_t{shape.m} * shape.k);
  }
}

// From the smallest to the largest.
template <class... Tiles>
void compare_tiles(TypeList<Tiles...>) {
  using Small = std::tuple_element_t<0, std::tuple<Tiles...>>;
  const Shape shape{71, 136, {72, 64}, {40, 16}, true};
  Problem<device::BFloat16> small(shape, 11);
  launch<Small>(small);
  for_each_type(TypeList<Tiles...>{}, [&](auto tile) {
    Problem<device::BFloat16> other(shape, 11);
    launch<decltype(tile)>(other, 5);
    CHECK(std::memcmp(small.y.data(), other.y.data(), small.y.size() * 2) == 0);
  });
  for (int row : {0, 13, 70}) {
    Problem<device::BFloat16> alone = small;
    alone.shape.m = 1;
    alone.x.assign(small.x.begin() + row * small.x_stride, small.x.begin() + (row + 1) * small.x_stride);
    launch<Small>(alone);
    CHECK(std::memcmp(alone.y.data(), small.y.data() + row * shape.n(), shape.n() * 2) == 0);
  }
}

// A row has the same bits alone as in any tile, at any place.
void test_tiles_and_neighbours_change_no_bit() { compare_tiles(PrefillTiles<device::BFloat16>{}); }

// ldmatrix reads the vectors of eight rows at once.
void test_eight_rows_of_a_column_lie_in_different_banks() {
  using Tile = PrefillTile<device::BFloat16, 2, 2, 2, 1, 4>;
  emulation::run({{1, 1, 1}, 1, Tile::kSharedBytes, 1, {}}, [] {
    const auto* begin = reinterpret_cast<const device::Vector*>(device::shared_memory());
    for (int vector = 0; vector < kRowVectors; ++vector) {
      for (int first = 0; first < Tile::kStageRows; first += 8) {
        std::set<int64_t> places;
        for (int row = first; row < first + 8; ++row) places.insert((Tile::slot(1, row, vector) - begin) % 8);
        CHECK_EQ(places.size(), 8u);
      }
    }
  });
}

// On 132 multiprocessors.
template <class... Tiles>
void choose_tiles(TypeList<Tiles...> tiles) {
  const struct {
    int m, n, tokens, outs;
  } cases[] = {{10, 2048, 64, 64},     {128, 2048, 64, 64},     {1024, 2048, 128, 128}, {4096, 2048, 128, 256},
               {128, 32768, 128, 256}, {2048, 16384, 128, 256}, {4096, 64, 64, 64}};
  const int tokens[] = {Tiles::kTokens...}, outs[] = {Tiles::kOuts...};
  for (const auto& expected : cases) {
    PrefillArgs args{};
    args.m = expected.m;
    args.n = args.segment_out[1] = expected.n;
    args.num_segments = 1;
    const int chosen = choose_prefill_tile(tiles, args, 132);
    expect(tokens[chosen] == expected.tokens && outs[chosen] == expected.outs,
           "m=" + std::to_string(expected.m) + " n=" + std::to_string(expected.n) + ": found " +
               std::to_string(tokens[chosen]) + " x " + std::to_string(outs[chosen]));
  }
}

void test_choice_of_tile() { choose_tiles(PrefillTiles<device::BFloat16>{}); }

void test_outputs_of_a_group_are_a_permutation() {
  std::set<int> outputs;
  for (int j = 0; j < 4; ++j) {
    for (int c = 0; c < 8; ++c) outputs.insert(output_of(j, c));
  }
  CHECK_EQ(outputs.size(), 32u);
  CHECK_EQ(*outputs.rbegin(), 31);
}

void test_faults_are_noticed() {
  using emulation::Sabotage;
  const Shape shape{40, 320, {64}, {64}, false};
  const struct {
    Sabotage sabotage;
    const char* report;  // empty: only the numbers tell
  } faults[] = {{Sabotage::kSkipBarrier, "race"},
                {Sabotage::kSkipCopyWait, "before the copy"},
                {Sabotage::kSkipDependencyWait, "before dependency_wait"},
                {Sabotage::kWrongLaneMap, ""},
                {Sabotage::kWrongRows, ""}};
  for (const auto& fault : faults) {
    Problem<device::BFloat16> problem(shape, 3);
    const std::string violation = launch<PrefillTile<device::BFloat16, 2, 2, 2, 1, 4>>(problem, 1, fault.sabotage).violation();
    if (*fault.report) {
      expect(violation.find(fault.report) != std::string::npos,
             std::string("expected '") + fault.report + "', found '" + violation + "'");
    } else {
      expect(violation.empty() && problem.relative_error() > 0.1, "found '" + violation + "'");
    }
  }
}

template <class Half>
void test_all_instances(const std::string& half, double tolerance) {
  for_each_type(PrefillTiles<Half>{}, [&](auto tile) {
    using Tile = decltype(tile);
    const std::string name = half + " " + std::to_string(Tile::kTokens) + " x " + std::to_string(Tile::kOuts);
    test_instance<Half, Tile>(name, tolerance);
  });
}

void test_instances() {
  test_all_instances<device::BFloat16>("bf16", 4e-3);
  test_all_instances<device::Float16>("fp16", 5e-4);
}

}  // namespace

int main() {
  return tests::run(test_instances, test_tiles_and_neighbours_change_no_bit,
                    test_eight_rows_of_a_column_lie_in_different_banks, test_outputs_of_a_group_are_a_permutation,
                    test_choice_of_tile, test_faults_are_noticed);
}
