// rrt::decode_block on torch's stable ABI: schema and argument checks. The kernels lie behind raw-pointer launch
// functions and know nothing of torch.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "checks.h"
#include "decode_block/launch.h"
#include "elementwise/check_activation.h"
#include "packed_linear/launch.h"

namespace rrt {
namespace {

constexpr Checks block_check{"decode_block"};

// A layer's parameters, in the order of rrt/ops/decode_block.py's PARAMETERS.
enum Parameter {
  kAttnNorm,
  kQNorm,
  kKNorm,
  kMlpNorm,
  kQkv,                      // weight, bias, lora_a, lora_b; so the other linears
  kOut = kQkv + 4,
  kGateUp = kOut + 4,
  kDown = kGateUp + 4,
  kNumParameters = kDown + 4
};
constexpr const char* kNames[kNumParameters] = {
    "attn_norm",    "q_norm",      "k_norm",         "mlp_norm",       "qkv.weight",  "qkv.bias",
    "qkv.lora_a",   "qkv.lora_b",  "out.weight",     "out.bias",       "out.lora_a",  "out.lora_b",
    "gate_up.weight", "gate_up.bias", "gate_up.lora_a", "gate_up.lora_b", "down.weight", "down.bias",
    "down.lora_a",  "down.lora_b"};

// Reads and checks the parameters, layer after layer.
class Parameters {
 public:
  Parameters(const std::vector<std::optional<Tensor>>& all, const Tensor& x, Dtype dtype, int64_t num_loops)
      : all_(all), x_(x), dtype_(dtype), num_loops_(num_loops) {}

  decode_block::NormWeight norm(int64_t layer, int index, int64_t width, bool required) const {
    const Tensor* weight = get(layer, index, required);
    if (weight == nullptr) return {nullptr, 0};
    const bool per_loop = weight->sizes().size() == 2;
    if (per_loop) {
      check(layer, index, *weight, {{"loops", num_loops_}, {"width", width}});
    } else {
      check(layer, index, *weight, {{"width", width}});
    }
    return {weight->const_data_ptr(), per_loop ? width : 0};
  }

  loop_lora::Params linear(int64_t layer, int index, int64_t k, const std::vector<int64_t>& segment_out,
                           const int64_t* segment_rank) const {
    loop_lora::Params params{};
    params.dtype = dtype_;
    params.packed = true;
    params.k = k;
    params.num_loops = num_loops_;
    for (size_t s = 0; s < segment_out.size(); ++s) {
      params.segments.push_back({params.n, segment_out[s], params.total_rank, segment_rank[s]});
      params.n += segment_out[s];
      params.total_rank += segment_rank[s];
      params.b_stride = std::max(params.b_stride, segment_rank[s]);
    }
    const int64_t values = packed_linear::kPanel * packed_linear::pack_step(dtype_);
    const Dim panels{"panels", packed_linear::num_panels(params.n)}, last{"values", values};
    const Tensor* weight = get(layer, index, true);
    check(layer, index, *weight, {panels, {"steps", packed_linear::pack_steps(dtype_, k)}, last});
    params.weight = weight->const_data_ptr();
    if (const Tensor* bias = get(layer, index + 1, false)) {
      const bool per_loop = bias->sizes().size() == 2;
      if (per_loop) {
        check(layer, index + 1, *bias, {{"loops", num_loops_}, {"N", params.n}});
      } else {
        check(layer, index + 1, *bias, {{"N", params.n}});
      }
      params.bias = bias->const_data_ptr();
      params.bias_loop_stride = per_loop ? params.n : 0;
    }
    if (params.total_rank == 0) return params;
    const Tensor *lora_a = get(layer, index + 2, true), *lora_b = get(layer, index + 3, true);
    check(layer, index + 2, *lora_a,
          {{"loops", num_loops_},
           {"panels", packed_linear::num_panels(params.total_rank)},
           {"steps", packed_linear::pack_steps(dtype_, k)},
           last});
    check(layer, index + 3, *lora_b,
          {{"loops", num_loops_}, panels, {"steps", packed_linear::pack_steps(dtype_, params.b_stride)}, last});
    params.lora_a = lora_a->const_data_ptr();
    params.lora_b = lora_b->const_data_ptr();
    return params;
  }

 private:
  static std::string name(int64_t layer, int index) {
    return "parameters: layer " + std::to_string(layer) + ": " + kNames[index];
  }

  const Tensor* get(int64_t layer, int index, bool required) const {
    const std::optional<Tensor>& entry = all_[layer * kNumParameters + index];
    if (entry) return &*entry;
    if (required) block_check.fail(name(layer, index), ": found None; expected a tensor");
    return nullptr;
  }

  void check(int64_t layer, int index, const Tensor& tensor, const std::vector<Dim>& shape) const {
    const std::string text = name(layer, index);
    block_check.dtype(text.c_str(), tensor, x_.scalar_type());
    block_check.same_device(text.c_str(), tensor, x_, "x");
    block_check.shape(text.c_str(), tensor, shape);
    block_check.contiguous(text.c_str(), tensor);
  }

  const std::vector<std::optional<Tensor>>& all_;
  const Tensor& x_;
  Dtype dtype_;
  int64_t num_loops_;
};

void check_index(const char* name, const Tensor& tensor, ScalarType dtype, const Tensor& x,
                 const std::vector<Dim>& shape) {
  block_check.dtype(name, tensor, dtype);
  block_check.same_device(name, tensor, x, "x");
  block_check.shape(name, tensor, shape);
  block_check.contiguous(name, tensor);
}

// Values that index memory.
void check_values(const decode_block::Params& p, int64_t num_pages, int64_t max_pages, int64_t max_positions) {
  const int64_t decoding = p.rows - p.num_kv_only;
  for (int64_t row = 0; row < p.rows; ++row) {
    if (p.loops[row] < 0 || p.loops[row] >= p.num_loops) {
      block_check.fail("loops[", row, "]: found ", p.loops[row], "; expected a loop in [0, ", p.num_loops, ")");
    }
  }
  int64_t bad = kv_cache::find_bad_slot(p.slots, p.rows, num_pages * p.page_size);
  if (bad >= 0) {
    block_check.fail("slot_mapping[", bad, "]: found ", p.slots[bad], "; expected a slot in [0, ",
                     num_pages * p.page_size, "), or -1 to skip the row");
  }
  bad = kv_cache::find_bad_position(p.rope.positions, p.rows, max_positions, [](int64_t) { return true; });
  if (bad >= 0) {
    block_check.fail("positions[", bad, "]: found ", p.rope.positions[bad], "; expected a position in [0, ",
                     max_positions, ")");
  }
  const int64_t most = max_pages * p.page_size;
  bad = kv_cache::find_bad_context(p.context_lens, decoding, most);
  if (bad >= 0) {
    block_check.fail("context_lens[", bad, "]: found ", p.context_lens[bad], "; expected a length in [0, ", most,
                     "], what block_tables hold");
  }
  const kv_cache::TableEntry entry = kv_cache::find_bad_page(p.block_tables, p.table_stride, nullptr, p.context_lens,
                                                             decoding, p.page_size, num_pages);
  if (entry.row >= 0) {
    block_check.fail("block_tables[", entry.row, ", ", entry.column, "]: found ",
                     p.block_tables[entry.row * p.table_stride + entry.column], "; expected a page in [0, ", num_pages,
                     ")");
  }
}

Tensor decode_block_cpu(const Tensor& x, const Tensor& loops, const Tensor& positions, const Tensor& slot_mapping,
                        int64_t num_kv_only, const Tensor& block_tables, const Tensor& context_lens, Tensor k_cache,
                        Tensor v_cache, const Tensor& cos_sin, const std::vector<std::optional<Tensor>>& parameters,
                        const std::vector<int64_t>& ranks, int64_t num_loops, int64_t num_heads, int64_t inner_size,
                        double norm_eps, bool norm_plus_one, const std::string& activation, double scale) {
  const Checks& check = block_check;
  const Dtype dtype = check.float_dtype("x", x);
  for (const auto& [name, cache] : {std::pair{"k_cache", &k_cache}, {"v_cache", &v_cache}}) {
    check.dtype(name, *cache, x.scalar_type());
    check.same_device(name, *cache, x, "x");
  }
  check.dtype("cos_sin", cos_sin, dtype == Dtype::kFloat64 ? ScalarType::Double : ScalarType::Float);
  check.same_device("cos_sin", cos_sin, x, "x");
  check.shape("x", x, {{"N"}, {"D"}});
  const int64_t rows = x.size(0), hidden = x.size(1);
  if (num_kv_only < 0 || num_kv_only > rows) {
    check.fail("num_kv_only: found ", num_kv_only, "; expected 0 to ", rows, ", the rows");
  }
  if (num_loops < 1) check.fail("num_loops: found ", num_loops, "; expected at least 1");
  if (inner_size < 1) check.fail("inner_size: found ", inner_size, "; expected at least 1");
  const Dim decoding{"M", rows - num_kv_only};
  check_index("loops", loops, ScalarType::Int, x, {{"N", rows}});
  check_index("positions", positions, ScalarType::Int, x, {{"N", rows}});
  check_index("slot_mapping", slot_mapping, ScalarType::Long, x, {{"N", rows}});
  check_index("block_tables", block_tables, ScalarType::Int, x, {decoding, {"max_pages"}});
  check_index("context_lens", context_lens, ScalarType::Int, x, {decoding});
  check.shape("k_cache", k_cache, {{"K"}, {"num_pages"}, {"page_size"}, {"H_kv"}, {"D_h"}});
  const int64_t num_layers = k_cache.size(0), num_pages = k_cache.size(1), page_size = k_cache.size(2),
                num_kv_heads = k_cache.size(3), head_dim = k_cache.size(4);
  check.shape("v_cache", v_cache,
              {{"K", num_layers},
               {"num_pages", num_pages},
               {"page_size", page_size},
               {"H_kv", num_kv_heads},
               {"D_h", head_dim}});
  check.contiguous("k_cache", k_cache);
  check.contiguous("v_cache", v_cache);
  if (num_heads < 1 || num_kv_heads < 1 || num_heads % num_kv_heads != 0) {
    check.fail("num_heads: found ", num_heads, "; expected a multiple of k_cache's ", num_kv_heads);
  }
  check.shape("cos_sin", cos_sin, {{"max_positions"}, {"rotary_dim"}});
  const int64_t rotary_dim = cos_sin.size(1);
  if (rotary_dim % 2 != 0 || rotary_dim > head_dim) {
    check.fail("cos_sin: found rotary_dim ", rotary_dim, "; expected an even number of at most ", head_dim);
  }
  check.contiguous("cos_sin", cos_sin);
  const elementwise::Activation checked_activation = check_activation(check, activation);
  if (static_cast<int64_t>(parameters.size()) != num_layers * kNumParameters) {
    check.fail("parameters: found ", parameters.size(), " entries; expected ", num_layers * kNumParameters, ", ",
               static_cast<int>(kNumParameters), " for each of k_cache's layers");
  }
  constexpr int64_t kNumRanks = 7;  // q, k, v, out, gate, up, down
  if (static_cast<int64_t>(ranks.size()) != num_layers * kNumRanks) {
    check.fail("ranks: found ", ranks.size(), " entries; expected ", num_layers * kNumRanks, ", ", kNumRanks,
               " for each of k_cache's layers");
  }
  for (size_t i = 0; i < ranks.size(); ++i) {
    if (ranks[i] < 0) check.fail("ranks[", i, "]: found ", ranks[i], "; expected 0 or more");
  }

  const Tensor dense = torch::stable::contiguous(x);
  Tensor out = empty_as(dense);
  decode_block::Params params{};
  params.dtype = dtype;
  params.rows = rows;
  params.num_kv_only = num_kv_only;
  params.hidden_size = hidden;
  params.num_heads = num_heads;
  params.num_kv_heads = num_kv_heads;
  params.head_dim = head_dim;
  params.inner_size = inner_size;
  params.num_loops = num_loops;
  params.loops = loops.const_data_ptr<int32_t>();
  params.norm_eps = norm_eps;
  params.norm_plus_one = norm_plus_one;
  params.activation = checked_activation;
  params.slots = slot_mapping.const_data_ptr<int64_t>();
  params.rope = {positions.const_data_ptr<int32_t>(), cos_sin.const_data_ptr(), rotary_dim};
  params.page_size = page_size;
  params.scale = scale;
  params.block_tables = block_tables.const_data_ptr<int32_t>();
  params.table_stride = block_tables.size(1);
  params.context_lens = context_lens.const_data_ptr<int32_t>();
  params.x = dense.const_data_ptr();
  params.out = out.mutable_data_ptr();
  const Parameters read(parameters, x, dtype, num_loops);
  const int64_t q_width = num_heads * head_dim, kv_width = num_kv_heads * head_dim;
  const int64_t layer_bytes = num_pages * page_size * kv_width * bytes_of(dtype);
  for (int64_t i = 0; i < num_layers; ++i) {
    const int64_t* of_layer = ranks.data() + i * kNumRanks;
    decode_block::Layer layer{};
    layer.attn_norm = read.norm(i, kAttnNorm, hidden, true);
    layer.q_norm = read.norm(i, kQNorm, head_dim, false);
    layer.k_norm = read.norm(i, kKNorm, head_dim, false);
    layer.mlp_norm = read.norm(i, kMlpNorm, hidden, true);
    layer.qkv = read.linear(i, kQkv, hidden, {q_width, kv_width, kv_width}, of_layer);
    layer.out = read.linear(i, kOut, q_width, {hidden}, of_layer + 3);
    layer.gate_up = read.linear(i, kGateUp, hidden, {inner_size, inner_size}, of_layer + 4);
    layer.down = read.linear(i, kDown, inner_size, {hidden}, of_layer + 6);
    layer.k_cache = static_cast<char*>(k_cache.mutable_data_ptr()) + i * layer_bytes;
    layer.v_cache = static_cast<char*>(v_cache.mutable_data_ptr()) + i * layer_bytes;
    params.layers.push_back(std::move(layer));
  }
  check_values(params, num_pages, block_tables.size(1), cos_sin.size(0));
  decode_block::run_cpu(params, torch_parallel);
  return out;
}

}  // namespace
}  // namespace rrt

STABLE_TORCH_LIBRARY_FRAGMENT(rrt, library) {
  library.def(
      "decode_block(Tensor x, Tensor loops, Tensor positions, Tensor slot_mapping, int num_kv_only, "
      "Tensor block_tables, Tensor context_lens, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor cos_sin, "
      "Tensor?[] parameters, int[] ranks, int num_loops, int num_heads, int inner_size, float norm_eps, "
      "bool norm_plus_one, str activation, float scale) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(rrt, CPU, library) { library.impl("decode_block", TORCH_BOX(&rrt::decode_block_cpu)); }
