// The CUDA kernels of the key/value operators under emulation, against sums in double; see
// emulation/device/primitives.h.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <set>
#include <string>
#include <type_traits>
#include <vector>

#include "kv_cache/cuda_decode_attention.h"
#include "kv_cache/cuda_plain.h"
#include "kv_cache/cuda_prefill_attention.h"

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
  bool scalar_queries = false;  // loaded element by element, as if they were not aligned
  int first_wave = INT32_MAX;
  bool honest_hints = false;
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
    pieces = static_cast<int>(most_pieces(max_pages * s.page_size));
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
    // The kernels store vectors at 16-byte addresses, which of float the allocator gives.
    partial.assign(int64_t{num_queries} * s.num_heads * pieces * (s.head_dim + kPartialEnds), NAN);
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
    a.group = make_divisor(shape.num_heads / shape.num_kv_heads);
    a.page_size = make_divisor(shape.page_size);
    a.num_pages = num_pages;
    a.max_pages = max_pages;
    a.pieces = pieces;
    a.vector_queries = !scalar_queries && has_vector_queries(a);
    a.head_tiles = make_divisor(ceil_div(a.group.value, kMmaRows));
    a.first_wave = first_wave;
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

template <int HEAD_DIM, int AT_ONCE, class Half>
emulation::Report combine(Problem<Half>& problem, uint64_t seed, emulation::Sabotage sabotage) {
  const CudaAttentionArgs args = problem.args();
  return emulation::run({{args.num_queries, args.num_heads, 1}, kCombineThreads<HEAD_DIM>, 0, seed,
                         problem.regions(true), sabotage},
                        [&] { combine_body<Half, HEAD_DIM, AT_ONCE>(args); });
}

template <class Number>
emulation::Report attend_plainly(Problem<Number>& problem, emulation::Sabotage sabotage = emulation::Sabotage::kNone) {
  const CudaAttentionArgs args = problem.args();
  return emulation::run(
      {{ceil_div(args.num_queries * args.num_heads, kWarps), 1, 1}, kThreads, 0, 1, problem.regions(), sabotage},
      [&] { plain_attention_body<Number>(args); });
}

template <class Half, class Decode>
emulation::Report attend(Problem<Half>& problem, uint64_t seed = 1,
                         emulation::Sabotage sabotage = emulation::Sabotage::kNone) {
  const CudaAttentionArgs args = problem.args();
  const int heads = args.num_kv_heads * ceil_div(args.group.value, kMmaRows);
  const emulation::Report report = emulation::run(
      {{args.num_queries, heads, args.pieces}, kThreads, Decode::kBytes, seed, problem.regions(), sabotage,
       problem.honest_hints},
      [&] { decode_attention_body<Half, Decode::kHeadDim, Decode::kStages>(args); });
  if (!report.violation.empty() || args.pieces == 1) return report;
  EXPECT(!combines_many(args.pieces), "no test is of so many");
  emulation::Report merged = combine<Decode::kHeadDim, kFewPieces>(problem, seed, sabotage);
  EXPECT(merged.early_dependents || !merged.violation.empty(), "combine lets the next kernel start late");
  merged.regions = report.regions;
  return merged;
}

template <class Half, class Prefill>
emulation::Report prefill(Problem<Half>& problem, uint64_t seed = 1,
                          emulation::Sabotage sabotage = emulation::Sabotage::kNone) {
  CudaAttentionArgs args = problem.args();
  args.tiles = Prefill::tiles(args);
  return emulation::run(
      {{args.tiles, args.num_kv_heads, 1}, Prefill::kPrefillThreads, Prefill::kBytes, seed, problem.regions(),
       sabotage},
      [&] {
        prefill_attention_body<Half, Prefill::kHeadDim, Prefill::kPrefillWarps, Prefill::kRowTiles, Prefill::kSlots,
                               Prefill::kStages>(args);
      });
}

template <class Half, class Decode>
void test_decode(const std::string& label, double tolerance) {
  const char* name = label.c_str();
  constexpr int kHeadDim = Decode::kHeadDim;
  const std::vector<Shape> shapes = {
      {{1}, {1}, 8, 1, kHeadDim, 16, 0},
      {{1, 1, 1}, {33, 0, 17}, 8, 2, kHeadDim, 16, kHeadDim},
      {{1, 1}, {300, 64}, 4, 4, kHeadDim, 32, kHeadDim / 4 / 2 * 2},
      {{1}, {70}, 20, 1, kHeadDim, 7, 0},             // two tiles of query heads, pages of any size
      {{1}, {300}, 40, 2, kHeadDim, 16, 0},           // the same of two key/value heads, in pieces
      {{1, 1}, {255, 257}, 9, 3, kHeadDim, 48, 16},   // contexts that end before and after a piece does
      {{1, 1}, {2048, 2081}, 2, 2, kHeadDim, 64, 0},  // the longest of short pieces, and one of long ones
  };
  for (const bool scalar_queries : {false, true}) {
    for (const Shape& shape : shapes) {
      if (scalar_queries && shape.rotary_dim == 0) continue;
      Problem<Half> problem(shape, true, 5);
      problem.scalar_queries = scalar_queries;
      const emulation::Report report = attend<Half, Decode>(problem);
      EXPECT(report.violation.empty(), "%s decode: %s", name, report.violation.c_str());
      if (!report.violation.empty()) continue;
      EXPECT(problem.error() < tolerance, "%s decode, context %d: relative error %g", name, shape.contexts[0],
             problem.error());
      // Each key and value once per 16 query heads: the floor's accounting.
      int64_t slots = 0;
      for (int context : shape.contexts) slots += context;
      const int group = shape.num_heads / shape.num_kv_heads;
      const int64_t bytes = slots * shape.num_kv_heads * kHeadDim * 2 * ceil_div(group, 16);
      EXPECT(report.bytes_read("k") == bytes && report.bytes_read("v") == bytes, "%s", name);
      // By hints, of which the emulation makes most wrong.
      if (shape.contexts[0] > 200) EXPECT(!report.region("k").prefetched.empty(), "%s", name);
    }
  }
}

// The bytes of keys, and so of values, that a prefill reads if each tile of `tile_rows` query rows of a key/value head
// reads once what the last of them sees.
int64_t prefill_bytes(const Shape& shape, int tile_rows) {
  const int group = shape.num_heads / shape.num_kv_heads;
  int64_t slots = 0;
  for (size_t s = 0; s < shape.chunks.size(); ++s) {
    for (int end = tile_rows, rows = shape.chunks[s] * group; end < rows + tile_rows; end += tile_rows) {
      slots += shape.contexts[s] - shape.chunks[s] + 1 + (std::min(end, rows) - 1) / group;
    }
  }
  return slots * shape.num_kv_heads * shape.head_dim * 2;
}

template <class Half, class Prefill>
void test_prefill(const std::string& label, double tolerance) {
  const char* name = label.c_str();
  constexpr int kHeadDim = Prefill::kHeadDim;
  const std::vector<Shape> shapes = {
      {{5}, {5}, 8, 1, kHeadDim, 16, 0},
      {{3, 0, 20}, {40, 9, 20}, 4, 2, kHeadDim, 16, kHeadDim},
      {{17, 1}, {17, 30}, 2, 2, kHeadDim, 64, kHeadDim / 4 / 2 * 2},
      {{50}, {131}, 9, 3, kHeadDim, 7, 16},  // tiles that end within a token's heads, an odd number of pages and turns
  };
  for (const Shape& shape : shapes) {
    Problem<Half> problem(shape, false, 6);
    const emulation::Report report = prefill<Half, Prefill>(problem);
    EXPECT(report.violation.empty(), "%s prefill: %s", name, report.violation.c_str());
    if (!report.violation.empty()) continue;
    EXPECT(problem.error() < tolerance, "%s prefill: relative error %g", name, problem.error());
    const int64_t bytes = prefill_bytes(shape, Prefill::kRows);
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
  EXPECT(report.early_dependents, "%s", name);
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

using device::BFloat16;
using SmallDecode = DecodeShared<64, 4>;
using SmallPrefill = PrefillShared<64, 4, 2, 64, 4>;

// Before it waits, a block of the first wave asks for its share of what all heads have at the first turn's slots: all
// of them together for all of that, each byte once. With pages of 24 slots, what lies on the second of two is left out.
void test_hints_cover_the_first_turn_once() {
  const struct {
    int num_heads, num_kv_heads, page_size, context;
  } cases[] = {{8, 4, 16, 2048}, {8, 4, 24, 2048}, {8, 4, 16, 2081}, {40, 2, 16, 300}};
  for (const auto& each : cases) {
    Problem<BFloat16> problem({{1, 1}, {each.context, 61}, each.num_heads, each.num_kv_heads, 64, each.page_size, 0},
                              true, 5);
    problem.honest_hints = true;
    constexpr int kVector = 16;
    const int blocks_of_piece = 2 * each.num_kv_heads * ceil_div(each.num_heads / each.num_kv_heads, kMmaRows);
    for (const int hinted_pieces : {0, 1, 2, INT32_MAX / 16}) {
      problem.first_wave = hinted_pieces * blocks_of_piece;
      const emulation::Report report = attend<BFloat16, SmallDecode>(problem);
      EXPECT(report.violation.empty(), "%s", report.violation.c_str());
      std::vector<int> expected(problem.k_cache.size() * 2 / kVector);
      for (size_t row = 0; row < 2; ++row) {
        const int context = problem.shape.contexts[row], piece = piece_slots(context);
        for (int slot = 0; slot < context; ++slot) {
          const int first_of_turn = slot / kMmaSlots * kMmaSlots;
          if (slot / piece >= hinted_pieces || slot % piece >= kTurnSlots) continue;
          if (slot / each.page_size != first_of_turn / each.page_size) continue;
          const int64_t begin = problem.at(row, slot) * 2 / kVector;
          for (int i = 0; i < each.num_kv_heads * 64 * 2 / kVector; ++i) ++expected[begin + i];
        }
      }
      for (const char* name : {"k", "v"}) {
        std::vector<int> times(expected.size());
        for (const auto& [begin, end] : report.region(name).prefetched) {
          for (int64_t at = begin; at < end; at += kVector) ++times[at / kVector];
        }
        EXPECT(times == expected, "%s, %d heads, pages of %d slots, context %d, %d pieces", name, each.num_heads,
               each.page_size, each.context, hinted_pieces);
      }
    }
  }
}

// Pieces are merged as a sum over all of them would be, with the same bits however many are loaded at once, alone and
// beside longer contexts.
void test_combine_merges_in_order() {
  constexpr int kHeads = 2, kHeadDim = 80, kStride = kHeadDim + kPartialEnds;
  const std::vector<int> contexts = {17000, 100, 0, 300, 1024, 1025, 2049, 4096, 4200, 8192, 8193, 8700, 10240, 10300};
  const Shape shape{std::vector<int>(contexts.size(), 1), contexts, kHeads, 1, kHeadDim, 256, 0};
  Problem<BFloat16> whole(shape, true, 4);
  std::mt19937_64 random(6);
  std::normal_distribution<float> normal;
  const int width = kHeads * kHeadDim;
  for (size_t row = 0; row < contexts.size(); ++row) {
    const int pieces = num_pieces(contexts[row]);
    for (int head = 0; pieces > 1 && head < kHeads; ++head) {
      for (int piece = 0; piece < pieces; ++piece) {
        float* to = whole.partial.data() + ((row * kHeads + head) * whole.pieces + piece) * kStride;
        for (int i = 0; i < kHeadDim; ++i) to[i] = normal(random);
        to[kHeadDim] = 4 * normal(random);
        to[kHeadDim + 1] = 1 + std::fabs(normal(random));
      }
    }
  }
  const auto merge = [&](Problem<BFloat16>& problem, auto at_once) {
    constexpr int kAtOnce = decltype(at_once)::value;
    const emulation::Report report = combine<kHeadDim, kAtOnce>(problem, 1, emulation::Sabotage::kNone);
    EXPECT(report.violation.empty(), "%s", report.violation.c_str());
    return problem.out;
  };
  using Few = std::integral_constant<int, kFewPieces>;
  using Many = std::integral_constant<int, kManyPieces>;
  const auto out = merge(whole, Few{});
  EXPECT(std::memcmp(merge(whole, Many{}).data(), out.data(), out.size() * 2) == 0, "many at once");
  for (size_t row = 0; row < contexts.size(); ++row) {
    const int pieces = num_pieces(contexts[row]);
    for (int head = 0; head < kHeads; ++head) {
      const float* partial = whole.partial.data() + (row * kHeads + head) * whole.pieces * kStride;
      double largest = -INFINITY, weights = 0;
      for (int piece = 0; piece < pieces; ++piece) {
        largest = std::max<double>(largest, partial[piece * kStride + kHeadDim]);
      }
      std::vector<double> sums(kHeadDim);
      for (int piece = 0; piece < pieces; ++piece) {
        const float* from = partial + piece * kStride;
        const double factor = std::exp2(from[kHeadDim] - largest);
        weights += factor * from[kHeadDim + 1];
        for (int i = 0; i < kHeadDim; ++i) sums[i] += factor * from[i];
      }
      for (int i = 0; i < kHeadDim; ++i) {
        const float found = BFloat16::widen(out[(row * kHeads + head) * kHeadDim + i]);
        // What is one piece has been written by decode.
        EXPECT(pieces > 1 ? std::fabs(found - sums[i] / weights) < 0.01 : std::isnan(found), "context %d: %g, %g",
               contexts[row], found, sums[i] / weights);
      }
    }
    if (pieces <= 1) continue;
    Problem<BFloat16> alone = whole;
    alone.shape.chunks = {1};
    alone.shape.contexts = {contexts[row]};
    alone.num_queries = 1;
    alone.max_pages = ceil_div(contexts[row], 256);
    alone.pieces = static_cast<int>(most_pieces(alone.max_pages * 256));
    alone.partial.assign(int64_t{kHeads} * alone.pieces * kStride, NAN);
    for (int head = 0; head < kHeads; ++head) {
      const auto from = whole.partial.begin() + (row * kHeads + head) * whole.pieces * kStride;
      std::copy(from, from + pieces * kStride, alone.partial.begin() + head * alone.pieces * kStride);
    }
    alone.out.assign(width, BFloat16::narrow(NAN));
    const auto own = combines_many(alone.pieces) ? merge(alone, Many{}) : merge(alone, Few{});
    EXPECT(std::memcmp(own.data(), out.data() + row * width, width * 2) == 0, "context %d alone", contexts[row]);
  }
}

// A row's bits are its own: alone, and beside others with longer contexts (hence other tables).
void test_decode_rows_are_independent() {
  const Shape shape{{1, 1, 1}, {2100, 31, 300}, 8, 2, 64, 16, 64};
  Problem<BFloat16> whole(shape, true, 4);
  attend<BFloat16, SmallDecode>(whole);
  const int width = shape.num_heads * shape.head_dim;
  for (int row = 0; row < 3; ++row) {
    Problem<BFloat16> alone = whole;
    alone.shape.chunks = {1};
    alone.shape.contexts = {shape.contexts[row]};
    alone.num_queries = 1;
    alone.max_pages = ceil_div(shape.contexts[row], 16);
    alone.pieces = static_cast<int>(most_pieces(alone.max_pages * 16));
    const auto first = whole.tables.begin() + row * whole.max_pages;
    alone.tables.assign(first, first + alone.max_pages);
    alone.positions = {whole.positions[row]};
    alone.q.assign(whole.q.begin() + row * width, whole.q.begin() + (row + 1) * width);
    alone.out.resize(width);
    attend<BFloat16, SmallDecode>(alone, 77);
    EXPECT(std::memcmp(alone.out.data(), whole.out.data() + row * width, width * 2) == 0, "row %d", row);
  }
}

// A prompt's rows have the same bits however it is cut into chunks, whose tiles begin at other rows.
void test_prefill_rows_are_independent() {
  const Shape shape{{90}, {200}, 6, 2, 64, 16, 64};
  Problem<BFloat16> whole(shape, false, 4);
  prefill<BFloat16, SmallPrefill>(whole);
  const int width = shape.num_heads * shape.head_dim;
  for (const auto& [begin, end] : {std::pair{0, 1}, {1, 60}, {60, 90}}) {
    Problem<BFloat16> chunk = whole;
    chunk.shape.chunks = {end - begin};
    chunk.shape.contexts = {200 - 90 + end};
    chunk.num_queries = end - begin;
    chunk.query_start = {0, end - begin};
    chunk.positions.assign(whole.positions.begin() + begin, whole.positions.begin() + end);
    chunk.q.assign(whole.q.begin() + begin * width, whole.q.begin() + end * width);
    chunk.out.resize((end - begin) * width);
    prefill<BFloat16, SmallPrefill>(chunk, 77);
    EXPECT(std::memcmp(chunk.out.data(), whole.out.data() + begin * width, (end - begin) * width * 2) == 0,
           "chunk [%d, %d)", begin, end);
  }
}

// For every context that fits, there are as many pieces as it has.
void test_pieces_cover_every_context() {
  for (int room = 0; room < 6000; ++room) {
    int64_t most = 1;
    for (int context : {room, std::min(room, kMaxShortContext)}) {
      most = std::max<int64_t>(most, ceil_div(context, piece_slots(context)));
    }
    EXPECT(most_pieces(room) == most, "room %d", room);
  }
}

// All quotients are those of an integer division, up to the largest number.
void test_divisors() {
  std::mt19937_64 random(1);
  for (int64_t value : {1, 2, 3, 5, 7, 16, 20, 48, 64, 640, 1000, 65536, 999999937, INT32_MAX}) {
    const Divisor divisor = make_divisor(value);
    std::vector<int64_t> numbers = {0, 1, value - 1, value, 2 * value - 1, 2 * value, INT32_MAX / value * value - 1,
                                    INT32_MAX / value * value, INT32_MAX};
    for (int i = 0; i < 1000; ++i) numbers.push_back(static_cast<int64_t>(random() >> 33));
    for (int64_t number : numbers) {
      if (number < 0 || number > INT32_MAX) continue;
      const int n = static_cast<int>(number);
      EXPECT(divisor.divide(n) == number / value && divisor.remainder(n) == number % value, "%d / %d", n,
             divisor.value);
    }
  }
}

// ldmatrix reads eight rows' vectors at once, the merge of decode stores pairs of four rows and four columns.
template <int HEAD_DIM>
void test_rows_lie_in_different_banks() {
  std::set<int> vectors, pairs;
  for (int row = 0; row < 8; ++row) vectors.insert(row * kRowStride<HEAD_DIM> * 2 / 16 % 8);
  for (int lane = 0; lane < 16; ++lane) {
    pairs.insert((lane / 4 * DecodeShared<HEAD_DIM, 3>::kMergeStride + lane % 4 * 2) / 2 % 16);
  }
  EXPECT(kRowStride<HEAD_DIM> % 8 == 0 && vectors.size() == 8 && pairs.size() == 16, "head dim %d", HEAD_DIM);
}

void test_faults_are_noticed() {
  using emulation::Sabotage;
  const struct {
    bool decode;
    Sabotage sabotage;
    const char* report;  // empty: only the numbers tell
  } faults[] = {{true, Sabotage::kSkipBarrier, "race"},
                {true, Sabotage::kSkipWarpBarrier, "shared byte"},  // a race, or a copy of another thread
                {true, Sabotage::kSkipCopyWait, "before the copy"},
                {true, Sabotage::kSkipDependencyWait, "before dependency_wait"},
                {true, Sabotage::kWrongLaneMap, ""},
                {true, Sabotage::kWrongRows, ""},
                {false, Sabotage::kSkipBarrier, "shared byte"},
                {false, Sabotage::kSkipWarpBarrier, "race"},
                {false, Sabotage::kSkipCopyWait, "before the copy"},
                {false, Sabotage::kWrongLaneMap, ""},
                {false, Sabotage::kWrongRows, ""}};
  for (const auto& fault : faults) {
    const Shape decode{{1}, {520}, 8, 1, 64, 16, 0}, chunk{{5}, {330}, 8, 1, 64, 16, 0};
    Problem<BFloat16> problem(fault.decode ? decode : chunk, fault.decode, 3);
    const std::string violation = (fault.decode ? attend<BFloat16, SmallDecode> : prefill<BFloat16, SmallPrefill>)(
                                      problem, 1, fault.sabotage).violation;
    if (*fault.report) {
      EXPECT(violation.find(fault.report) != std::string::npos, "expected '%s', found '%s'", fault.report, violation.c_str());
    } else {
      EXPECT(violation.empty() && problem.error() > 0.1, "found '%s'", violation.c_str());
    }
  }
  Problem<BFloat16> problem({{1}, {520}, 8, 1, 64, 16, 0}, true, 3);
  attend<BFloat16, SmallDecode>(problem);
  for (const std::string& violation : {combine<64, kFewPieces>(problem, 1, Sabotage::kSkipDependencyWait).violation,
                                       attend_plainly(problem, Sabotage::kSkipDependencyWait).violation}) {
    EXPECT(violation.find("before dependency_wait") != std::string::npos, "found '%s'", violation.c_str());
  }
}

// Of one piece, of several, and of none.
void test_a_context_longer_than_its_table_makes_nan() {
  for (int max_pages : {3, 20, 0}) {
    Problem<BFloat16> problem({{1, 1}, {16 * max_pages, 0}, 8, 1, 64, 16, 0}, true, 3);
    problem.max_pages = max_pages;
    problem.shape.contexts[0] = 5000;
    const emulation::Report report = attend<BFloat16, SmallDecode>(problem);
    EXPECT(report.violation.empty(), "%s", report.violation.c_str());
    for (int i = 0; i < 2 * 8 * 64; ++i) {
      const float value = BFloat16::widen(problem.out[i]);
      EXPECT(i < 8 * 64 ? std::isnan(value) : value == 0, "%d pages, element %d", max_pages, i);
    }
  }
}

// In any of a warp's turns, of which two share a look-up: the first two of a short piece, all four of a long one.
void test_a_page_that_is_not_there_makes_nan() {
  const struct {
    int context, slot;
  } cases[] = {{40, 16}, {128, 64}, {128, 112}, {2100, 48}, {2100, 64}, {2100, 128}, {2100, 192}, {2100, 240}};
  for (const auto& each : cases) {
    Problem<BFloat16> problem({{1, 1}, {each.context, 40}, 8, 1, 64, 16, 0}, true, 3);
    problem.tables[each.slot / 16] = problem.num_pages;
    const emulation::Report report = attend<BFloat16, SmallDecode>(problem);
    EXPECT(report.violation.empty(), "%s", report.violation.c_str());
    for (int i = 0; i < 2 * 8 * 64; ++i) {
      EXPECT(std::isnan(BFloat16::widen(problem.out[i])) == (i < 8 * 64), "context %d, slot %d, element %d",
             each.context, each.slot, i);
    }
  }
}

// Only the rows that see one of its slots: here those of the last two tokens.
void test_a_page_that_is_not_there_makes_later_rows_nan() {
  Problem<BFloat16> problem({{10}, {58}, 8, 1, 64, 8, 0}, false, 3);
  problem.tables[7] = -1;
  const emulation::Report report = prefill<BFloat16, SmallPrefill>(problem);
  EXPECT(report.violation.empty(), "%s", report.violation.c_str());
  for (int i = 0; i < 10 * 8 * 64; ++i) {
    EXPECT(std::isnan(BFloat16::widen(problem.out[i])) == (i >= 8 * 8 * 64), "element %d", i);
  }
}

}  // namespace

int main() {
  for_each_type(DecodeInstances{}, [](auto decode) {
    using Decode = decltype(decode);
    const std::string head_dim = std::to_string(Decode::kHeadDim);
    test_decode<BFloat16, Decode>("bf16 " + head_dim, 6e-3);
    test_decode<device::Float16, Decode>("fp16 " + head_dim, 1e-3);
    test_rows_lie_in_different_banks<Decode::kHeadDim>();
  });
  for_each_type(PrefillInstances{}, [](auto prefill) {
    using Prefill = decltype(prefill);
    const std::string head_dim = std::to_string(Prefill::kHeadDim);
    test_prefill<BFloat16, Prefill>("bf16 " + head_dim, 6e-3);
    test_prefill<device::Float16, Prefill>("fp16 " + head_dim, 1e-3);
  });
  test_divisors();
  test_pieces_cover_every_context();
  test_plain<device::Float32>("fp32 plain", 1e-5);
  test_plain<device::Float64>("fp64 plain", 1e-12);
  test_plain<BFloat16>("bf16 plain", 6e-3);
  test_plain<device::Float16>("fp16 plain", 1e-3);
  test_write<device::Float32>("fp32 write");
  test_write<BFloat16>("bf16 write");
  test_hints_cover_the_first_turn_once();
  test_combine_merges_in_order();
  test_decode_rows_are_independent();
  test_prefill_rows_are_independent();
  test_faults_are_noticed();
  test_a_page_that_is_not_there_makes_nan();
  test_a_page_that_is_not_there_makes_later_rows_nan();
  test_a_context_longer_than_its_table_makes_nan();
  std::printf(failures ? "%d failures\n" : "ok\n", failures);
  return failures != 0;
}
