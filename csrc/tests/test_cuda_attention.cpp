// The CUDA kernels of the key/value operators under emulation, against sums in double; see
// emulation/device/primitives.h.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "kv_cache/cuda_plain.h"

using namespace rrt;
using namespace rrt::kv_cache;

namespace {

int failures = 0;

#define EXPECT(condition, ...)                                    \
  do {                                                            \
    if (!(condition)) {                                           \
      std::printf("%s:%d: %s: ", __FILE__, __LINE__, #condition); \
      std::printf(__VA_ARGS__);                                   \
      std::printf("\n");                                          \
      ++failures;                                                 \
    }                                                             \
  } while (0)

struct Shape {
  std::vector<int> chunks;    // queries of each sequence; decode: all 1
  std::vector<int> contexts;
  int num_heads, num_kv_heads, head_dim, page_size, rotary_dim;
};

template <class Number>
struct Problem {
  using Storage = typename Number::Storage;
  using Acc = typename Number::Acc;
  Shape shape;
  bool decode;
  int num_queries = 0, num_pages = 1, max_pages = 1, pieces = 1;  // page 0 belongs to nobody
  std::vector<int32_t> query_start{0}, tables, positions;
  std::vector<Storage> q, k_cache, v_cache, out;
  std::vector<Acc> cos_sin, partial;

  Problem(const Shape& s, bool is_decode, uint64_t seed) : shape(s), decode(is_decode) {
    std::mt19937_64 random(seed);
    std::normal_distribution<double> normal;
    for (size_t i = 0; i < s.chunks.size(); ++i) {
      num_queries += s.chunks[i];
      query_start.push_back(num_queries);
      max_pages = std::max(max_pages, ceil_div(s.contexts[i], s.page_size));
    }
    for (int context : s.contexts) {
      for (int page = 0; page < max_pages; ++page) tables.push_back(page * s.page_size < context ? num_pages++ : -7);
    }
    pieces = ceil_div(max_pages * s.page_size, kCudaSplitSlots);
    // Slots that no context reaches hold NaN.
    k_cache.assign(int64_t{num_pages} * s.page_size * s.num_kv_heads * s.head_dim, Number::narrow(NAN));
    v_cache = k_cache;
    for (size_t i = 0; i < s.contexts.size(); ++i) {
      for (int slot = 0; slot < s.contexts[i]; ++slot) {
        for (int j = 0; j < s.num_kv_heads * s.head_dim; ++j) {
          k_cache[at(i, slot) + j] = Number::narrow(static_cast<Acc>(normal(random)));
          v_cache[at(i, slot) + j] = Number::narrow(static_cast<Acc>(normal(random)));
        }
      }
    }
    q.resize(int64_t{num_queries} * s.num_heads * s.head_dim);
    for (Storage& value : q) value = Number::narrow(static_cast<Acc>(normal(random)));
    out.assign(q.size(), Number::narrow(NAN));
    partial.assign(int64_t{num_queries} * s.num_heads * pieces * (s.head_dim + 2), NAN);
    constexpr int kPositions = 50;
    for (int i = 0; i < num_queries; ++i) positions.push_back(static_cast<int32_t>(random() % kPositions));
    for (int p = 0; p < kPositions; ++p) {
      for (int i = 0; i < s.rotary_dim; ++i) {
        const double angle = p * std::pow(0.1, i % (s.rotary_dim / 2));
        cos_sin.push_back(static_cast<Acc>(i < s.rotary_dim / 2 ? std::cos(angle) : std::sin(angle)));
      }
    }
  }

  int64_t at(size_t sequence, int slot) const {
    const int page = tables[sequence * max_pages + slot / shape.page_size];
    return (int64_t{page} * shape.page_size + slot % shape.page_size) * shape.num_kv_heads * shape.head_dim;
  }

  CudaRope rope() const { return {shape.rotary_dim ? positions.data() : nullptr, cos_sin.data(), 50, shape.rotary_dim}; }

  CudaAttentionArgs args() {
    CudaAttentionArgs a{};
    a.q = q.data();
    a.q_head_stride = shape.head_dim;
    a.q_row_stride = int64_t{shape.num_heads} * shape.head_dim;
    a.k_cache = k_cache.data();
    a.v_cache = v_cache.data();
    a.block_tables = tables.data();
    a.table_stride = max_pages;
    a.query_start = decode ? nullptr : query_start.data();
    a.context_lens = shape.contexts.data();
    a.scale = 0.3;
    a.rope = rope();
    a.out = out.data();
    a.partial = reinterpret_cast<float*>(partial.data());
    a.num_queries = num_queries;
    a.num_sequences = static_cast<int>(shape.chunks.size());
    a.num_heads = shape.num_heads;
    a.num_kv_heads = shape.num_kv_heads;
    a.head_dim = shape.head_dim;
    a.num_pages = num_pages;
    a.page_size = shape.page_size;
    a.max_pages = max_pages;
    a.pieces = pieces;
    return a;
  }

  template <class T>
  static emulation::Region region(const char* name, const std::vector<T>& data, bool writable = false,
                                  bool dependent = false) {
    return {name, reinterpret_cast<const char*>(data.data()), static_cast<int64_t>(data.size() * sizeof(T)), writable,
            dependent};
  }

  // Decode and combine may read what the kernels before them write, but not before dependency_wait.
  std::vector<emulation::Region> regions(bool combine = false) const {
    const auto dependent = [&](const char* name, const auto& data) { return region(name, data, false, decode); };
    return {dependent("q", q),
            dependent("k", k_cache),
            dependent("v", v_cache),
            dependent("tables", tables),
            dependent("query_start", query_start),
            dependent("contexts", shape.contexts),
            dependent("positions", positions),
            dependent("cos_sin", cos_sin),
            region("out", out, true),
            region("partial", partial, !combine, combine)};
  }

  std::vector<double> rotate(const Storage* head, int row) const {
    std::vector<double> result;
    const int rotary = shape.rotary_dim, half = rotary / 2;
    for (int i = 0; i < shape.head_dim; ++i) {
      double value = Number::widen(head[i]);
      if (i < rotary) {
        const Acc* table = cos_sin.data() + positions[row] * rotary;
        const double other = Number::widen(head[i < half ? i + half : i - half]);
        value = value * table[i % half] + (i < half ? -other : other) * table[half + i % half];
        if (sizeof(Storage) == 2) value = Number::widen(Number::narrow(static_cast<Acc>(value)));
      }
      result.push_back(value);
    }
    return result;
  }

  std::vector<double> expected() const {
    std::vector<double> result;
    const int group = shape.num_heads / shape.num_kv_heads;
    for (size_t s = 0; s < shape.chunks.size(); ++s) {
      for (int i = 0; i < shape.chunks[s]; ++i) {
        const int query = query_start[s] + i;
        const int limit = shape.contexts[s] ? shape.contexts[s] - shape.chunks[s] + i + 1 : 0;
        for (int head = 0; head < shape.num_heads; ++head) {
          const auto turned = rotate(q.data() + (int64_t{query} * shape.num_heads + head) * shape.head_dim, query);
          std::vector<double> sums(shape.head_dim);
          double weights = 0;
          for (int slot = 0; slot < limit; ++slot) {
            const int64_t from = at(s, slot) + int64_t{head / group} * shape.head_dim;
            double score = 0;
            for (int d = 0; d < shape.head_dim; ++d) score += turned[d] * Number::widen(k_cache[from + d]);
            const double weight = std::exp(0.3 * score);
            weights += weight;
            for (int d = 0; d < shape.head_dim; ++d) sums[d] += weight * Number::widen(v_cache[from + d]);
          }
          for (double sum : sums) result.push_back(limit ? sum / weights : 0);
        }
      }
    }
    return result;
  }

  double error() const {
    const auto want = expected();
    double error = 0, norm = 1e-300;
    for (size_t i = 0; i < want.size(); ++i) {
      error += std::pow(Number::widen(out[i]) - want[i], 2);
      norm += want[i] * want[i];
    }
    return std::sqrt(error / norm);
  }
};

template <class Half>
emulation::Report combine(Problem<Half>& problem, uint64_t seed, emulation::Sabotage sabotage) {
  const CudaAttentionArgs args = problem.args();
  return emulation::run({{args.num_queries, args.num_heads, 1}, kThreads, 0, seed, problem.regions(true), sabotage},
                        [&] { combine_body<Half>(args); });
}

template <class Number>
emulation::Report attend_plainly(Problem<Number>& problem, emulation::Sabotage sabotage = emulation::Sabotage::kNone) {
  const CudaAttentionArgs args = problem.args();
  return emulation::run(
      {{ceil_div(args.num_queries * args.num_heads, kWarps), 1, 1}, kThreads, 0, 1, problem.regions(), sabotage},
      [&] { plain_attention_body<Number>(args); });
}

template <class Half, int HEAD_DIM, int STAGES>
emulation::Report attend(Problem<Half>& problem, uint64_t seed = 1,
                         emulation::Sabotage sabotage = emulation::Sabotage::kNone) {
  const CudaAttentionArgs args = problem.args();
  using Shared = AttentionShared<HEAD_DIM, STAGES>;
  const int group = args.num_heads / args.num_kv_heads;
  if (!problem.decode) {
    const int tiles = args.num_queries * group / kMmaRows + args.num_sequences;
    return emulation::run({{ceil_div(tiles, kWarps), args.num_kv_heads, 1}, kThreads,
                           Shared::template bytes<true>(), seed, problem.regions(), sabotage},
                          [&] { prefill_attention_body<Half, HEAD_DIM, STAGES>(args); });
  }
  const int heads = args.num_kv_heads * ceil_div(group, kMmaRows);
  const emulation::Report report =
      emulation::run({{args.num_queries, heads, args.pieces}, kThreads, Shared::template bytes<false>(), seed,
                      problem.regions(), sabotage},
                     [&] { decode_attention_body<Half, HEAD_DIM, STAGES>(args); });
  if (!report.violation.empty() || args.pieces == 1) return report;
  emulation::Report merged = combine(problem, seed, sabotage);
  merged.regions = report.regions;
  return merged;
}

template <class Half, int HEAD_DIM, int STAGES>
void test_instance(const std::string& label, double tolerance) {
  const char* name = label.c_str();
  const std::vector<Shape> decodes = {
      {{1}, {1}, 8, 1, HEAD_DIM, 16, 0},
      {{1, 1, 1}, {33, 0, 17}, 8, 2, HEAD_DIM, 16, HEAD_DIM},
      {{1, 1}, {300, 64}, 4, 4, HEAD_DIM, 32, HEAD_DIM / 4 / 2 * 2},
      {{1}, {70}, 20, 1, HEAD_DIM, 7, 0},
  };
  for (const Shape& shape : decodes) {
    Problem<Half> problem(shape, true, 5);
    const emulation::Report report = attend<Half, HEAD_DIM, STAGES>(problem);
    EXPECT(report.violation.empty(), "%s decode: %s", name, report.violation.c_str());
    if (!report.violation.empty()) continue;
    EXPECT(problem.error() < tolerance, "%s decode, context %d: relative error %g", name, shape.contexts[0], problem.error());
    // Each key and value once per 16 query heads: the floor's accounting.
    int64_t slots = 0;
    for (int context : shape.contexts) slots += context;
    const int group = shape.num_heads / shape.num_kv_heads;
    const int64_t bytes = slots * shape.num_kv_heads * HEAD_DIM * 2 * ceil_div(group, 16);
    EXPECT(report.bytes_read("k") == bytes && report.bytes_read("v") == bytes, "%s", name);
  }
  const std::vector<Shape> prefills = {
      {{5}, {5}, 8, 1, HEAD_DIM, 16, 0},
      {{3, 0, 20}, {40, 9, 20}, 4, 2, HEAD_DIM, 16, HEAD_DIM},
      {{17, 1}, {17, 30}, 2, 2, HEAD_DIM, 64, HEAD_DIM / 4 / 2 * 2},
  };
  for (const Shape& shape : prefills) {
    Problem<Half> problem(shape, false, 6);
    const emulation::Report report = attend<Half, HEAD_DIM, STAGES>(problem);
    EXPECT(report.violation.empty(), "%s prefill: %s", name, report.violation.c_str());
    if (!report.violation.empty()) continue;
    EXPECT(problem.error() < tolerance, "%s prefill: relative error %g", name, problem.error());
    // Each tile of 16 query rows of a key/value head reads what the last of them sees, once.
    const int group = shape.num_heads / shape.num_kv_heads;
    int64_t slots = 0;
    for (size_t s = 0; s < shape.chunks.size(); ++s) {
      for (int end = 16, rows = shape.chunks[s] * group; end < rows + 16; end += 16) {
        slots += shape.contexts[s] - shape.chunks[s] + 1 + (std::min(end, rows) - 1) / group;
      }
    }
    const int64_t bytes = slots * shape.num_kv_heads * HEAD_DIM * 2;
    EXPECT(report.bytes_read("k") == bytes && report.bytes_read("v") == bytes, "%s prefill", name);
    EXPECT(report.bytes_written("out") == static_cast<int64_t>(problem.out.size()) * 2, "%s prefill", name);
  }
}

template <class Number>
void test_plain(const char* name, double tolerance) {
  const std::vector<std::pair<bool, Shape>> shapes = {
      {true, {{1, 1, 1}, {40, 0, 3}, 6, 2, 20, 5, 8}},
      {false, {{3, 4}, {10, 4}, 4, 1, 33, 16, 0}},
  };
  for (const auto& [decode, shape] : shapes) {
    Problem<Number> problem(shape, decode, 8);
    const emulation::Report report = attend_plainly(problem);
    EXPECT(report.violation.empty(), "%s: %s", name, report.violation.c_str());
    if (!report.violation.empty()) continue;
    EXPECT(problem.error() < tolerance, "%s: relative error %g", name, problem.error());
    // Every query head reads what it sees, once.
    int64_t slots = 0;
    for (size_t s = 0; s < shape.chunks.size(); ++s) {
      for (int i = 0; i < shape.chunks[s]; ++i) slots += std::max(0, shape.contexts[s] - shape.chunks[s] + i + 1);
    }
    const int64_t bytes = slots * shape.num_heads * shape.head_dim * static_cast<int64_t>(sizeof(typename Number::Storage));
    EXPECT(report.bytes_read("k") == bytes && report.bytes_read("v") == bytes, "%s", name);
  }
}

template <class Number>
void test_write(const char* name) {
  const Shape shape{{1, 1, 1}, {4, 4, 4}, 2, 2, 24, 4, 16};
  Problem<Number> problem(shape, true, 9);
  using Storage = typename Number::Storage;
  std::vector<Storage> k_cache(problem.k_cache.size(), Number::narrow(NAN)), v_cache = k_cache;
  const std::vector<int64_t> slots = {9, -1, 2};
  const std::vector<Storage> v = problem.q;
  const auto write = [&](emulation::Sabotage sabotage) {
    return emulation::run(
        {{3, 1, 1}, kThreads, 0, 1,
         {problem.region("k", problem.q, false, true), problem.region("v", v, false, true),
          problem.region("positions", problem.positions, false, true), problem.region("cos_sin", problem.cos_sin),
          problem.region("slots", slots, false, true), problem.region("k_cache", k_cache, true),
          problem.region("v_cache", v_cache, true)},
         sabotage},
        [&] {
          write_body<Number>({problem.q.data(), v.data(), 48, 24, 48, 24, k_cache.data(), v_cache.data(), slots.data(),
                              static_cast<int64_t>(k_cache.size()) / 48, problem.rope(), 2, 24});
        });
  };
  const emulation::Report report = write(emulation::Sabotage::kNone);
  EXPECT(report.violation.empty(), "%s: %s", name, report.violation.c_str());
  // Two rows of 48, once; an element that is rotated needs another one, which is in the first-level cache.
  const int64_t bytes = 2 * 48 * static_cast<int64_t>(sizeof(Storage));
  EXPECT(report.bytes_read("k") == bytes / 24 * (24 + 16) && report.bytes_read("v") == bytes, "%s", name);
  EXPECT(report.bytes_written("k_cache") == bytes && report.bytes_written("v_cache") == bytes, "%s", name);
  const std::string early = write(emulation::Sabotage::kSkipDependencyWait).violation;
  EXPECT(early.find("before dependency_wait") != std::string::npos, "%s: found '%s'", name, early.c_str());
  for (int64_t slot = 0; slot < 10; ++slot) {
    const int row = slot == 9 ? 0 : slot == 2 ? 2 : -1;
    for (int i = 0; i < 48; ++i) {
      const double key = Number::widen(k_cache[slot * 48 + i]), value = Number::widen(v_cache[slot * 48 + i]);
      if (row < 0) {
        EXPECT(std::isnan(key) && std::isnan(value), "%s: slot %d is written", name, static_cast<int>(slot));
      } else {
        const Storage* head = problem.q.data() + row * 48 + i / 24 * 24;
        EXPECT(std::fabs(key - problem.rotate(head, row)[i % 24]) < 0.02 && value == Number::widen(head[i % 24]), "%s", name);
      }
    }
  }
}

// A row's bits are its own: alone, and beside others with longer contexts (hence other tables).
void test_row_independence() {
  const Shape shape{{1, 1, 1}, {530, 31, 300}, 8, 2, 64, 16, 64};
  Problem<device::BFloat16> whole(shape, true, 4);
  attend<device::BFloat16, 64, 4>(whole);
  const int width = shape.num_heads * shape.head_dim;
  for (int row = 0; row < 3; ++row) {
    Problem<device::BFloat16> alone = whole;
    alone.shape.chunks = {1};
    alone.shape.contexts = {shape.contexts[row]};
    alone.num_queries = 1;
    alone.max_pages = ceil_div(shape.contexts[row], 16);
    alone.pieces = ceil_div(alone.max_pages * 16, kCudaSplitSlots);
    const auto first = whole.tables.begin() + row * whole.max_pages;
    alone.tables.assign(first, first + alone.max_pages);
    alone.positions = {whole.positions[row]};
    alone.q.assign(whole.q.begin() + row * width, whole.q.begin() + (row + 1) * width);
    alone.out.resize(width);
    attend<device::BFloat16, 64, 4>(alone, 77);
    EXPECT(std::memcmp(alone.out.data(), whole.out.data() + row * width, width * 2) == 0, "row %d", row);
  }
}

void test_faults_are_noticed() {
  using emulation::Sabotage;
  const struct {
    bool decode;
    Sabotage sabotage;
    const char* report;  // empty: only the numbers tell
  } faults[] = {{true, Sabotage::kSkipBarrier, "race"},
                {true, Sabotage::kSkipWarpBarrier, "race"},
                {true, Sabotage::kSkipCopyWait, "before the copy"},
                {true, Sabotage::kSkipDependencyWait, "before dependency_wait"},
                {true, Sabotage::kWrongLaneMap, ""},
                {true, Sabotage::kWrongRows, ""},
                {false, Sabotage::kSkipWarpBarrier, "race"},
                {false, Sabotage::kSkipCopyWait, "before the copy"},
                {false, Sabotage::kWrongLaneMap, ""},
                {false, Sabotage::kWrongRows, ""}};
  for (const auto& fault : faults) {
    const Shape decode{{1}, {520}, 8, 1, 64, 16, 0}, prefill{{5}, {130}, 8, 1, 64, 16, 0};
    Problem<device::BFloat16> problem(fault.decode ? decode : prefill, fault.decode, 3);
    const std::string violation = attend<device::BFloat16, 64, 3>(problem, 1, fault.sabotage).violation;
    if (*fault.report) {
      EXPECT(violation.find(fault.report) != std::string::npos, "expected '%s', found '%s'", fault.report, violation.c_str());
    } else {
      EXPECT(violation.empty() && problem.error() > 0.1, "found '%s'", violation.c_str());
    }
  }
  // Combine and the plain kernel have nothing but their dependence to get wrong.
  Problem<device::BFloat16> problem({{1}, {520}, 8, 1, 64, 16, 0}, true, 3);
  attend<device::BFloat16, 64, 3>(problem);
  for (const std::string& violation : {combine(problem, 1, Sabotage::kSkipDependencyWait).violation,
                                       attend_plainly(problem, Sabotage::kSkipDependencyWait).violation}) {
    EXPECT(violation.find("before dependency_wait") != std::string::npos, "found '%s'", violation.c_str());
  }
}

// Of one piece, of several, and of none.
void test_a_context_longer_than_its_table_makes_nan() {
  for (int max_pages : {3, 20, 0}) {
    Problem<device::BFloat16> problem({{1, 1}, {16 * max_pages, 0}, 8, 1, 64, 16, 0}, true, 3);
    problem.max_pages = max_pages;
    problem.shape.contexts[0] = 5000;
    const emulation::Report report = attend<device::BFloat16, 64, 3>(problem);
    EXPECT(report.violation.empty(), "%s", report.violation.c_str());
    for (int i = 0; i < 2 * 8 * 64; ++i) {
      const float value = device::BFloat16::widen(problem.out[i]);
      EXPECT(i < 8 * 64 ? std::isnan(value) : value == 0, "%d pages, element %d", max_pages, i);
    }
  }
}

void test_a_page_that_is_not_there_makes_nan() {
  Problem<device::BFloat16> problem({{1, 1}, {40, 40}, 8, 1, 64, 16, 0}, true, 3);
  problem.tables[1] = problem.num_pages;
  const emulation::Report report = attend<device::BFloat16, 64, 3>(problem);
  EXPECT(report.violation.empty(), "%s", report.violation.c_str());
  for (int i = 0; i < 2 * 8 * 64; ++i) {
    EXPECT(std::isnan(device::BFloat16::widen(problem.out[i])) == (i < 8 * 64), "element %d", i);
  }
}

}  // namespace

int main() {
  for_each_type(AttentionInstances{}, [](auto instance) {
    using Shared = decltype(instance);
    const std::string head_dim = std::to_string(Shared::kHeadDim);
    test_instance<device::BFloat16, Shared::kHeadDim, Shared::kStages>("bf16 " + head_dim, 6e-3);
    test_instance<device::Float16, Shared::kHeadDim, Shared::kStages>("fp16 " + head_dim, 1e-3);
  });
  test_plain<device::Float32>("fp32 plain", 1e-5);
  test_plain<device::Float64>("fp64 plain", 1e-12);
  test_plain<device::BFloat16>("bf16 plain", 6e-3);
  test_plain<device::Float16>("fp16 plain", 1e-3);
  test_write<device::Float32>("fp32 write");
  test_write<device::BFloat16>("bf16 write");
  test_row_independence();
  test_faults_are_noticed();
  test_a_page_that_is_not_there_makes_nan();
  test_a_context_longer_than_its_table_makes_nan();
  std::printf(failures ? "%d failures\n" : "ok\n", failures);
  return failures != 0;
}
