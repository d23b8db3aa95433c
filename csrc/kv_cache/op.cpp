// rrt::loop_kv_write, loop_kv_attention and loop_kv_prefill on torch's stable ABI: schemas, argument checks,
// host planning. The kernels lie behind raw-pointer launch functions and know nothing of torch.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <utility>

#include "checks.h"
#include "kv_cache/cuda_launch.h"
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

// The rotation of x [rows, heads, D_h], and the tensors that it points into.
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

// A call whose arguments have been checked, but for the values of slots and positions, and the tensors that it points
// into.
struct WriteCall {
  WriteCall(const Tensor& keys, const Tensor& values, const Tensor& k_cache, const Tensor& slot_mapping,
            CheckedRope checked_rope)
      : num_slots(k_cache.size(0) * k_cache.size(1)),
        k(with_dense_last_dim(keys)),
        v(with_dense_last_dim(values)),
        slots(slot_mapping),
        rope(std::move(checked_rope)) {}

  kv_cache::WriteParams params{};
  int64_t num_slots;
  Tensor k, v;
  Indices<int64_t> slots;
  CheckedRope rope;
};

WriteCall prepare_write(const Tensor& k, const Tensor& v, Tensor& k_cache, Tensor& v_cache, const Tensor& slot_mapping,
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
  WriteCall call(k, v, k_cache, slot_mapping, check_rope(check, positions, cos_sin, k, "k"));
  kv_cache::WriteParams& params = call.params;
  params.dtype = dtype;
  params.m = m;
  params.num_kv_heads = num_kv_heads;
  params.head_dim = head_dim;
  params.k_row_stride = call.k.stride(0);
  params.k_head_stride = call.k.stride(1);
  params.v_row_stride = call.v.stride(0);
  params.v_head_stride = call.v.stride(1);
  params.k = call.k.const_data_ptr();
  params.v = call.v.const_data_ptr();
  params.k_cache = k_cache.mutable_data_ptr();
  params.v_cache = v_cache.mutable_data_ptr();
  params.slots = call.slots.data;
  params.rope = call.rope.rope;
  return call;
}

void loop_kv_write_cpu(const Tensor& k, const Tensor& v, Tensor k_cache, Tensor v_cache, const Tensor& slot_mapping,
                       const std::optional<Tensor>& positions, const std::optional<Tensor>& cos_sin) {
  const WriteCall call = prepare_write(k, v, k_cache, v_cache, slot_mapping, positions, cos_sin);
  const int64_t bad = kv_cache::find_bad_slot(call.slots.data, call.params.m, call.num_slots);
  if (bad >= 0) {
    write_check.fail("slot_mapping[", bad, "]: found ", call.slots.data[bad], "; expected a slot in [0, ",
                     call.num_slots, "), or -1 to skip the row");
  }
  call.rope.check_values(write_check, [&](int64_t row) { return call.slots.data[row] >= 0; });
  kv_cache::write_cpu(call.params, torch_parallel);
}

// A call whose arguments have been checked, but for the values of lengths, pages and positions, and the tensors that it
// points into.
struct AttentionCall {
  AttentionCall(const Tensor& queries, const Tensor& k_cache, const Tensor& tables, const Tensor* query_starts,
                const Tensor& context_lens, CheckedRope checked_rope)
      : num_sequences(tables.size(0)),
        num_pages(k_cache.size(0)),
        max_pages(tables.size(1)),
        q(with_dense_last_dim(queries)),
        block_tables(with_dense_last_dim(tables)),
        out(empty_as(queries)),
        contexts(context_lens),
        rope(std::move(checked_rope)) {
    if (query_starts) starts.emplace(*query_starts);
  }

  kv_cache::AttentionParams params{};
  int64_t num_sequences, num_pages, max_pages;
  Tensor q, block_tables, out;
  std::optional<Indices<int32_t>> starts;
  Indices<int32_t> contexts;
  CheckedRope rope;

  const int32_t* query_start() const { return starts ? starts->data : nullptr; }
};

// Decode has no query_start: a row is a sequence with one query.
AttentionCall prepare_attention(const Checks& check, const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                                const Tensor& block_tables, const Tensor* query_start, const Tensor& context_lens,
                                double scale, const std::optional<Tensor>& positions,
                                const std::optional<Tensor>& cos_sin) {
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
  const int64_t page_size = k_cache.size(1), num_kv_heads = k_cache.size(2);
  if (num_kv_heads > 0 ? num_heads % num_kv_heads != 0 : num_heads != 0) {
    check.fail("q: found ", num_heads, " heads; expected a multiple of k_cache's ", num_kv_heads);
  }
  check.shape("block_tables", block_tables, {query_start ? Dim{"S"} : Dim{"M", num_queries}, {"max_pages"}});
  const int64_t num_sequences = block_tables.size(0);
  if (query_start) check.shape("query_start", *query_start, {{"S + 1", num_sequences + 1}});
  check.shape("context_lens", context_lens, {{"S", num_sequences}});
  AttentionCall call(q, k_cache, block_tables, query_start, context_lens,
                     check_rope(check, positions, cos_sin, q, "q"));
  kv_cache::AttentionParams& params = call.params;
  params.dtype = dtype;
  params.num_queries = num_queries;
  params.num_heads = num_heads;
  params.num_kv_heads = num_kv_heads;
  params.head_dim = head_dim;
  params.page_size = page_size;
  params.scale = scale;
  params.q_row_stride = call.q.stride(0);
  params.q_head_stride = call.q.stride(1);
  params.q = call.q.const_data_ptr();
  params.k_cache = k_cache.const_data_ptr();
  params.v_cache = v_cache.const_data_ptr();
  params.block_tables = call.block_tables.const_data_ptr<int32_t>();
  params.table_stride = call.block_tables.stride(0);
  params.rope = call.rope.rope;
  params.out = call.out.mutable_data_ptr();
  return call;
}

void check_attention_values(const Checks& check, const AttentionCall& call) {
  const int32_t* start = call.query_start();
  const int32_t* contexts = call.contexts.data;
  if (start != nullptr) {
    const int64_t bad = kv_cache::find_bad_query_start(start, call.num_sequences, call.params.num_queries);
    if (bad == 0 && start[0] != 0) check.fail("query_start[0]: found ", start[0], "; expected 0");
    if (bad > 0 && start[bad] < start[bad - 1]) {
      check.fail("query_start[", bad, "]: found ", start[bad], "; expected at least ", start[bad - 1],
                 ", the entry before");
    }
    if (bad >= 0) {
      check.fail("query_start[", bad, "]: found ", start[bad], "; expected ", call.params.num_queries,
                 ", the number of queries");
    }
  }
  const int64_t most = call.max_pages * call.params.page_size;
  int64_t bad = kv_cache::find_bad_context(contexts, call.num_sequences, most);
  if (bad >= 0) {
    check.fail("context_lens[", bad, "]: found ", contexts[bad], "; expected a length in [0, ", most,
               "], what block_tables hold");
  }
  bad = kv_cache::find_short_context(start, contexts, call.num_sequences);
  if (bad >= 0) {
    check.fail("context_lens[", bad, "]: found ", contexts[bad], "; expected at least ",
               kv_cache::num_queries_of(start, contexts, bad), ", the queries of the sequence");
  }
  const int32_t* tables = call.params.block_tables;
  const int64_t stride = call.params.table_stride;
  const kv_cache::TableEntry entry = kv_cache::find_bad_page(tables, stride, start, contexts, call.num_sequences,
                                                             call.params.page_size, call.num_pages);
  if (entry.row >= 0) {
    check.fail("block_tables[", entry.row, ", ", entry.column, "]: found ", tables[entry.row * stride + entry.column],
               "; expected a page in [0, ", call.num_pages, ")");
  }
  call.rope.check_values(check, [&](int64_t row) { return start != nullptr || contexts[row] > 0; });
}

Tensor attention_cpu(const Checks& check, const AttentionCall& call) {
  check_attention_values(check, call);
  const int64_t num_kv_heads = call.params.num_kv_heads;
  const int64_t group = num_kv_heads > 0 ? call.params.num_heads / num_kv_heads : 0;
  const auto plan = kv_cache::plan_attention(call.query_start(), call.contexts.data, call.num_sequences, group);
  kv_cache::attention_cpu(call.params, plan, torch_parallel);
  return call.out;
}

Tensor loop_kv_attention_cpu(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                             const Tensor& block_tables, const Tensor& context_lens, double scale,
                             const std::optional<Tensor>& positions, const std::optional<Tensor>& cos_sin) {
  return attention_cpu(attention_check, prepare_attention(attention_check, q, k_cache, v_cache, block_tables, nullptr,
                                                          context_lens, scale, positions, cos_sin));
}

Tensor loop_kv_prefill_cpu(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const Tensor& block_tables,
                           const Tensor& query_start, const Tensor& context_lens, double scale,
                           const std::optional<Tensor>& positions, const std::optional<Tensor>& cos_sin) {
  return attention_cpu(prefill_check, prepare_attention(prefill_check, q, k_cache, v_cache, block_tables, &query_start,
                                                        context_lens, scale, positions, cos_sin));
}

#ifdef RRT_CUDA
// The values of slots, lengths, pages and positions stay on the device (see kv_cache/cuda_launch.h).
void loop_kv_write_cuda(const Tensor& k, const Tensor& v, Tensor k_cache, Tensor v_cache, const Tensor& slot_mapping,
                        const std::optional<Tensor>& positions, const std::optional<Tensor>& cos_sin) {
  const WriteCall call = prepare_write(k, v, k_cache, v_cache, slot_mapping, positions, cos_sin);
  const int32_t device = k.get_device_index();
  const char* error = kv_cache::write_cuda({&call.params, call.num_slots, call.rope.max_positions}, device,
                                           current_cuda_stream(device));
  if (error != nullptr) write_check.fail("CUDA: ", error);
}

Tensor attention_cuda(const Checks& check, const AttentionCall& call) {
  if (call.params.head_dim > kv_cache::kCudaMaxHeadDim) {
    check.fail("q: found head_dim ", call.params.head_dim, "; expected at most ", kv_cache::kCudaMaxHeadDim,
               " on CUDA");
  }
  kv_cache::CudaAttentionParams params{};
  params.params = &call.params;
  params.query_start = call.query_start();
  params.context_lens = call.contexts.data;
  params.num_sequences = call.num_sequences;
  params.num_pages = call.num_pages;
  params.max_pages = call.max_pages;
  params.max_positions = call.rope.max_positions;
  const int64_t scratch_size[] = {kv_cache::cuda_scratch_bytes(params) / static_cast<int64_t>(sizeof(int32_t))};
  const Tensor scratch = torch::stable::new_empty(call.contexts.dense, scratch_size);
  params.partial = scratch.mutable_data_ptr();
  const int32_t device = call.q.get_device_index();
  const char* error = kv_cache::attention_cuda(params, device, current_cuda_stream(device));
  if (error != nullptr) check.fail("CUDA: ", error);
  return call.out;
}

Tensor loop_kv_attention_cuda(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                              const Tensor& block_tables, const Tensor& context_lens, double scale,
                              const std::optional<Tensor>& positions, const std::optional<Tensor>& cos_sin) {
  return attention_cuda(attention_check, prepare_attention(attention_check, q, k_cache, v_cache, block_tables, nullptr,
                                                           context_lens, scale, positions, cos_sin));
}

Tensor loop_kv_prefill_cuda(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const Tensor& block_tables,
                            const Tensor& query_start, const Tensor& context_lens, double scale,
                            const std::optional<Tensor>& positions, const std::optional<Tensor>& cos_sin) {
  return attention_cuda(prefill_check, prepare_attention(prefill_check, q, k_cache, v_cache, block_tables,
                                                         &query_start, context_lens, scale, positions, cos_sin));
}
#endif

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

#ifdef RRT_CUDA
STABLE_TORCH_LIBRARY_IMPL(rrt, CUDA, library) {
  library.impl("loop_kv_write", TORCH_BOX(&rrt::loop_kv_write_cuda));
  library.impl("loop_kv_attention", TORCH_BOX(&rrt::loop_kv_attention_cuda));
  library.impl("loop_kv_prefill", TORCH_BOX(&rrt::loop_kv_prefill_cuda));
}
#endif
