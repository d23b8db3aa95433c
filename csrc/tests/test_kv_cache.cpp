// The CPU kernels of the key/value operators through launch.h, against sums in double. Slots that no query may
// read hold NaN, and entries of block tables beyond a context hold no page.
#include <algorithm>
#include <limits>
#include <numeric>
#include <vector>

#include "kernels.h"
#include "kv_cache/launch.h"

using namespace rrt;
using namespace rrt::kv_cache;
using namespace rrt::tests;

namespace {

Dtype accumulation(Dtype dtype) { return dtype == Dtype::kFloat64 ? Dtype::kFloat64 : Dtype::kFloat32; }

struct Rotation {
  int64_t rotary_dim;  // 0: none
  Array cos_sin;       // any numbers will do
  std::vector<int32_t> positions;

  static constexpr int64_t kPositions = 11;
  Rotation(Dtype dtype, int64_t dim, int64_t rows, Random& random)
      : rotary_dim(dim), cos_sin(accumulation(dtype), kPositions * dim, random) {
    for (int64_t i = 0; i < rows; ++i) positions.push_back(static_cast<int32_t>(between(random, 0, kPositions - 1)));
  }

  Rope rope(int64_t first_row) const {
    return rotary_dim == 0 ? Rope{} : Rope{positions.data() + first_row, cos_sin.data(), rotary_dim};
  }

  // Element i of the head that begins at x[begin], turned.
  double turned(const Array& x, int64_t begin, int64_t row, int64_t i) const {
    if (i >= rotary_dim) return x[begin + i];
    const int64_t half = rotary_dim / 2, angle = i % half, table = positions[row] * rotary_dim;
    const double cos = cos_sin[table + angle], sin = cos_sin[table + half + angle];
    const double first = x[begin + angle], second = x[begin + half + angle];
    return i < half ? first * cos - second * sin : second * cos + first * sin;
  }
};

void rows_are_written_to_their_slots_and_nowhere_else() {
  Random random(1);
  for (Dtype dtype : kDtypes) {
    for (int64_t m : {0, 1, 7, 40}) {
      for (int64_t head_dim : {1, 6, 33, 64}) {
        for (int64_t rotary_dim : {int64_t{0}, head_dim / 4 * 2, head_dim / 2 * 2}) {
          const int64_t heads = between(random, 1, 3), num_slots = 60;
          const int64_t k_gap = between(random, 0, 2), v_gap = between(random, 0, 2);
          WriteParams p{};
          p.dtype = dtype;
          p.m = m;
          p.num_kv_heads = heads;
          p.head_dim = head_dim;
          p.k_head_stride = head_dim + k_gap;
          p.k_row_stride = heads * p.k_head_stride;
          p.v_row_stride = head_dim + v_gap;  // heads outermost
          p.v_head_stride = m * p.v_row_stride;
          const auto used = [&](int64_t row_stride, int64_t head_stride) {
            return m == 0 ? 0 : (m - 1) * row_stride + (heads - 1) * head_stride + head_dim;
          };
          const Array k(dtype, used(p.k_row_stride, p.k_head_stride), random);
          const Array v(dtype, used(p.v_row_stride, p.v_head_stride), random);
          Array k_cache(dtype, num_slots * heads * head_dim), v_cache(dtype, num_slots * heads * head_dim);
          std::vector<int64_t> slots(num_slots);
          std::iota(slots.begin(), slots.end(), 0);
          std::shuffle(slots.begin(), slots.end(), random);
          slots.resize(m);
          slots.shrink_to_fit();
          for (int64_t row = 3; row < m; row += 5) slots[row] = -1;
          const Rotation rotation(dtype, rotary_dim, m, random);
          p.k = k.data();
          p.v = v.data();
          p.k_cache = k_cache.data();
          p.v_cache = v_cache.data();
          p.slots = slots.data();
          p.rope = rotation.rope(0);
          write_cpu(p, run_threaded);

          std::vector<int64_t> row_of(num_slots, -1);
          for (int64_t row = 0; row < m; ++row) {
            if (slots[row] >= 0) row_of[slots[row]] = row;
          }
          RelativeError error;
          for (int64_t i = 0; i < num_slots * heads * head_dim; ++i) {
            const int64_t row = row_of[i / (heads * head_dim)], head = i / head_dim % heads, element = i % head_dim;
            if (row < 0) {
              CHECK(std::isnan(k_cache[i]) && std::isnan(v_cache[i]));
              continue;
            }
            CHECK_EQ(v_cache[i], v[row * p.v_row_stride + head * p.v_head_stride + element]);
            const int64_t from = row * p.k_row_stride + head * p.k_head_stride;
            if (element >= rotary_dim) {
              CHECK_EQ(k_cache[i], k[from + element]);
            } else {
              error.add(k_cache[i], rotation.turned(k, from, row, element));
            }
          }
          CHECK(error.below(epsilon(dtype)));
        }
      }
    }
  }
}

struct Batch {
  int64_t heads, kv_heads, head_dim, page_size, rotary_dim;
  bool decode;
  std::vector<int32_t> queries, contexts;  // per sequence
};

class Attention {
 public:
  Attention(const Batch& batch, Dtype dtype, Random& random)
      : batch_(batch),
        dtype_(dtype),
        num_queries_(std::accumulate(batch.queries.begin(), batch.queries.end(), int64_t{0})),
        q_stride_(batch.heads * batch.head_dim + 1),
        q_(dtype, num_queries_ == 0 ? 0 : num_queries_ * q_stride_ - 1, random),
        k_cache_(dtype, 0),
        v_cache_(dtype, 0),
        rotation_(dtype, batch.rotary_dim, num_queries_, random) {
    int64_t num_pages = 0;
    starts_ = {0};
    for (size_t s = 0; s < batch.contexts.size(); ++s) {
      const int64_t pages = ceil_div(batch.contexts[s], batch.page_size);
      num_pages += pages;
      max_pages_ = std::max(max_pages_, pages + static_cast<int64_t>(s % 2));
      starts_.push_back(starts_.back() + batch.queries[s]);
    }
    const int64_t slot_size = batch.kv_heads * batch.head_dim;
    k_cache_ = Array(dtype, num_pages * batch.page_size * slot_size);
    v_cache_ = Array(dtype, num_pages * batch.page_size * slot_size);
    std::vector<int32_t> pages(num_pages);
    std::iota(pages.begin(), pages.end(), 0);
    std::shuffle(pages.begin(), pages.end(), random);
    tables_.assign(batch.contexts.size() * max_pages_, std::numeric_limits<int32_t>::min());
    for (size_t s = 0; s < batch.contexts.size(); ++s) {
      for (int32_t position = 0; position < batch.contexts[s]; ++position) {
        int32_t& page = tables_[s * max_pages_ + position / batch.page_size];
        if (position % batch.page_size == 0) {
          page = pages.back();
          pages.pop_back();
        }
        const int64_t slot = slot_of(s, position);
        for (int64_t i = 0; i < slot_size; ++i) {
          write_random(random, dtype, k_cache_.at(slot * slot_size + i));
          write_random(random, dtype, v_cache_.at(slot * slot_size + i));
        }
      }
    }
  }

  void check() const {
    const int64_t num_sequences = static_cast<int64_t>(batch_.contexts.size());
    const int64_t row_size = batch_.heads * batch_.head_dim;
    const Array out = run(run_threaded, 0, num_sequences);
    RelativeError error;
    for (int64_t s = 0; s < num_sequences; ++s) {
      for (int32_t i = 0; i < batch_.queries[s]; ++i) {
        const int64_t visible = batch_.decode ? batch_.contexts[s] : batch_.contexts[s] - batch_.queries[s] + i + 1;
        for (int64_t head = 0; head < batch_.heads; ++head) {
          const std::vector<double> expected = attend(s, starts_[s] + i, visible, head);
          const int64_t at = (starts_[s] + i) * row_size + head * batch_.head_dim;
          for (int64_t d = 0; d < batch_.head_dim; ++d) error.add(out[at + d], expected[d]);
        }
      }
    }
    // Probabilities are rounded too, where the instruction set multiplies bfloat16.
    CHECK(error.below(4 * epsilon(dtype_)));
    CHECK(run(run_serially, 0, num_sequences).same_bits(0, out, 0, num_queries_ * row_size));
    for (int64_t s = 0; s < num_sequences; ++s) {
      const Array alone = run(run_serially, s, s + 1);
      CHECK(alone.same_bits(0, out, starts_[s] * row_size, batch_.queries[s] * row_size));
    }
  }

 private:
  int64_t slot_of(int64_t s, int64_t position) const {
    return tables_[s * max_pages_ + position / batch_.page_size] * batch_.page_size + position % batch_.page_size;
  }

  // Sequences [begin, end) as a batch of their own.
  Array run(ParallelFor parallel_for, int64_t begin, int64_t end) const {
    const int64_t first = starts_[begin];
    std::vector<int32_t> starts(starts_.begin() + begin, starts_.begin() + end + 1);
    for (int32_t& start : starts) start -= static_cast<int32_t>(first);
    const int64_t num_queries = starts.back();
    Array out(dtype_, num_queries * batch_.heads * batch_.head_dim, Aligned::kFresh);
    AttentionParams p{};
    p.dtype = dtype_;
    p.num_queries = num_queries;
    p.num_heads = batch_.heads;
    p.num_kv_heads = batch_.kv_heads;
    p.head_dim = batch_.head_dim;
    p.page_size = batch_.page_size;
    p.scale = scale();
    p.q_row_stride = q_stride_;
    p.q_head_stride = batch_.head_dim;
    p.q = q_.at(first * q_stride_);
    p.k_cache = k_cache_.data();
    p.v_cache = v_cache_.data();
    p.block_tables = tables_.data() + begin * max_pages_;
    p.table_stride = max_pages_;
    p.rope = rotation_.rope(first);
    p.out = out.data();
    attention_cpu(p,
                  plan_attention(batch_.decode ? nullptr : starts.data(), batch_.contexts.data() + begin, end - begin,
                                 batch_.heads / batch_.kv_heads),
                  parallel_for);
    return out;
  }

  double scale() const { return 1 / std::sqrt(static_cast<double>(batch_.head_dim)); }

  std::vector<double> attend(int64_t s, int64_t query, int64_t visible, int64_t head) const {
    const int64_t dim = batch_.head_dim, kv_head = head / (batch_.heads / batch_.kv_heads);
    std::vector<double> q(dim), scores(visible), out(dim, 0);
    for (int64_t d = 0; d < dim; ++d) q[d] = rotation_.turned(q_, query * q_stride_ + head * dim, query, d);
    double largest = -std::numeric_limits<double>::infinity(), sum = 0;
    for (int64_t slot = 0; slot < visible; ++slot) {
      const int64_t begin = (slot_of(s, slot) * batch_.kv_heads + kv_head) * dim;
      for (int64_t d = 0; d < dim; ++d) scores[slot] += q[d] * k_cache_[begin + d];
      largest = std::max(largest, scores[slot] *= scale());
    }
    for (int64_t slot = 0; slot < visible; ++slot) {
      const double weight = std::exp(scores[slot] - largest);
      sum += weight;
      const int64_t begin = (slot_of(s, slot) * batch_.kv_heads + kv_head) * dim;
      for (int64_t d = 0; d < dim; ++d) out[d] += weight * v_cache_[begin + d];
    }
    for (double& value : out) value /= visible > 0 ? sum : 1;
    return out;
  }

  Batch batch_;
  Dtype dtype_;
  int64_t num_queries_, q_stride_;
  Array q_, k_cache_, v_cache_;
  Rotation rotation_;
  int64_t max_pages_ = 0;
  std::vector<int32_t> tables_, starts_;
};

void queries_attend_to_their_own_contexts() {
  const std::vector<Batch> batches = {
      {1, 1, 1, 1, 0, true, {}, {}},
      {2, 1, 8, 4, 0, true, {1, 1}, {0, 0}},
      {8, 1, 64, 16, 64, true, {1, 1, 1}, {1, 300, 0}},
      {6, 2, 80, 16, 20, true, {1, 1, 1}, {63, 257, 64}},
      {3, 3, 5, 3, 4, true, {1, 1, 1, 1}, {1, 17, 0, 65}},
      {20, 1, 32, 32, 0, true, {1, 1}, {513, 40}},
      {130, 1, 16, 7, 16, true, {1, 1}, {70, 3}},
      {2, 2, 64, 16, 32, false, {3, 0, 70, 1}, {3, 9, 70, 300}},
      {8, 1, 33, 5, 0, false, {9, 4}, {12, 260}},
      {4, 2, 24, 64, 8, false, {37}, {290}},
      {1, 1, 7, 2, 2, false, {0, 2}, {0, 2}},
  };
  Random random(2);
  for (size_t i = 0; i < batches.size(); ++i) {
    for (Dtype dtype : kDtypes) {
      const int before = failures;
      Attention(batches[i], dtype, random).check();
      if (failures > before) std::cerr << "  batch " << i << " dtype " << static_cast<int>(dtype) << '\n';
    }
  }
}

}  // namespace

int main() {
  if (lacks_instruction_set()) return kSkipped;
  return run(rows_are_written_to_their_slots_and_nowhere_else, queries_attend_to_their_own_contexts);
}
