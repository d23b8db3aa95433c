// rrt::loop_kv_write, loop_kv_attention and loop_kv_prefill on torch's stable ABI: schemas, argument checks,
// host planning. The kernels lie behind raw-pointer launch functions and know nothing of torch.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>

#include "checks.h"
#include "kv_cache/launch.h"

namespace rrt {
namespace {

constexpr Checks write_check{"loop_kv_write"};
constexpr Checks attention_check{"loop_kv_attention"};
constexpr Checks prefill_check{"loop_kv_prefill"};

void check_cache(const Checks& check, const Tensor& k_cache, const Tensor& v_cache, int64_t num_kv_heads,
                 int64_t head_dim) {
  check.shape("k_cache", k_cache, {{"num_pages"}, {"page_size"}, {"H_kv", num_kv_heads}, {"D_h", head_dim}});
  check.shape("v_cache", v_cache,
              {{"num_pages", k_cache.size(0)}, {"page_size", k_cache.size(1)}, {"H_kv", k_cache.size(2)},
               {"D_h", head_dim}});
  check.contiguous("k_cache", k_cache);
  check.contiguous("v_cache", v_cache);
}

// The int32 or int64 values of an index tensor, copied if they are not adjacent.
template <class T>
struct Indices {
  Tensor dense;
  const T* data;
  explicit Indices(const Tensor& tensor) : dense(torch::stable::contiguous(tensor)), data(dense.const_data_ptr<T>()) {}
};

// Rotation of x [rows, heads, D_h] and what it refers to.
struct CheckedRope {
  std::optional<Indices<int32_t>> positions;
  int64_t max_positions = 0;
  kv_cache::Rope rope{};

  template <class Kept>
  void check_values(const Checks& check, Kept kept) const {
    if (!positions) return;
    const int64_t bad =
        kv_cache::find_bad_position(positions->data, positions->dense.size(0), max_positions, kept);
    if (bad >= 0) {
      check.fail("positions[", bad, "]: found ", positions->data[bad], "; expected a position in [0, ", max_positions,
                 ")");
    }
  }
};

CheckedRope check_rope(const Checks& check, const std::optional<Tensor>& positions,
                       const std::optional<Tensor>& cos_sin, const Tensor& x, const char* x_name) {
  CheckedRope checked;
  if (!positions && !cos_sin) return checked;
  if (!positions) check.fail("positions: found None; expected positions and cos_sin together");
  if (!cos_sin) check.fail("cos_sin: found None; expected positions and cos_sin together");
  check.dtype("positions", *positions, ScalarType::Int);
  check.dtype("cos_sin", *cos_sin, x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float);
  check.same_device("positions", *positions, x, x_name);
  check.same_device("cos_sin", *cos_sin, x, x_name);
  check.shape("positions", *positions, {{"rows", x.size(0)}});
  check.shape("cos_sin", *cos_sin, {{"max_positions"}, {"rotary_dim"}});
  const int64_t rotary_dim = cos_sin->size(1);
  if (rotary_dim % 2 != 0 || rotary_dim > x.size(2)) {
    check.fail("cos_sin: found rotary_dim ", rotary_dim, "; expected an even number of at most ", x.size(2));
  }
  check.contiguous("cos_sin", *cos_sin);
  checked.positions.emplace(*positions);
  checked.max_positions = cos_sin->size(0);
  checked.rope = {checked.positions->data, cos_sin->const_data_ptr(), rotary_dim};
  return checked;
}

// x [rows, heads, D_h] with the elements of a head adjacent.
Tensor with_dense_heads(const Tensor& x) {
  return x.size(2) <= 1 || x.stride(2) == 1 ? x : torch::stable::contiguous(x);
}

void loop_kv_write_cpu(const Tensor& k, const Tensor& v, Tensor k_cache, Tensor v_cache, const Tensor& slot_mapping,
                       const std::optional<Tensor>& positions, const std::optional<Tensor>& cos_sin) {
  const Checks& check = write_check;
  const Dtype dtype = check.float_dtype("k", k);
  check.dtype("v", v, k.scalar_type());
  check.same_device("v", v, k, "k");
  check.dtype("k_cache", k_cache, k.scalar_type());
  check.same_device("k_cache", k_cache, k, "k");
  check.dtype("v_cache", v_cache, k.scalar_type());
  check.same_device("v_cache", v_cache, k, "k");
  check.dtype("slot_mapping", slot_mapping, ScalarType::Long);
  check.same_device("slot_mapping", slot_mapping, k, "k");
  check.shape("k", k, {{"M"}, {"H_kv"}, {"D_h"}});
  const int64_t m = k.size(0), num_kv_heads = k.size(1), head_dim = k.size(2);
  check.shape("v", v, {{"M", m}, {"H_kv", num_kv_heads}, {"D_h", head_dim}});
  check_cache(check, k_cache, v_cache, num_kv_heads, head_dim);
  check.shape("slot_mapping", slot_mapping, {{"M", m}});
  const CheckedRope rope = check_rope(check, positions, cos_sin, k, "k");

  const int64_t num_slots = k_cache.size(0) * k_cache.size(1);
  const Indices<int64_t> slots(slot_mapping);
  const int64_t bad = kv_cache::find_bad_slot(slots.data, m, num_slots);
  if (bad >= 0) {
    check.fail("slot_mapping[", bad, "]: found ", slots.data[bad], "; expected a slot in [0, ", num_slots,
               "), or -1 to skip the row");
  }
  rope.check_values(check, [&](int64_t row) { return slots.data[row] >= 0; });

  const Tensor k_rows = with_dense_heads(k), v_rows = with_dense_heads(v);
  kv_cache::WriteParams params{};
  params.dtype = dtype;
  params.m = m;
  params.num_kv_heads = num_kv_heads;
  params.head_dim = head_dim;
  params.k_row_stride = k_rows.stride(0);
  params.k_head_stride = k_rows.stride(1);
  params.v_row_stride = v_rows.stride(0);
  params.v_head_stride = v_rows.stride(1);
  params.k = k_rows.const_data_ptr();
  params.v = v_rows.const_data_ptr();
  params.k_cache = k_cache.mutable_data_ptr();
  params.v_cache = v_cache.mutable_data_ptr();
  params.slots = slots.data;
  params.rope = rope.rope;
  kv_cache::write_cpu(params, torch_parallel);
}

// Decode has no query_start: a row is a sequence with one query.
Tensor attention_cpu(const Checks& check, const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                     const Tensor& block_tables, const Tensor* query_start, const Tensor& context_lens, double scale,
                     const std::optional<Tensor>& positions, const std::optional<Tensor>& cos_sin) {
  const Dtype dtype = check.float_dtype("q", q);
  check.dtype("k_cache", k_cache, q.scalar_type());
  check.same_device("k_cache", k_cache, q, "q");
  check.dtype("v_cache", v_cache, q.scalar_type());
  check.same_device("v_cache", v_cache, q, "q");
  check.dtype("block_tables", block_tables, ScalarType::Int);
  check.same_device("block_tables", block_tables, q, "q");
  if (query_start) check.dtype("query_start", *query_start, ScalarType::Int);
  if (query_start) check.same_device("query_start", *query_start, q, "q");
  check.dtype("context_lens", context_lens, ScalarType::Int);
  check.same_device("context_lens", context_lens, q, "q");
  check.shape("q", q, {{query_start ? "T" : "M"}, {"H"}, {"D_h"}});
  const int64_t num_queries = q.size(0), num_heads = q.size(1), head_dim = q.size(2);
  check_cache(check, k_cache, v_cache, -1, head_dim);
  const int64_t num_pages = k_cache.size(0), page_size = k_cache.size(1), num_kv_heads = k_cache.size(2);
  if (num_kv_heads > 0 ? num_heads % num_kv_heads != 0 : num_heads != 0) {
    check.fail("q: found ", num_heads, " heads; expected a multiple of k_cache's ", num_kv_heads);
  }
  check.shape("block_tables", block_tables, {query_start ? Dim{"S"} : Dim{"M", num_queries}, {"max_pages"}});
  const int64_t num_sequences = block_tables.size(0), max_pages = block_tables.size(1);
  if (query_start) check.shape("query_start", *query_start, {{"S + 1", num_sequences + 1}});
  check.shape("context_lens", context_lens, {{"S", num_sequences}});
  const CheckedRope rope = check_rope(check, positions, cos_sin, q, "q");

  std::optional<Indices<int32_t>> starts;
  if (query_start) {
    starts.emplace(*query_start);
    const int64_t bad = kv_cache::find_bad_query_start(starts->data, num_sequences, num_queries);
    if (bad >= 0) {
      const int32_t found = starts->data[bad];
      if (bad == 0) check.fail("query_start[0]: found ", found, "; expected 0");
      if (found < starts->data[bad - 1]) {
        check.fail("query_start[", bad, "]: found ", found, "; expected at least ", starts->data[bad - 1],
                   ", the entry before");
      }
      check.fail("query_start[", bad, "]: found ", found, "; expected ", num_queries, ", the number of queries");
    }
  }
  const int32_t* start = starts ? starts->data : nullptr;
  const Indices<int32_t> contexts(context_lens);
  const int64_t most = max_pages * page_size;
  int64_t bad = kv_cache::find_bad_context(contexts.data, num_sequences, most);
  if (bad >= 0) {
    check.fail("context_lens[", bad, "]: found ", contexts.data[bad], "; expected a length in [0, ", most,
               "], what block_tables hold");
  }
  bad = kv_cache::find_short_context(start, contexts.data, num_sequences);
  if (bad >= 0) {
    check.fail("context_lens[", bad, "]: found ", contexts.data[bad], "; expected at least ",
               kv_cache::num_queries_of(start, contexts.data, bad), ", the queries of the sequence");
  }
  const Tensor tables =
      max_pages <= 1 || block_tables.stride(1) == 1 ? block_tables : torch::stable::contiguous(block_tables);
  const int32_t* table = tables.const_data_ptr<int32_t>();
  const kv_cache::TableEntry entry = kv_cache::find_bad_page(table, tables.stride(0), start, contexts.data,
                                                             num_sequences, page_size, num_pages);
  if (entry.row >= 0) {
    check.fail("block_tables[", entry.row, ", ", entry.column, "]: found ",
               table[entry.row * tables.stride(0) + entry.column], "; expected a page in [0, ", num_pages, ")");
  }
  rope.check_values(check, [&](int64_t row) { return start != nullptr || contexts.data[row] > 0; });

  const Tensor q_rows = with_dense_heads(q);
  const int64_t out_size[] = {num_queries, num_heads, head_dim};
  Tensor out = torch::stable::new_empty(q, out_size);
  kv_cache::AttentionParams params{};
  params.dtype = dtype;
  params.num_queries = num_queries;
  params.num_heads = num_heads;
  params.num_kv_heads = num_kv_heads;
  params.head_dim = head_dim;
  params.page_size = page_size;
  params.scale = scale;
  params.q_row_stride = q_rows.stride(0);
  params.q_head_stride = q_rows.stride(1);
  params.q = q_rows.const_data_ptr();
  params.k_cache = k_cache.const_data_ptr();
  params.v_cache = v_cache.const_data_ptr();
  params.block_tables = table;
  params.table_stride = tables.stride(0);
  params.rope = rope.rope;
  params.out = out.mutable_data_ptr();
  const int64_t group = num_kv_heads > 0 ? num_heads / num_kv_heads : 0;
  kv_cache::attention_cpu(params, kv_cache::plan_attention(start, contexts.data, num_sequences, group),
                          torch_parallel);
  return out;
}

Tensor loop_kv_attention_cpu(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                             const Tensor& block_tables, const Tensor& context_lens, double scale,
                             const std::optional<Tensor>& positions, const std::optional<Tensor>& cos_sin) {
  return attention_cpu(attention_check, q, k_cache, v_cache, block_tables, nullptr, context_lens, scale, positions,
                       cos_sin);
}

Tensor loop_kv_prefill_cpu(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const Tensor& block_tables,
                           const Tensor& query_start, const Tensor& context_lens, double scale,
                           const std::optional<Tensor>& positions, const std::optional<Tensor>& cos_sin) {
  return attention_cpu(prefill_check, q, k_cache, v_cache, block_tables, &query_start, context_lens, scale, positions,
                       cos_sin);
}

}  // namespace
}  // namespace rrt

STABLE_TORCH_LIBRARY_FRAGMENT(rrt, library) {
  library.def(
      "loop_kv_write(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slot_mapping, "
      "Tensor? positions=None, Tensor? cos_sin=None) -> ()");
  library.def(
      "loop_kv_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_tables, Tensor context_lens, "
      "float scale, Tensor? positions=None, Tensor? cos_sin=None) -> Tensor");
  library.def(
      "loop_kv_prefill(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_tables, Tensor query_start, "
      "Tensor context_lens, float scale, Tensor? positions=None, Tensor? cos_sin=None) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(rrt, CPU, library) {
  library.impl("loop_kv_write", TORCH_BOX(&rrt::loop_kv_write_cpu));
  library.impl("loop_kv_attention", TORCH_BOX(&rrt::loop_kv_attention_cpu));
  library.impl("loop_kv_prefill", TORCH_BOX(&rrt::loop_kv_prefill_cpu));
}
