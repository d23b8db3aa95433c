// The choice of decode kernel and tile on CUDA.
#include "check.h"
#include "loop_lora/cuda_tiles.h"

using namespace rrt::loop_lora;

namespace {

constexpr int kH100 = 132, kA100 = 108;

bool is(const Tiling& tiling, DecodeKernel kernel, int slices) {
  return tiling.kernel == kernel && tiling.slices == slices;
}

constexpr MeasuredTiling kNone{};

Tiling estimated(int multiprocessors, int64_t n, int64_t k, int64_t m) {
  return choose_tiling(&kNone, multiprocessors, n, k, m, true);
}

void test_measurements_go_before_estimates() {
  const MeasuredTiling lines[] = {{kH100, 2048, 2048, 64, {DecodeKernel::kRows, 4}},
                                  {kH100, 2048, 2048, 16, {DecodeKernel::kRows, 2}},
                                  {kA100, 2048, 2048, 16, {DecodeKernel::kRows, 1}},
                                  {}};
  const auto chosen = [&](int multiprocessors, int64_t n, int64_t m, bool rows_fit = true) {
    return choose_tiling(lines, multiprocessors, n, 2048, m, rows_fit);
  };
  CHECK(is(chosen(kH100, 2048, 1), DecodeKernel::kRows, 2));
  CHECK(is(chosen(kH100, 2048, 16), DecodeKernel::kRows, 2));
  CHECK(is(chosen(kH100, 2048, 17), DecodeKernel::kRows, 4));
  CHECK(is(chosen(kA100, 2048, 16), DecodeKernel::kRows, 1));
  // Of another device, another layer, more tokens than were measured; and where the row kernel does not fit.
  const Tiling other_device = estimated(80, 2048, 2048, 16), other_layer = estimated(kH100, 2560, 2048, 16);
  CHECK(is(chosen(80, 2048, 16), other_device.kernel, other_device.slices));
  CHECK(is(chosen(kH100, 2560, 16), other_layer.kernel, other_layer.slices));
  const Tiling more_tokens = estimated(kH100, 2048, 2048, 65);
  CHECK(is(chosen(kH100, 2048, 65), more_tokens.kernel, more_tokens.slices));
  CHECK(is(chosen(kH100, 2048, 16, false), DecodeKernel::kColumns, 1));
}

void test_a_small_layer_goes_by_columns_until_x_outweighs_it() {
  for (int multiprocessors : {kH100, kA100}) {
    CHECK(is(estimated(multiprocessors, 2048, 2048, 1), DecodeKernel::kColumns, 1));
    CHECK(is(estimated(multiprocessors, 2048, 2048, 8), DecodeKernel::kColumns, 1));
    CHECK(is(estimated(multiprocessors, 2048, 2048, 64), DecodeKernel::kRows, 8));
  }
}

void test_a_layer_of_many_outputs_goes_by_rows_undivided_and_one_of_few_divided() {
  for (int64_t m : {8, 16, 32, 64}) {
    CHECK(is(estimated(kH100, 32768, 2048, m), DecodeKernel::kRows, 1));
    CHECK(is(estimated(kH100, 256000, 2048, m), DecodeKernel::kRows, 1));
    const Tiling down = estimated(kH100, 2048, 16384, m);
    CHECK(down.kernel == DecodeKernel::kRows && down.slices == 8);
  }
}

void test_sums_of_parts_stay_small() {
  for (int64_t m : {65, 1024, 8192, 100000}) {
    for (int64_t n : {256, 2048, 32768}) {
      CHECK(estimated(kH100, n, 16384, m).slices == 1 || sum_bytes(m, n) <= kMaxSumBytes);
    }
  }
}

}  // namespace

int main() {
  return rrt::tests::run(test_measurements_go_before_estimates, test_a_small_layer_goes_by_columns_until_x_outweighs_it,
                         test_a_layer_of_many_outputs_goes_by_rows_undivided_and_one_of_few_divided,
                         test_sums_of_parts_stay_small);
}
