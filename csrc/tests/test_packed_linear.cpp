// The CPU kernels of pack_linear and logit_statistics through launch.h, against sums in double.
#include <algorithm>
#include <array>
#include <cmath>
#include <vector>

#include "kernels.h"
#include "packed_linear/launch.h"
#include "packing.h"

using namespace rrt;
using namespace rrt::packed_linear;
using namespace rrt::tests;

namespace {

void packed_weights_lie_as_launch_h_says() {
  Random random(2);
  for (Dtype dtype : kDtypes) {
    for (const auto& [count, n, k] : std::vector<std::array<int64_t, 3>>{
             {1, 1, 1}, {2, 33, 7}, {3, 32, 16}, {1, 70, 131}, {2, 5, 300}, {2, 0, 5}, {2, 5, 0}}) {
      const Array from(dtype, count * n * k, random);
      const Array packed = pack(dtype, from, count, n, k);
      const int64_t step = pack_step(dtype), steps = pack_steps(dtype, k);
      int64_t index = 0;
      for (int64_t matrix = 0; matrix < count; ++matrix) {
        for (int64_t panel = 0; panel < num_panels(n); ++panel) {
          for (int64_t s = 0; s < steps; ++s) {
            for (int64_t lane = 0; lane < kPanel; ++lane) {
              for (int64_t i = 0; i < step; ++i) {
                const int64_t out = panel * kPanel + lane, column = s * step + i;
                const double expected = out < n && column < k ? from[(matrix * n + out) * k + column] : 0;
                CHECK_EQ(packed[index++], expected);
              }
            }
          }
        }
      }
      CHECK_EQ(index, packed.size());
    }
  }
}

void statistics_are_those_of_a_softmax() {
  struct Size {
    int64_t m, n, k, x_gap;
  };
  Random random(5);
  for (const Size& size : {Size{0, 5, 3, 0}, Size{1, 1, 1, 0}, Size{3, 33, 0, 0}, Size{7, 1025, 40, 2},
                           Size{13, 64, 257, 0}, Size{5, 33, 289, 0}, Size{14, 40, 1200, 1},
                           Size{200, 31, 19, 1}}) {
    for (Dtype dtype : kDtypes) {
      const int before = failures;
      const auto [m, n, k, x_gap] = size;
      const int64_t stride = k + x_gap;
      const Array x(dtype, m == 0 ? 0 : (m - 1) * stride + k, random), weight(dtype, n * k, random);
      const Array packed = pack(dtype, weight, 1, n, k);
      const Dtype wide = dtype == Dtype::kFloat64 ? Dtype::kFloat64 : Dtype::kFloat32;
      Array log_sum_exp(wide, m);
      std::vector<int64_t> argmax(m, -1);
      StatisticsParams params{};
      params.dtype = dtype;
      params.m = m;
      params.n = n;
      params.k = k;
      params.x_row_stride = stride;
      params.x = x.data();
      params.weight = packed.data();
      params.log_sum_exp = log_sum_exp.data();
      params.argmax = argmax.data();
      statistics_cpu(params, run_threaded);
      for (int64_t row = 0; row < m; ++row) {
        std::vector<double> logits(n);
        double sum = 0;
        for (int64_t out = 0; out < n; ++out) {
          for (int64_t i = 0; i < k; ++i) logits[out] += x[row * stride + i] * weight[out * k + i];
          sum += std::exp(logits[out]);
        }
        const double wanted = std::log(sum);
        CHECK(std::abs(log_sum_exp[row] - wanted) <= 64 * epsilon(wide) * std::max(1.0, std::abs(wanted)));
        const double largest = *std::max_element(logits.begin(), logits.end());
        CHECK(argmax[row] >= 0 && argmax[row] < n && logits[argmax[row]] >= largest - 256 * epsilon(wide));
      }
      if (failures > before) std::cerr << "  m " << m << " n " << n << " dtype " << static_cast<int>(dtype) << '\n';
    }
  }
}

}  // namespace

int main() {
  if (lacks_instruction_set()) return kSkipped;
  return run(packed_weights_lie_as_launch_h_says, statistics_are_those_of_a_softmax);
}
