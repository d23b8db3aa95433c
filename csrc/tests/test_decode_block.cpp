// A pass of decode_block/ through launch.h: a row's bits, and what it writes, do not depend on the other rows. No memory
// lies behind the last element of an operand. The values are compared with references in Python.
#include <algorithm>
#include <utility>
#include <vector>

#include "decode_block/launch.h"
#include "kernels.h"
#include "packing.h"

using namespace rrt;
using namespace rrt::decode_block;
using namespace rrt::tests;

namespace {

constexpr int64_t kLayers = 2, kLoops = 3, kHidden = 40, kHeads = 4, kKvHeads = 2, kHeadDim = 12, kInner = 821;
// As wide as kInner, a linear is work for several threads.
constexpr int64_t kPageSize = 4, kPagesEach = 3, kRows = 6, kPages = kRows * kPagesEach, kMaxPositions = 12;
constexpr int32_t kLoopOfRow[kRows] = {2, 0, 0, 1, 2, 1};
constexpr int32_t kPositions[kRows] = {5, 0, 11, 3, 7, 9};

// The model: LoRA, biases and norms per loop, norms of queries and keys.
class Weights {
 public:
  Weights(Dtype dtype, Random& random) : dtype_(dtype), random_(random) {
    for (int64_t i = 0; i < kLayers; ++i) {
      Layer layer{};
      layer.attn_norm = layer.mlp_norm = {random_array(kLoops * kHidden), kHidden};
      layer.q_norm = layer.k_norm = {random_array(kHeadDim), 0};
      constexpr int64_t kWidth = kHeads * kHeadDim, kKvWidth = kKvHeads * kHeadDim;
      layer.qkv = linear(kHidden, {{0, kWidth, 0, 3}, {kWidth, kKvWidth, 3, 0}, {kWidth + kKvWidth, kKvWidth, 3, 5}}, 5);
      layer.out = linear(kWidth, {{0, kHidden, 0, 4}}, 4);
      layer.gate_up = linear(kHidden, {{0, kInner, 0, 2}, {kInner, kInner, 2, 7}}, 7);
      layer.down = linear(kInner, {{0, kHidden, 0, 0}}, 0);
      layers.push_back(std::move(layer));
    }
  }

  std::vector<Layer> layers;

 private:
  const void* keep(Array array) {
    arrays_.push_back(std::move(array));
    return arrays_.back().data();
  }
  const void* random_array(int64_t size) { return keep(Array(dtype_, size, random_)); }
  const void* packed(int64_t count, int64_t n, int64_t k) {
    const Array matrices(dtype_, count * n * k, random_);
    return keep(pack(dtype_, matrices, count, n, k));
  }

  loop_lora::Params linear(int64_t k, std::vector<loop_lora::Segment> segments, int64_t max_rank) {
    loop_lora::Params params{};
    params.dtype = dtype_;
    params.packed = true;
    params.k = k;
    params.num_loops = kLoops;
    for (const loop_lora::Segment& segment : segments) {
      params.n += segment.out_size;
      params.total_rank += segment.rank;
    }
    params.b_stride = max_rank;
    params.segments = std::move(segments);
    params.weight = packed(1, params.n, k);
    params.bias = random_array(kLoops * params.n);
    params.bias_loop_stride = params.n;
    params.lora_a = packed(kLoops, params.total_rank, k);
    params.lora_b = packed(kLoops, params.n, max_rank);
    return params;
  }

  Dtype dtype_;
  Random& random_;
  std::vector<Array> arrays_;
};

struct Result {
  Array out, k_cache, v_cache;
};

// A pass of the rows `order`, of which the first `kv_only` only write.
Result run_rows(Dtype dtype, const Weights& weights, const Array& x, const Array& cos_sin, const Array& cache,
                     const std::vector<int64_t>& order, int64_t kv_only, ParallelFor parallel_for) {
  const auto rows = static_cast<int64_t>(order.size()), bytes = bytes_of(dtype);
  const int64_t layer_size = kPages * kPageSize * kKvHeads * kHeadDim;
  Result result{Array(dtype, rows * kHidden), Array(dtype, cache.size()), Array(dtype, cache.size())};
  for (Array* to : {&result.k_cache, &result.v_cache}) std::memcpy(to->data(), cache.data(), cache.size() * bytes);
  Array chosen(dtype, rows * kHidden);
  std::vector<int32_t> loops, positions, tables, contexts;
  std::vector<int64_t> slots;
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t row = order[i];
    std::memcpy(chosen.at(i * kHidden), x.at(row * kHidden), kHidden * bytes);
    loops.push_back(kLoopOfRow[row]);
    positions.push_back(kPositions[row]);
    slots.push_back(row * kPagesEach * kPageSize + kPositions[row]);
    if (i < kv_only) continue;
    for (int64_t page = 0; page < kPagesEach; ++page) tables.push_back(static_cast<int32_t>(row * kPagesEach + page));
    contexts.push_back(kPositions[row] + 1);
  }
  Params params{};
  params.dtype = dtype;
  params.rows = rows;
  params.num_kv_only = kv_only;
  params.hidden_size = kHidden;
  params.num_heads = kHeads;
  params.num_kv_heads = kKvHeads;
  params.head_dim = kHeadDim;
  params.inner_size = kInner;
  params.num_loops = kLoops;
  params.loops = loops.data();
  params.norm_eps = 1e-5;
  params.activation = elementwise::Activation::kSilu;
  params.slots = slots.data();
  params.rope = {positions.data(), cos_sin.data(), 8};
  params.page_size = kPageSize;
  params.scale = 0.3;
  params.block_tables = tables.data();
  params.table_stride = kPagesEach;
  params.context_lens = contexts.data();
  params.layers = weights.layers;
  for (int64_t i = 0; i < kLayers; ++i) {
    params.layers[i].k_cache = result.k_cache.at(i * layer_size);
    params.layers[i].v_cache = result.v_cache.at(i * layer_size);
  }
  params.x = chosen.data();
  params.out = result.out.data();
  run_cpu(params, parallel_for);
  return result;
}

void rows_do_not_depend_on_each_other() {
  Random random(1);
  for (Dtype dtype : kDtypes) {
    const Dtype wide = dtype == Dtype::kFloat64 ? dtype : Dtype::kFloat32;
    const Weights weights(dtype, random);
    const Array x(dtype, kRows * kHidden, random), cos_sin(wide, kMaxPositions * 8, random);
    const Array cache(dtype, kLayers * kPages * kPageSize * kKvHeads * kHeadDim, random);
    const auto pass = [&](const std::vector<int64_t>& order, int64_t kv_only, ParallelFor parallel_for) {
      return run_rows(dtype, weights, x, cos_sin, cache, order, kv_only, parallel_for);
    };
    const Result together = pass({0, 1, 2, 3, 4, 5}, 1, run_threaded);
    CHECK(together.out.same_bits(0, x, 0, kHidden));
    for (int64_t i = 0; i < together.out.size(); ++i) CHECK(together.out[i] == together.out[i]);
    for (const std::vector<int64_t>& order : std::vector<std::vector<int64_t>>{{3}, {5, 1}, {4, 2, 1}, {5, 4, 3, 2, 1}}) {
      const Result some = pass(order, 0, run_serially);
      for (size_t i = 0; i < order.size(); ++i) {
        const auto row = static_cast<int64_t>(i);
        CHECK(some.out.same_bits(row * kHidden, together.out, order[i] * kHidden, kHidden));
        for (int64_t layer = 0; layer < kLayers; ++layer) {
          const int64_t size = kKvHeads * kHeadDim;
          const int64_t slot = (layer * kRows + order[i]) * kPagesEach * kPageSize + kPositions[order[i]];
          CHECK(some.k_cache.same_bits(slot * size, together.k_cache, slot * size, size));
          CHECK(some.v_cache.same_bits(slot * size, together.v_cache, slot * size, size));
        }
      }
    }
    // A kv-only row writes, at the first layer, what it would as a decode row.
    const Result written = pass({0}, 1, run_serially), decoded = pass({0}, 0, run_serially);
    const int64_t size = kKvHeads * kHeadDim, slot = kPositions[0];
    CHECK(written.k_cache.same_bits(slot * size, decoded.k_cache, slot * size, size));
    CHECK(written.out.same_bits(0, x, 0, kHidden) && !decoded.out.same_bits(0, x, 0, kHidden));
    pass({}, 0, run_threaded);
  }
}

}  // namespace

int main() {
  if (lacks_instruction_set()) return kSkipped;
  return rrt::tests::run(rows_do_not_depend_on_each_other);
}
