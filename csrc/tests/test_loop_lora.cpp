// The CPU kernels of loop_lora_linear through launch.h, against sums in double.
#include <algorithm>
#include <vector>

#include "kernels.h"
#include "loop_lora/launch.h"
#include "packing.h"

using namespace rrt;
using namespace rrt::loop_lora;
using namespace rrt::tests;

namespace {

enum class Bias { kNone, kShared, kPerLoop };

struct Shape {
  int64_t m, n, k, num_loops;
  std::vector<int64_t> segment_out, segment_rank;
  Bias bias = Bias::kNone;
  int64_t x_gap = 0;  // elements between the rows of x
};

// 200 rows make two blocks; sizes lie around the panels' 32, the chunks' 288 steps (of two columns
// in bfloat16) and the tiles' 5 and 12.
const std::vector<Shape> kShapes = {
    {0, 33, 17, 2, {33}, {3}},
    {1, 1, 1, 1, {1}, {1}},
    {1, 0, 5, 1, {0}, {2}},
    {2, 5, 0, 2, {5}, {3}, Bias::kShared},
    {2, 5, 0, 1, {5}, {0}, Bias::kShared},
    {3, 31, 127, 1, {31}, {0}, Bias::kShared},
    {4, 33, 64, 3, {33}, {33}, Bias::kPerLoop, 1},
    {5, 32, 128, 2, {32}, {32}, Bias::kNone, 3},
    {6, 64, 129, 8, {64}, {1}, Bias::kPerLoop},
    {12, 70, 257, 3, {41, 9, 20}, {5, 2, 0}, Bias::kShared, 2},
    {13, 65, 255, 2, {1, 0, 64}, {7, 3, 40}, Bias::kPerLoop},
    {17, 40, 40, 2, {40}, {260}},
    {29, 96, 31, 4, {50, 46}, {129, 31}, Bias::kNone, 1},
    {200, 35, 19, 3, {20, 15}, {4, 9}, Bias::kPerLoop},
    {3, 33, 287, 2, {33}, {289}},
    {14, 40, 289, 2, {40}, {288}, Bias::kShared},
    {2, 31, 577, 1, {31}, {5}},
    {4, 33, 40, 2, {33}, {577}},
    {13, 34, 1200, 2, {34}, {5}, Bias::kPerLoop, 1},
};

struct Problem {
  Shape shape;
  Dtype dtype;
  int64_t total_rank = 0, b_stride = 0;
  std::vector<int32_t> loops;
  Array x, weight, bias, lora_a, lora_b, packed_weight, packed_a, packed_b;
  std::vector<Segment> segments;

  static int64_t sum(const std::vector<int64_t>& values) {
    int64_t total = 0;
    for (int64_t value : values) total += value;
    return total;
  }
  static int64_t most(const std::vector<int64_t>& values) {
    int64_t most = 0;
    for (int64_t value : values) most = std::max(most, value);
    return most;
  }

  Problem(const Shape& s, Dtype d, Random& random)
      : shape(s),
        dtype(d),
        total_rank(sum(s.segment_rank)),
        b_stride(most(s.segment_rank)),
        x(d, s.m > 0 ? (s.m - 1) * (s.k + s.x_gap) + s.k : 0, random),
        weight(d, s.n * s.k, random),
        bias(d, s.bias == Bias::kPerLoop ? s.num_loops * s.n : s.n, random),
        lora_a(d, s.num_loops * total_rank * s.k, random),
        lora_b(d, s.num_loops * s.n * b_stride, random),
        packed_weight(pack(d, weight, 1, s.n, s.k)),
        packed_a(pack(d, lora_a, s.num_loops, total_rank, s.k)),
        packed_b(pack(d, lora_b, s.num_loops, s.n, b_stride)) {
    for (int64_t row = 0; row < s.m; ++row) loops.push_back(static_cast<int32_t>(between(random, 0, s.num_loops - 1)));
    int64_t out = 0, rank = 0;
    for (size_t i = 0; i < s.segment_out.size(); ++i) {
      segments.push_back({out, s.segment_out[i], rank, s.segment_rank[i]});
      out += s.segment_out[i];
      rank += s.segment_rank[i];
    }
  }

  // Rows [first, first + rows) as a batch of their own, for a result yet to be named.
  Params params(bool packed, int64_t first, int64_t rows) const {
    const int64_t stride = shape.k + shape.x_gap;
    Params params{};
    params.dtype = dtype;
    params.packed = packed;
    params.m = rows;
    params.n = shape.n;
    params.k = shape.k;
    params.num_loops = shape.num_loops;
    params.total_rank = total_rank;
    params.b_stride = b_stride;
    params.x_row_stride = stride;
    params.bias_loop_stride = shape.bias == Bias::kPerLoop ? shape.n : 0;
    params.x = x.at(first * stride);
    params.weight = packed ? packed_weight.data() : weight.data();
    params.bias = shape.bias == Bias::kNone ? nullptr : bias.data();
    params.lora_a = packed ? packed_a.data() : lora_a.data();
    params.lora_b = packed ? packed_b.data() : lora_b.data();
    params.segments = segments;
    return params;
  }

  Array run(bool packed, ParallelFor parallel_for, int64_t first, int64_t rows) const {
    Array y(dtype, rows * shape.n, Aligned::kFresh);
    Params params = this->params(packed, first, rows);
    params.y = y.data();
    run_cpu(params, group_rows_by_loop(loops.data() + first, rows, shape.num_loops), parallel_for);
    return y;
  }

  std::vector<double> expected(int64_t row) const {
    const int64_t loop = loops[row];
    const auto dot = [&](const Array& matrix, int64_t from) {
      double sum = 0;
      for (int64_t k = 0; k < shape.k; ++k) sum += x[row * (shape.k + shape.x_gap) + k] * matrix[from + k];
      return sum;
    };
    std::vector<double> shrunk, y;
    for (int64_t r = 0; r < total_rank; ++r) shrunk.push_back(dot(lora_a, (loop * total_rank + r) * shape.k));
    for (const Segment& segment : segments) {
      for (int64_t n = segment.out_begin; n < segment.out_begin + segment.out_size; ++n) {
        y.push_back(dot(weight, n * shape.k));
        if (shape.bias != Bias::kNone) y.back() += bias[n + (shape.bias == Bias::kPerLoop ? loop * shape.n : 0)];
        for (int64_t r = 0; r < segment.rank; ++r) {
          y.back() += lora_b[(loop * shape.n + n) * b_stride + r] * shrunk[segment.rank_begin + r];
        }
      }
    }
    return y;
  }
};

void check_problem(const Problem& problem) {
  const Shape& s = problem.shape;
  const Array y = problem.run(false, run_threaded, 0, s.m);
  RelativeError error;
  for (int64_t row = 0; row < s.m; ++row) {
    const std::vector<double> expected = problem.expected(row);
    for (int64_t n = 0; n < s.n; ++n) error.add(y[row * s.n + n], expected[n]);
  }
  CHECK(error.below(2 * epsilon(problem.dtype)));

  const Array packed = problem.run(true, run_threaded, 0, s.m);
  CHECK(packed.same_bits(0, y, 0, s.m * s.n));
  const Array serial = problem.run(false, run_serially, 0, s.m);
  CHECK(serial.same_bits(0, y, 0, s.m * s.n));
  for (int64_t row = 0; row < s.m; row += 1 + s.m / 20) {
    const Array alone = problem.run(true, run_serially, row, 1);
    CHECK(alone.same_bits(0, y, row * s.n, s.n));
  }
}

void results_are_right_and_the_same_in_any_batch() {
  Random random(1);
  for (const Shape& shape : kShapes) {
    for (Dtype dtype : kDtypes) {
      const int before = failures;
      check_problem(Problem(shape, dtype, random));
      if (failures > before) {
        std::cerr << "  m " << shape.m << " n " << shape.n << " k " << shape.k << " loops " << shape.num_loops
                  << " dtype " << static_cast<int>(dtype) << '\n';
      }
    }
  }
}

// Threads keep memory between calls; here it is full of what NaN made.
void what_another_call_has_left_in_memory_changes_no_bit() {
  Random random(3);
  for (Dtype dtype : kDtypes) {
    Problem poison({150, 100, 600, 2, {100}, {300}}, dtype, random);
    for (const Shape& shape : {Shape{7, 33, 17, 2, {20, 13}, {3, 37}}, Shape{130, 5, 301, 1, {5}, {129}}}) {
      const Problem problem(shape, dtype, random);
      const Array expected = problem.run(true, run_threaded, 0, shape.m);  // by threads of its own
      poison.x = Array(dtype, poison.x.size());
      poison.run(true, run_serially, 0, poison.shape.m);
      const Array found = problem.run(true, run_serially, 0, shape.m);
      CHECK(found.same_bits(0, expected, 0, shape.m * shape.n));
    }
  }
}

// Against the two linears and the activation one after the other.
void a_gated_linear_is_its_three_parts() {
  Random random(2);
  for (const Shape& shape : {Shape{1, 33, 17, 1, {33}, {0}, Bias::kShared}, Shape{13, 70, 257, 1, {70}, {0}},
                             Shape{400, 65, 31, 1, {65}, {0}, Bias::kShared}}) {
    for (Dtype dtype : kDtypes) {
      for (auto activation : {elementwise::Activation::kSilu, elementwise::Activation::kGeluTanh}) {
        const Problem gate(shape, dtype, random), up(shape, dtype, random);
        const int64_t size = shape.m * shape.n;
        Params params = up.params(true, 0, shape.m);
        params.x = gate.x.data();
        params.gate_weight = gate.packed_weight.data();
        params.gate_bias = shape.bias == Bias::kNone ? nullptr : gate.bias.data();
        params.activation = activation;
        Array found(dtype, size, Aligned::kFresh), expected(dtype, size, Aligned::kFresh);
        Array gates(dtype, size, Aligned::kFresh), ups(dtype, size, Aligned::kFresh);
        const LoopGroups groups = group_rows_by_loop(gate.loops.data(), shape.m, 1);
        params.y = found.data();
        run_cpu(params, groups, run_threaded);
        params.gate_weight = nullptr;
        params.y = ups.data();
        run_cpu(params, groups, run_threaded);
        params.weight = gate.packed_weight.data();
        params.bias = params.gate_bias;
        params.y = gates.data();
        run_cpu(params, groups, run_threaded);
        elementwise::gate_cpu({dtype, activation, size, gates.data(), ups.data(), expected.data()}, run_serially);
        CHECK(found.same_bits(0, expected, 0, size));
      }
    }
  }
}

}  // namespace

int main() {
  if (lacks_instruction_set()) return kSkipped;
  return run(results_are_right_and_the_same_in_any_batch, what_another_call_has_left_in_memory_changes_no_bit,
             a_gated_linear_is_its_three_parts);
}
