// The CPU kernels of causal attention through launch.h, against sums in double.
#include <cmath>
#include <vector>

#include "attention/launch.h"
#include "kernels.h"

using namespace rrt;
using namespace rrt::attention;
using namespace rrt::tests;

namespace {

Dtype accumulation(Dtype dtype) { return dtype == Dtype::kFloat64 ? Dtype::kFloat64 : Dtype::kFloat32; }

// [batch, length, heads, head_dim] with gaps between heads; no memory lies behind the last element.
struct Input {
  Input(const Shape& s, int64_t num_heads, Random& random)
      : head_stride(s.head_dim + between(random, 0, 3)),
        token_stride(num_heads * head_stride + between(random, 0, 5)),
        batch_stride(s.length * token_stride),
        values(s.dtype, (s.batch - 1) * batch_stride + (s.length - 1) * token_stride + (num_heads - 1) * head_stride +
                            s.head_dim,
               random) {}
  View view() const { return {values.data(), batch_stride, token_stride, head_stride}; }
  double at(int64_t b, int64_t t, int64_t h, int64_t i) const {
    return values[b * batch_stride + t * token_stride + h * head_stride + i];
  }

  int64_t head_stride, token_stride, batch_stride;
  Array values;
};

int64_t dense(const Shape& s, int64_t heads, int64_t b, int64_t t, int64_t h, int64_t i) {
  return ((b * s.length + t) * heads + h) * s.head_dim + i;
}

bool sees(const Shape& s, int64_t b, int64_t query, int64_t key) {
  return s.seen_until == nullptr || key == query || query < s.seen_until[b * s.length + key];
}

void check(const Shape& s, Random& random) {
  const Input q(s, s.num_heads, random), k(s, s.num_kv_heads, random), v(s, s.num_kv_heads, random);
  const Input out_grad(s, s.num_heads, random);
  const int64_t q_size = s.batch * s.length * s.num_heads * s.head_dim;
  const int64_t kv_size = s.batch * s.length * s.num_kv_heads * s.head_dim;
  Array out(s.dtype, q_size), lse(accumulation(s.dtype), s.batch * s.num_heads * s.length);
  forward_cpu({s, q.view(), k.view(), v.view(), out.data(), lse.data()}, run_threaded);
  Array q_grad(s.dtype, q_size), k_grad(s.dtype, kv_size), v_grad(s.dtype, kv_size);
  const int64_t token_stride = s.num_heads * s.head_dim;
  const View out_view{out.data(), s.length * token_stride, token_stride, s.head_dim};
  backward_cpu({s, out_grad.view(), q.view(), k.view(), v.view(), out_view, lse.data(), q_grad.data(), k_grad.data(),
                v_grad.data()},
               run_threaded);

  std::vector<double> wanted_k(kv_size), wanted_v(kv_size);
  RelativeError out_error, lse_error, q_error, k_error, v_error;
  for (int64_t b = 0; b < s.batch; ++b) {
    for (int64_t h = 0; h < s.num_heads; ++h) {
      const int64_t kv = h / (s.num_heads / s.num_kv_heads);
      for (int64_t t = 0; t < s.length; ++t) {
        std::vector<double> p(t + 1), p_grad(t + 1);
        double sum = 0, delta = 0;
        for (int64_t j = 0; j <= t; ++j) {
          for (int64_t i = 0; i < s.head_dim; ++i) {
            p[j] += q.at(b, t, h, i) * k.at(b, j, kv, i) * s.scale;
            p_grad[j] += out_grad.at(b, t, h, i) * v.at(b, j, kv, i);
          }
          sum += p[j] = sees(s, b, t, j) ? std::exp(p[j]) : 0;
        }
        lse_error.add(lse[(b * s.num_heads + h) * s.length + t], std::log(sum));
        for (int64_t j = 0; j <= t; ++j) delta += (p[j] /= sum) * p_grad[j];
        for (int64_t i = 0; i < s.head_dim; ++i) {
          double wanted = 0, wanted_q = 0;
          for (int64_t j = 0; j <= t; ++j) {
            const double slope = p[j] * (p_grad[j] - delta) * s.scale;
            wanted += p[j] * v.at(b, j, kv, i);
            wanted_q += slope * k.at(b, j, kv, i);
            wanted_k[dense(s, s.num_kv_heads, b, j, kv, i)] += slope * q.at(b, t, h, i);
            wanted_v[dense(s, s.num_kv_heads, b, j, kv, i)] += p[j] * out_grad.at(b, t, h, i);
          }
          out_error.add(out[dense(s, s.num_heads, b, t, h, i)], wanted);
          q_error.add(q_grad[dense(s, s.num_heads, b, t, h, i)], wanted_q);
        }
      }
    }
  }
  for (int64_t i = 0; i < kv_size; ++i) {
    k_error.add(k_grad[i], wanted_k[i]);
    v_error.add(v_grad[i], wanted_v[i]);
  }
  const bool rounded = s.dtype != accumulation(s.dtype);  // the results of what is summed
  const double wide = 8 * epsilon(accumulation(s.dtype)), bound = rounded ? 2 * epsilon(s.dtype) : 4 * wide;
  CHECK(out_error.below(rounded ? epsilon(s.dtype) : wide));
  CHECK(v_error.below(bound));
  if (s.length == 1) return;  // A token that sees itself alone: its scores' logarithm may be 0, their gradient is.
  CHECK(lse_error.below(wide));
  CHECK(q_error.below(bound));
  CHECK(k_error.below(bound));
}

void results_and_gradients_are_those_of_the_definition() {
  Random random(1);
  const Shape shapes[] = {
      {{}, 1, 1, 1, 1, 8, 1.0},    {{}, 2, 5, 2, 2, 64, 0.125}, {{}, 1, 64, 4, 2, 33, 0.2},
      {{}, 2, 65, 3, 1, 16, 0.25}, {{}, 1, 130, 2, 2, 80, 0.1}, {{}, 1, 200, 2, 1, 7, -0.5},
      {{}, 1, 70, 16, 1, 32, 0.2},
  };
  for (Shape shape : shapes) {
    for (Dtype dtype : kDtypes) {
      const int before = failures;
      shape.dtype = dtype;
      check(shape, random);
      if (failures > before) {
        std::cerr << "  length " << shape.length << " head_dim " << shape.head_dim << " dtype "
                  << static_cast<int>(dtype) << '\n';
      }
    }
  }
}

void tokens_see_only_their_own_text_where_texts_share_a_row() {
  Random random(3);
  for (Shape shape : {Shape{{}, 2, 150, 2, 1, 64, 0.15}, Shape{{}, 1, 330, 2, 1, 20, 0.2}, Shape{{}, 1, 200, 2, 2, 16, 0.2},
                      Shape{{}, 1, 130, 4, 1, 24, 0.2}}) {
    std::vector<int32_t> seen_until(shape.batch * shape.length);
    for (int64_t b = 0; b < shape.batch; ++b) {
      for (int64_t t = 0; t < shape.length; ++t) {
        // Texts of 30 tokens after a beginning that ends inside of a tile, or none; in the middle, two share 12;
        // the last tokens see the beginning and themselves.
        const int64_t beginning = b == 0 ? 10 : 0, place = t - beginning, text = beginning + place / 30 * 30;
        const bool middle = place / 30 == 2, shared = place % 30 < 12, alone = t >= shape.length - 5;
        int64_t until = place < 0 ? shape.length : alone ? 0 : text + (middle && !shared && place % 30 < 21 ? 21 : 30);
        seen_until[b * shape.length + t] = static_cast<int32_t>(until);
      }
    }
    shape.seen_until = seen_until.data();
    for (Dtype dtype : kDtypes) {
      shape.dtype = dtype;
      check(shape, random);
    }
  }
}

void threads_change_no_bit() {
  Random random(2);
  const Shape s{Dtype::kFloat32, 2, 150, 6, 2, 40, 0.2};
  const Input q(s, s.num_heads, random), k(s, s.num_kv_heads, random), v(s, s.num_kv_heads, random);
  const int64_t q_size = s.batch * s.length * s.num_heads * s.head_dim;
  const int64_t kv_size = s.batch * s.length * s.num_kv_heads * s.head_dim, rows = s.batch * s.num_heads * s.length;
  std::vector<Array> first;
  for (ParallelFor parallel_for : {run_serially, run_threaded}) {
    Array out(s.dtype, q_size), lse(s.dtype, rows);
    Array q_grad(s.dtype, q_size), k_grad(s.dtype, kv_size), v_grad(s.dtype, kv_size);
    forward_cpu({s, q.view(), k.view(), v.view(), out.data(), lse.data()}, parallel_for);
    const View view{out.data(), s.length * s.num_heads * s.head_dim, s.num_heads * s.head_dim, s.head_dim};
    backward_cpu({s, q.view(), q.view(), k.view(), v.view(), view, lse.data(), q_grad.data(), k_grad.data(),
                  v_grad.data()},
                 parallel_for);
    std::vector<Array> results;
    for (Array* result : {&out, &lse, &q_grad, &k_grad, &v_grad}) results.push_back(std::move(*result));
    for (size_t i = 0; i < first.size(); ++i) CHECK(results[i].same_bits(0, first[i], 0, first[i].size()));
    if (first.empty()) first = std::move(results);
  }
}

void nothing_is_computed_of_nothing() {
  for (const Shape& s : {Shape{Dtype::kFloat32, 0, 4, 2, 1, 8, 1.0}, Shape{Dtype::kFloat32, 2, 0, 2, 1, 8, 1.0},
                         Shape{Dtype::kFloat32, 2, 4, 0, 0, 8, 1.0}}) {
    forward_cpu({s, {}, {}, {}, nullptr, nullptr}, run_threaded);
    backward_cpu({s, {}, {}, {}, {}, {}, nullptr, nullptr, nullptr, nullptr}, run_threaded);
  }
}

}  // namespace

int main() {
  if (lacks_instruction_set()) return kSkipped;
  return run(results_and_gradients_are_those_of_the_definition, tokens_see_only_their_own_text_where_texts_share_a_row,
             threads_change_no_bit, nothing_is_computed_of_nothing);
}
