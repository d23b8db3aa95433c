// The choice of decode kernel and tile on CUDA.
#include <utility>

#include "check.h"
#include "loop_lora/cuda_tiles.h"

using namespace rrt::loop_lora;

namespace {

constexpr Gpu kH100{132, 228 << 10}, kA100{108, 164 << 10};

bool is(const Tiling& tiling, DecodeKernel kernel, int slices) {
  return tiling.kernel == kernel && tiling.slices == slices;
}

constexpr MeasuredTiling kNone{};

Tiling estimated(const Gpu& gpu, int64_t n, int64_t k, int64_t m) {
  return choose_tiling(&kNone, gpu, n, k, m, true, true);
}

void test_measurements_go_before_estimates() {
  const MeasuredTiling lines[] = {{132, 2048, 2048, 64, {DecodeKernel::kRows, 4}},
                                  {132, 2048, 2048, 16, {DecodeKernel::kRows, 2}},
                                  {108, 2048, 2048, 16, {DecodeKernel::kRows, 1}},
                                  {}};
  const auto chosen = [&](const Gpu& gpu, int64_t n, int64_t m, bool rows_fit = true) {
    return choose_tiling(lines, gpu, n, 2048, m, rows_fit, rows_fit);
  };
  CHECK(is(chosen(kH100, 2048, 1), DecodeKernel::kRows, 2));
  CHECK(is(chosen(kH100, 2048, 16), DecodeKernel::kRows, 2));
  CHECK(is(chosen(kH100, 2048, 17), DecodeKernel::kRows, 4));
  CHECK(is(chosen(kA100, 2048, 16), DecodeKernel::kRows, 1));
  // Of another device, another layer, more tokens than were measured; and where the row kernel does not fit.
  const Tiling other_device = estimated({80, 164 << 10}, 2048, 2048, 16);
  const Tiling other_layer = estimated(kH100, 2560, 2048, 16);
  CHECK(is(chosen({80, 164 << 10}, 2048, 16), other_device.kernel, other_device.slices));
  CHECK(is(chosen(kH100, 2560, 16), other_layer.kernel, other_layer.slices));
  const Tiling more_tokens = estimated(kH100, 2048, 2048, 65);
  CHECK(is(chosen(kH100, 2048, 65), more_tokens.kernel, more_tokens.slices));
  CHECK(is(chosen(kH100, 2048, 16, false), DecodeKernel::kColumns, 1));
}

void test_segments_that_fit_narrow_tiles_alone_get_these() {
  const MeasuredTiling lines[] = {{132, 2048, 2048, 64, {DecodeKernel::kRows, 4}}, {}};
  CHECK(is(choose_tiling(lines, kH100, 2048, 2048, 64, true, true), DecodeKernel::kRows, 4));
  CHECK(choose_tiling(lines, kH100, 2048, 2048, 64, false, true).kernel == DecodeKernel::kRows64);
  CHECK(is(choose_tiling(lines, kH100, 2048, 2048, 64, false, false), DecodeKernel::kColumns, 1));
}

// Where two blocks of the column kernel fit a multiprocessor; an A100's holds one.
void test_few_tokens_go_by_columns_where_outputs_are_few() {
  for (int64_t m : {1, 2, 4, 8}) {
    for (int64_t n : {2048, 2560}) {
      CHECK(is(estimated(kH100, n, 2048, m), DecodeKernel::kColumns, 1));
      CHECK(is(estimated(kA100, n, 2048, m), DecodeKernel::kRows64, 1));
    }
  }
  CHECK(estimated(kH100, 2048, 2048, 64).slices > 1);
}

// The tile of 8 tokens is as large for one, but only what exists is read.
void test_tokens_that_do_not_exist_cost_nothing() {
  const Tiling columns{DecodeKernel::kColumns, 1};
  const auto time = [&](int64_t m) { return estimated_microseconds(columns, kH100, 2048, 16384, m); };
  CHECK(time(1) <= time(8));
  CHECK(time(17) < time(24));
}

void test_many_outputs_go_undivided_and_for_many_tokens_by_wide_tiles() {
  for (int64_t n : {32768, 256000}) {
    for (int64_t m : {1, 8, 16, 32, 64}) CHECK(estimated(kH100, n, 2048, m).slices == 1);
  }
  for (int64_t m : {32, 64}) CHECK(is(estimated(kH100, 32768, 2048, m), DecodeKernel::kRows, 1));
}

void test_few_outputs_of_many_columns_fill_the_gpu() {
  for (int64_t m : {32, 64}) {
    const Tiling down = estimated(kH100, 2048, 16384, m);
    CHECK(down.kernel == DecodeKernel::kRows64);
    CHECK(2048 / tile_rows(down.kernel) * down.slices >= 128);
  }
  // With 8 or 16 tokens, 128 blocks of 16 outputs have enough under way, and no sums to add.
  for (int64_t m : {8, 16}) CHECK(is(estimated(kH100, 2048, 16384, m), DecodeKernel::kColumns, 1));
}

void test_shrink_is_split_where_its_blocks_are_few_and_long() {
  for (int64_t m : {1, 8, 64}) {
    CHECK(choose_shrink(kH100, 64, 2, 16384, m) != ShrinkKernel::kColumns);
    CHECK(choose_shrink(kH100, 64, 2, 2048, m) == ShrinkKernel::kColumns);
  }
  CHECK(choose_shrink(kH100, 2048, 2, 16384, 1) == ShrinkKernel::kColumns);      // enough blocks as it is
  CHECK(choose_shrink(kH100, 64, 2, 16384, 1000000) == ShrinkKernel::kColumns);  // the sums would take too much memory
}

void test_shrink_of_many_ranks_and_tokens_goes_by_rows() {
  for (int64_t k : {2048, 16384}) CHECK(choose_shrink(kH100, 512, 2, k, 64) == ShrinkKernel::kRows);
  for (int64_t m : {1, 8, 16}) CHECK(choose_shrink(kH100, 512, 2, 16384, m) != ShrinkKernel::kRows);
  CHECK(shrink_tokens(ShrinkKernel::kRows, 17) == 32 && shrink_tokens(ShrinkKernel::kRows, 1000) == 64);
  CHECK(shrink_tokens(ShrinkKernel::kColumns, 64) == 16);
}

void test_turns_of_b_come_last_where_ranks_are_few() {
  CHECK(share_before_rank({DecodeKernel::kColumns, 1}, 512) == 1);
  CHECK(share_before_rank({DecodeKernel::kRows, 1}, 8) == 1);
  CHECK(share_before_rank({DecodeKernel::kRows, 1}, 64) == 7.0 / 8);
  CHECK(share_before_rank({DecodeKernel::kRows, 1}, 512) == 1.0 / 8);
  CHECK(share_before_rank({DecodeKernel::kRows64, 8}, 512) == 1);
  CHECK(share_before_rank({DecodeKernel::kRows64, 2}, 64) == 1.0 / 4);
}

void test_the_product_starts_early_where_shrink_is_short_or_it_would_wait_at_once() {
  const Tiling whole{DecodeKernel::kRows, 1}, sliced{DecodeKernel::kRows64, 8};
  const auto is_early = [](double shrink, double a_bytes, int64_t rank, const Tiling& tiling, int64_t n, int64_t k,
                           int64_t m) {
    return should_start_early({shrink, a_bytes, rank}, tiling, kH100, n, k, m);
  };
  // Nothing to wait for: what fills the ring is gained.
  CHECK(is_early(0, 0, 0, whole, 32768, 2048, 8));
  // T is needed after 7/8 of W, which lasts longer than shrink.
  CHECK(!is_early(5, 1e6, 64, whole, 32768, 2048, 8));
  // Shrink outlasts the eighth of W that comes before B_l, and A_l would take memory from it.
  CHECK(is_early(30, 8e6, 512, whole, 8192, 2048, 8));
  // A thread block of one part has all its W first.
  CHECK(!is_early(10, 1e6, 512, sliced, 2048, 16384, 64));
}

void test_thread_blocks_share_a_multiprocessor_as_their_memory_lets_them() {
  const auto fit = [](const Gpu& gpu, DecodeKernel kernel, int tokens) {
    return blocks_side_by_side(gpu, block_of(kernel, tokens));
  };
  CHECK(fit(kH100, DecodeKernel::kColumns, 8) == 2 && fit(kH100, DecodeKernel::kColumns, 16) == 2);
  CHECK(fit(kH100, DecodeKernel::kColumns, 32) == 1);
  for (int tokens : {8, 16, 32}) CHECK(fit(kA100, DecodeKernel::kColumns, tokens) == 1);
  CHECK(fit(kH100, DecodeKernel::kRows, 8) == 3 && fit(kH100, DecodeKernel::kRows, 64) == 2);
  for (int tokens : {8, 16, 32, 64}) {
    CHECK(fit(kA100, DecodeKernel::kRows, tokens) == 2 && fit(kA100, DecodeKernel::kRows64, tokens) == 2);
  }
}

// A second wave of blocks that have a multiprocessor each begins where the first has ended.
void test_waves_of_single_thread_blocks_do_not_overlap() {
  const Tiling columns{DecodeKernel::kColumns, 1};
  const auto time = [&](int64_t n, int64_t m) { return estimated_microseconds(columns, kH100, n, 2048, m); };
  CHECK(time(16 * 133, 32) > time(16 * 132, 32) + 1);
  CHECK(time(16 * 133, 16) < time(16 * 132, 16) + 0.5);
}

void test_shrink_fetches_before_it_knows_the_loops_where_little_can_be_in_vain() {
  for (int64_t m : {1, 8, 64}) {
    CHECK(should_prefetch(ShrinkKernel::kColumns, 192, 2, 2048, m));
    CHECK(should_prefetch(ShrinkKernel::kColumns, 1536, 1, 2048, m));  // no other loop
    CHECK(!should_prefetch(ShrinkKernel::kColumns, 1536, 3, 2048, m));
  }
  CHECK(should_prefetch(ShrinkKernel::kSplitColumns, 64, 2, 16384, 8));  // the rings hold half of the columns
  CHECK(!should_prefetch(ShrinkKernel::kSplitColumns, 512, 2, 16384, 8));
}

// Of W, as much as memory brings until the product comes, by no more hints than a warp should give; nothing where W is
// not what is waited for, or no kernel starts early.
void test_hints_are_of_what_the_product_reads_first() {
  const auto shrink_of = [](const Gpu& gpu, int64_t rank, int64_t k, int64_t m) {
    return estimate_shrink(choose_shrink(gpu, rank, 2, k, m), gpu, rank, 2, k, m, 64);
  };
  const Tiling sliced{DecodeKernel::kRows64, 4}, columns{DecodeKernel::kColumns, 1};
  const ShrinkEstimate of_down = shrink_of(kH100, 64, 16384, 32), of_out = shrink_of(kH100, 64, 2048, 32);
  const WeightHints down = choose_hints(sliced, kH100, 2048, 16384, 32, of_down);
  CHECK(down.rows == 2048 && down.parts == 2 && down.columns % 64 == 0);
  CHECK(down.bytes() > 6e6 && down.bytes() < 1.5 * 32.6e3 * 132);
  CHECK(down.count() <= 16 * of_down.warps);
  CHECK(should_give_hints(of_down, sliced, kH100, 2048, 16384, 32));
  const WeightHints out = choose_hints(columns, kH100, 2048, 2048, 32, of_out);  // whole rows, by 16 thread blocks
  CHECK(out.parts == 8 && out.columns == 2048 && out.bytes() <= of_out.blocks * (128 << 10));
  CHECK(!should_give_hints(of_out, columns, kH100, 2048, 2048, 32));  // x is waited for
  CHECK(choose_hints(sliced, kA100, 2048, 16384, 32, shrink_of(kA100, 64, 16384, 32)).rows == 0);
  CHECK(choose_hints(sliced, kH100, 2048, 16384, 32, {5, 4e6, 64}).rows == 0);  // without thread blocks
  CHECK(choose_hints(columns, kH100, 64, 256, 1, shrink_of(kH100, 8, 256, 1)).bytes() <= 2 * 64 * 256);
  // A second wave of thread blocks would find the cache as it is without hints.
  const Tiling wide{DecodeKernel::kRows, 1};
  CHECK(choose_hints(wide, kH100, 256000, 2048, 8, shrink_of(kH100, 64, 2048, 8)).rows == 3 * 132 * 128);
}

// The operator asks before it finds that there is nothing to compute.
void test_without_rows_or_columns_there_is_a_choice_too() {
  for (const Gpu& gpu : {kH100, kA100}) {
    for (const auto& [k, m] : {std::pair<int64_t, int64_t>{2048, 0}, {0, 8}, {0, 0}}) {
      CHECK(estimated(gpu, 2048, k, m).slices >= 1);
      const ShrinkEstimate shrink = estimate_shrink(choose_shrink(gpu, 64, 2, k, m), gpu, 64, 2, k, m, 64);
      CHECK(choose_hints({DecodeKernel::kColumns, 1}, gpu, 2048, k, m, shrink).rows == 0);
    }
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
  return rrt::tests::run(test_measurements_go_before_estimates, test_segments_that_fit_narrow_tiles_alone_get_these,
                         test_few_tokens_go_by_columns_where_outputs_are_few,
                         test_tokens_that_do_not_exist_cost_nothing,
                         test_many_outputs_go_undivided_and_for_many_tokens_by_wide_tiles,
                         test_few_outputs_of_many_columns_fill_the_gpu,
                         test_shrink_is_split_where_its_blocks_are_few_and_long,
                         test_shrink_of_many_ranks_and_tokens_goes_by_rows,
                         test_turns_of_b_come_last_where_ranks_are_few,
                         test_the_product_starts_early_where_shrink_is_short_or_it_would_wait_at_once,
                         test_thread_blocks_share_a_multiprocessor_as_their_memory_lets_them,
                         test_waves_of_single_thread_blocks_do_not_overlap,
                         test_shrink_fetches_before_it_knows_the_loops_where_little_can_be_in_vain,
                         test_hints_are_of_what_the_product_reads_first,
                         test_without_rows_or_columns_there_is_a_choice_too, test_sums_of_parts_stay_small);
}
