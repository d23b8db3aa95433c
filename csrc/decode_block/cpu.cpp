// A pass of few rows through all layers of a block on the CPU: the other families' kernels one after the other, without
// a tensor in between. Narrow layers take less time than a call from Python for each.
#include "decode_block/launch.h"

#include <algorithm>
#include <cstring>

#include "arena.h"
#include "decode_block/team.h"
#include "kv_cache/plan.h"
#include "packed_linear/launch.h"
#include "parallel.h"

namespace rrt::decode_block {
namespace {

// Elements that are worth a thread, as in elementwise/cpu.cpp.
constexpr int64_t kGrainElements = 1 << 14;
// Multiply-adds of a linear that are worth a thread, as in loop_lora/cpu.cpp.
constexpr int64_t kThreadWork = 1 << 16;
constexpr int64_t kMaxThreads = 256;

void run_serially(int64_t begin, int64_t end, int64_t, void (*body)(int64_t, int64_t, void*), void* context) {
  if (begin < end) body(begin, end, context);
}

// What the layers hand on, and the loops' groups and plans, which are the same for all of them.
class Pass {
 public:
  Pass(const Params& params, ParallelFor parallel_for)
      : p_(params),
        parallel_for_(parallel_for),
        bytes_(bytes_of(params.dtype)),
        first_(params.num_kv_only),
        decoding_(params.rows - params.num_kv_only),
        q_width_(params.num_heads * params.head_dim),
        kv_width_(params.num_kv_heads * params.head_dim),
        kv_only_groups_(loop_lora::group_rows_by_loop(params.loops, first_, params.num_loops)),
        decoding_groups_(loop_lora::group_rows_by_loop(params.loops + first_, decoding_, params.num_loops)),
        plan_(kv_cache::plan_attention(nullptr, params.context_lens, decoding_,
                                       params.num_heads / params.num_kv_heads)) {
    arena_.fill([&] {
      normed_ = arena_.take<char>(p_.rows * p_.hidden_size * bytes_);
      qkv_ = arena_.take<char>(p_.rows * (q_width_ + 2 * kv_width_) * bytes_);
      attended_ = arena_.take<char>(decoding_ * q_width_ * bytes_);
      change_ = arena_.take<char>(decoding_ * p_.hidden_size * bytes_);
      gate_up_ = arena_.take<char>(decoding_ * 2 * p_.inner_size * bytes_);
      gated_ = arena_.take<char>(decoding_ * p_.inner_size * bytes_);
      scales_ = arena_.take<double>(std::max(p_.rows, p_.num_heads));
    });
    std::memcpy(p_.out, p_.x, p_.rows * p_.hidden_size * bytes_);
  }

  void run(const Layer& layer) {
    char* x = static_cast<char*>(p_.out);
    norm(layer.attn_norm, x, 0, p_.rows, normed_);
    project_kept(layer.qkv);
    linear(layer.qkv, decoding_groups_, normed_ + first_ * p_.hidden_size * bytes_, decoding_,
           qkv_ + first_ * qkv_width() * bytes_);
    norm_heads(layer.q_norm, first_, 0, p_.num_heads);
    norm_heads(layer.k_norm, 0, q_width_, p_.num_kv_heads);
    write(layer);
    if (decoding_ == 0) return;
    x += first_ * p_.hidden_size * bytes_;
    attend(layer);
    linear(layer.out, decoding_groups_, attended_, decoding_, change_);
    add_to(x);
    norm(layer.mlp_norm, x, first_, decoding_, normed_);
    linear(layer.gate_up, decoding_groups_, normed_, decoding_, gate_up_);
    gate();
    linear(layer.down, decoding_groups_, gated_, decoding_, change_);
    add_to(x);
  }

 private:
  int64_t qkv_width() const { return q_width_ + 2 * kv_width_; }

  const void* weight_of(const NormWeight& norm, int64_t row) const {
    return static_cast<const char*>(norm.data) + p_.loops[row] * norm.loop_stride * bytes_;
  }

  elementwise::NormParams norm_params(const void* weight, int64_t rows, int64_t width, const char* x, char* out) const {
    elementwise::NormParams params{};
    params.dtype = p_.dtype;
    params.rows = rows;
    params.width = width;
    params.x = x;
    params.weight = weight;
    params.eps = p_.norm_eps;
    params.weight_plus_one = p_.norm_plus_one;
    params.out = out;
    params.scale = scales_;
    return params;
  }

  // Of `rows` rows of x, which are those of the pass from `first` on.
  void norm(const NormWeight& weight, const char* x, int64_t first, int64_t rows, char* out) const {
    if (weight.loop_stride == 0) {
      elementwise::norm_cpu(norm_params(weight.data, rows, p_.hidden_size, x, out), parallel_for_);
      return;
    }
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t begin = row * p_.hidden_size * bytes_;
      elementwise::norm_cpu(norm_params(weight_of(weight, first + row), 1, p_.hidden_size, x + begin, out + begin),
                            run_serially);
    }
  }

  // In place, of the heads that begin at element `begin` of the queries, keys and values of rows from `first` on.
  void norm_heads(const NormWeight& weight, int64_t first, int64_t begin, int64_t num_heads) const {
    if (weight.data == nullptr) return;
    for (int64_t row = first; row < p_.rows; ++row) {
      char* heads = qkv_ + (row * qkv_width() + begin) * bytes_;
      elementwise::norm_cpu(norm_params(weight_of(weight, row), num_heads, p_.head_dim, heads, heads), run_serially);
    }
  }

  void linear(const loop_lora::Params& weights, const loop_lora::LoopGroups& groups, const char* x, int64_t rows,
              char* y) const {
    loop_lora::Params params = weights;
    params.m = rows;
    params.x = x;
    params.x_row_stride = params.k;
    params.y = y;
    loop_lora::run_cpu(params, groups, parallel_for_);
  }

  // Keys and values of the kv-only rows; their queries are left out, whole panels of them.
  void project_kept(const loop_lora::Params& qkv) const {
    if (first_ == 0) return;
    loop_lora::Params params = qkv;
    params.first_panel = q_width_ / packed_linear::kPanel;
    // A panel that queries and keys share needs the ranks of both.
    const bool is_apart = q_width_ % packed_linear::kPanel == 0;
    params.first_rank_panel = is_apart ? qkv.segments.front().rank / packed_linear::kPanel : 0;
    linear(params, kv_only_groups_, normed_, first_, qkv_);
  }

  void write(const Layer& layer) const {
    kv_cache::WriteParams params{};
    params.dtype = p_.dtype;
    params.m = p_.rows;
    params.num_kv_heads = p_.num_kv_heads;
    params.head_dim = p_.head_dim;
    params.k_row_stride = params.v_row_stride = qkv_width();
    params.k_head_stride = params.v_head_stride = p_.head_dim;
    params.k = qkv_ + q_width_ * bytes_;
    params.v = qkv_ + (q_width_ + kv_width_) * bytes_;
    params.k_cache = layer.k_cache;
    params.v_cache = layer.v_cache;
    params.slots = p_.slots;
    params.rope = p_.rope;
    kv_cache::write_cpu(params, parallel_for_);
  }

  void attend(const Layer& layer) const {
    kv_cache::AttentionParams params{};
    params.dtype = p_.dtype;
    params.num_queries = decoding_;
    params.num_heads = p_.num_heads;
    params.num_kv_heads = p_.num_kv_heads;
    params.head_dim = p_.head_dim;
    params.page_size = p_.page_size;
    params.scale = p_.scale;
    params.q_row_stride = qkv_width();
    params.q_head_stride = p_.head_dim;
    params.q = qkv_ + first_ * qkv_width() * bytes_;
    params.k_cache = layer.k_cache;
    params.v_cache = layer.v_cache;
    params.block_tables = p_.block_tables;
    params.table_stride = p_.table_stride;
    params.rope = p_.rope;
    params.rope.positions += first_;
    params.out = attended_;
    kv_cache::attention_cpu(params, plan_, parallel_for_);
  }

  void gate() const {
    const int64_t row_bytes = p_.inner_size * bytes_;
    run_ranges(decoding_, grain_of(kGrainElements, p_.inner_size), parallel_for_, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const char* gate = gate_up_ + 2 * row * row_bytes;
        elementwise::gate_cpu({p_.dtype, p_.activation, p_.inner_size, gate, gate + row_bytes, gated_ + row * row_bytes},
                              run_serially);
      }
    });
  }

  // The decode rows' states += change_.
  void add_to(char* x) const {
    elementwise::add_cpu({p_.dtype, decoding_ * p_.hidden_size, x, change_, x}, parallel_for_);
  }

  const Params& p_;
  ParallelFor parallel_for_;
  int64_t bytes_, first_, decoding_, q_width_, kv_width_;
  loop_lora::LoopGroups kv_only_groups_, decoding_groups_;
  kv_cache::AttentionPlan plan_;
  Arena arena_;
  char *normed_ = nullptr, *qkv_ = nullptr, *attended_ = nullptr, *change_ = nullptr, *gate_up_ = nullptr,
       *gated_ = nullptr;
  double* scales_ = nullptr;
};

}  // namespace

void run_cpu(const Params& params, ParallelFor parallel_for) {
  if (params.rows == 0) return;
  // More threads than the widest linear gives work would wait for it.
  const int64_t work = params.rows * params.hidden_size * 2 * params.inner_size;
  const int64_t threads = std::clamp<int64_t>(work / kThreadWork, 1, kMaxThreads);
  Team::run(threads, parallel_for, [&] {
    Pass pass(params, Team::parallel_for);
    for (const Layer& layer : params.layers) pass.run(layer);
  });
}

}  // namespace rrt::decode_block
