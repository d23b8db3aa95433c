// The CPU kernels of elementwise/ through launch.h, against the definitions in double. No memory lies behind the last
// element of an operand or a result.
#include <algorithm>
#include <cmath>
#include <tuple>
#include <utility>
#include <vector>

#include "elementwise/launch.h"
#include "kernels.h"

using namespace rrt;
using namespace rrt::elementwise;
using namespace rrt::tests;

namespace {

Dtype accumulation(Dtype dtype) { return dtype == Dtype::kFloat64 ? Dtype::kFloat64 : Dtype::kFloat32; }

// Bound of a result that is rounded `times`, and summed or approximated before.
double bound(Dtype dtype, int times) {
  const double wide = 8 * epsilon(accumulation(dtype));
  return dtype == accumulation(dtype) ? wide : times * epsilon(dtype);
}

void rotary_turns_pairs_of_elements() {
  Random random(1);
  for (Dtype dtype : kDtypes) {
    for (const auto& [heads, head_dim, half, shared] :
         {std::tuple{3, 64, 32, true}, {2, 80, 10, false}, {1, 7, 3, false}, {2, 5, 0, true}}) {
      const int64_t batch = 2, length = 5;
      // Heads and tokens lie apart.
      const int64_t head_stride = head_dim + 3, token_stride = heads * head_stride + 2;
      const int64_t batch_stride = length * token_stride + 1;
      const Array x(dtype, batch_stride + (length - 1) * token_stride + (heads - 1) * head_stride + head_dim, random);
      const int64_t angles = (shared ? 1 : batch) * length * half;
      const Array cos(dtype, angles, random), sin(dtype, angles, random);
      Array out(dtype, batch * length * heads * head_dim);
      rotary_cpu({dtype, batch, length, heads, head_dim, x.data(), batch_stride, token_stride, head_stride, cos.data(),
                  sin.data(), half, shared ? 0 : length * half, out.data()},
                 run_threaded);
      RelativeError error;
      for (int64_t token = 0; token < batch * length; ++token) {
        const int64_t b = token / length, t = token % length, angle = (shared ? t : token) * half;
        for (int64_t head = 0; head < heads; ++head) {
          const int64_t from = b * batch_stride + t * token_stride + head * head_stride;
          for (int64_t i = 0; i < head_dim; ++i) {
            double wanted = x[from + i];
            if (i < half) {
              wanted = x[from + i] * cos[angle + i] - x[from + half + i] * sin[angle + i];
            } else if (i < 2 * half) {
              wanted = x[from + i] * cos[angle + i - half] + x[from + i - half] * sin[angle + i - half];
            }
            error.add(out[(token * heads + head) * head_dim + i], wanted);
          }
        }
      }
      CHECK(error.below(bound(dtype, 1)));
    }
  }
}

void norm_and_its_gradients_are_those_of_the_definition() {
  Random random(2);
  const double eps = 1e-5;
  for (Dtype dtype : kDtypes) {
    for (const auto& [rows, width] : {std::pair{130, 37}, {3, 384}, {64, 16}, {1, 5}}) {
      for (bool plus_one : {false, true}) {
        const Array x(dtype, rows * width, random), weight(dtype, width, random), grad(dtype, rows * width, random);
        Array out(dtype, rows * width), scale(accumulation(dtype), rows);
        norm_cpu({dtype, rows, width, x.data(), weight.data(), eps, plus_one, out.data(), scale.data()}, run_threaded);
        Array x_grad(dtype, rows * width), weight_grad(dtype, width);
        norm_backward_cpu({dtype, rows, width, grad.data(), x.data(), weight.data(), plus_one, scale.data(),
                           x_grad.data(), weight_grad.data()},
                          run_threaded);
        RelativeError out_error, x_error, weight_error;
        std::vector<double> wanted_weight(width);
        for (int64_t row = 0; row < rows; ++row) {
          double squares = 0, along = 0;
          for (int64_t i = row * width; i < (row + 1) * width; ++i) squares += x[i] * x[i];
          const double s = 1 / std::sqrt(squares / width + eps);
          for (int64_t i = 0; i < width; ++i) {
            const int64_t at = row * width + i;
            along += grad[at] * (weight[i] + plus_one) * x[at] * s;
            wanted_weight[i] += grad[at] * x[at] * s;
          }
          for (int64_t i = 0; i < width; ++i) {
            const int64_t at = row * width + i;
            const double factor = weight[i] + plus_one, normed = x[at] * s;
            out_error.add(out[at], normed * factor);
            x_error.add(x_grad[at], (grad[at] * factor - normed * along / width) * s);
          }
        }
        for (int64_t i = 0; i < width; ++i) weight_error.add(weight_grad[i], wanted_weight[i]);
        CHECK(out_error.below(bound(dtype, 2)));
        CHECK(x_error.below(bound(dtype, 1)));
        CHECK(weight_error.below(bound(dtype, 1)));
      }
    }
  }
}

double activate(Activation activation, double x) {
  if (activation == Activation::kSilu) return x / (1 + std::exp(-x));
  return 0.5 * x * (1 + std::tanh(std::sqrt(2 / std::acos(-1.0)) * (x + 0.044715 * x * x * x)));
}

void gates_and_their_gradients_are_those_of_the_definition() {
  Random random(3);
  for (Dtype dtype : kDtypes) {
    for (int64_t size : {1, 16, 101, 5000}) {
      for (Activation activation : {Activation::kSilu, Activation::kGeluTanh}) {
        const Array gate(dtype, size, random), up(dtype, size, random), grad(dtype, size, random);
        Array out(dtype, size), gate_grad(dtype, size), up_grad(dtype, size);
        gate_cpu({dtype, activation, size, gate.data(), up.data(), out.data()}, run_threaded);
        gate_backward_cpu({dtype, activation, size, grad.data(), gate.data(), up.data(), gate_grad.data(),
                           up_grad.data()},
                          run_threaded);
        RelativeError out_error, gate_error, up_error;
        for (int64_t i = 0; i < size; ++i) {
          const double h = 1e-5, x = gate[i];
          const double slope = (activate(activation, x + h) - activate(activation, x - h)) / (2 * h);
          out_error.add(out[i], activate(activation, x) * up[i]);
          gate_error.add(gate_grad[i], grad[i] * up[i] * slope);
          up_error.add(up_grad[i], grad[i] * activate(activation, x));
        }
        CHECK(out_error.below(bound(dtype, 1)));
        CHECK(gate_error.below(std::max(1e-8, bound(dtype, 1))));  // of the difference quotient
        CHECK(up_error.below(bound(dtype, 1)));
      }
    }
  }
}

void nothing_is_computed_of_nothing() {
  const Dtype dtype = Dtype::kFloat32;
  rotary_cpu({dtype, 2, 0, 3, 8, nullptr, 0, 24, 8, nullptr, nullptr, 4, 0, nullptr}, run_threaded);
  norm_cpu({dtype, 0, 8, nullptr, nullptr, 1e-5, false, nullptr, nullptr}, run_threaded);
  gate_cpu({dtype, Activation::kSilu, 0, nullptr, nullptr, nullptr}, run_threaded);
  gate_backward_cpu({dtype, Activation::kSilu, 0, nullptr, nullptr, nullptr, nullptr, nullptr}, run_threaded);
  Array weight_grad(dtype, 8);
  norm_backward_cpu({dtype, 0, 8, nullptr, nullptr, nullptr, false, nullptr, nullptr, weight_grad.data()}, run_threaded);
  for (int64_t i = 0; i < weight_grad.size(); ++i) CHECK_EQ(weight_grad[i], 0.0);
}

}  // namespace

int main() {
  if (lacks_instruction_set()) return kSkipped;
  return run(rotary_turns_pairs_of_elements, norm_and_its_gradients_are_those_of_the_definition,
             gates_and_their_gradients_are_those_of_the_definition, nothing_is_computed_of_nothing);
}
