// Compiled once per instruction set: RRT_KERNELS names the table, RRT_VECTOR_BYTES is its registers' size.
//
// Attention goes through the slots of a context in tiles of kTileSlots, which are read once for all queries and
// query heads of the task: scores = Q K^T, the running softmax, out += P V. With many rows (prefill) a tile is first
// laid out for multiply_rows, K transposed. With few (decode) that would cost more than the products: they read the
// cache where it is, the first one as dot products.
#include "kv_cache/cpu_kernels.h"
#include "kv_cache/cpu_products.h"
#include "rounding.h"

namespace rrt::kv_cache {
namespace {

// Rotates the first rotary_dim elements of a head by vectors, which read(i, lanes) gives and write(i, lanes, vector)
// takes, of up to kLanes elements from i on.
template <class D, class Read, class Write>
inline void rotate(const Rope& rope, int64_t row, Read read, Write write) {
  using Acc = typename D::Acc;
  const Acc* cos = static_cast<const Acc*>(rope.cos_sin) + rope.positions[row] * rope.rotary_dim;
  const int64_t half = rope.rotary_dim / 2;
  const Acc* sin = cos + half;
  for (int64_t i = 0; i < half; i += kLanes<D>) {
    const int64_t lanes = smaller(half - i, kLanes<D>);
    typename D::Vec c = {}, s = {};
    std::memcpy(&c, cos + i, lanes * sizeof(Acc));
    std::memcpy(&s, sin + i, lanes * sizeof(Acc));
    const typename D::Vec first = read(i, lanes), second = read(half + i, lanes);
    write(i, lanes, first * c - second * s);
    write(half + i, lanes, second * c + first * s);
  }
}

template <class D>
void widen_row(const typename D::Storage* from, int64_t size, typename D::Acc* to) {
  for (int64_t i = 0; i < size; i += kLanes<D>) {
    typename D::Storage chunk[kLanes<D>] = {};
    std::memcpy(chunk, from + i, smaller(size - i, kLanes<D>) * sizeof(chunk[0]));
    const typename D::Vec wide = D::widen(chunk);
    std::memcpy(to + i, &wide, smaller(size - i, kLanes<D>) * sizeof(to[0]));
  }
}

template <class D>
void write(const WriteParams& p, int64_t begin, int64_t end) {
  using Storage = typename D::Storage;
  const int64_t size = p.head_dim * sizeof(Storage);
  for (int64_t row = begin; row < end; ++row) {
    if (p.slots[row] < 0) continue;
    for (int64_t head = 0; head < p.num_kv_heads; ++head) {
      const int64_t to = (p.slots[row] * p.num_kv_heads + head) * p.head_dim;
      const auto* k = static_cast<const Storage*>(p.k) + row * p.k_row_stride + head * p.k_head_stride;
      const auto* v = static_cast<const Storage*>(p.v) + row * p.v_row_stride + head * p.v_head_stride;
      std::memcpy(static_cast<Storage*>(p.v_cache) + to, v, size);
      auto* k_to = static_cast<Storage*>(p.k_cache) + to;
      std::memcpy(k_to, k, size);
      if (p.rope.positions == nullptr) continue;
      rotate<D>(
          p.rope, row,
          [&](int64_t i, int64_t lanes) {
            Storage part[kLanes<D>] = {};
            std::memcpy(part, k + i, lanes * sizeof(part[0]));
            return D::widen(part);
          },
          [&](int64_t i, int64_t lanes, typename D::Vec values) {
            typename D::Acc wide[kLanes<D>];
            Storage part[kLanes<D>];
            std::memcpy(wide, &values, sizeof(values));
            for (int lane = 0; lane < kLanes<D>; ++lane) part[lane] = D::narrow(wide[lane]);
            std::memcpy(k_to + i, part, lanes * sizeof(part[0]));
          });
    }
  }
}

static_assert(kPadDim % 32 == 0 && kTileSlots % 32 == 0, "multiply_on_tiles");
#ifdef RRT_TILES
static_assert(kReadBehind == tiles::kRows - 1);
#endif

// For up to so many rows, copying a tile into another layout costs more than it saves.
constexpr int64_t kMaxDirectRows = 16;

// Rows of a task: query by query, the query heads of one key/value head.
template <class D>
struct Attend {
  using Storage = typename D::Storage;
  using Acc = typename D::Acc;
  using Vec = typename D::Vec;
  using Op = Operands<D>;
  using Unit = typename Op::Unit;

  const AttentionWork& work;
  const AttentionParams& p;
  const AttentionTask& task;
  const int64_t kv_head;
  const Scratch& scratch;
  const int64_t group;
  const int64_t dim;  // padded
  const int64_t rows;
  const bool direct;  // the cache is read where it is

  Attend(const AttentionWork& w, int64_t index, int64_t head, const Scratch& s)
      : work(w),
        p(*w.params),
        task(w.tasks[index]),
        kv_head(head),
        scratch(s),
        group(p.num_heads / p.num_kv_heads),
        dim(w.padded_dim),
        rows(task.num_queries * group),
        direct(rows <= kMaxDirectRows && p.head_dim % kUnitLanes<D> == 0) {}

  // The number of slots that the row sees.
  int64_t visible(int64_t row) const { return task.visible + row / group; }

  void load_queries() const {
    Acc* wide = static_cast<Acc*>(scratch.row);
    for (int64_t i = p.head_dim; i < dim; ++i) wide[i] = 0;
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t query = task.first_query + row / group;
      const int64_t head = kv_head * group + row % group;
      const auto* q = static_cast<const Storage*>(p.q) + query * p.q_row_stride + head * p.q_head_stride;
      widen_row<D>(q, p.head_dim, wide);
      if (p.rope.positions != nullptr) {
        rotate<D>(
            p.rope, query,
            [&](int64_t i, int64_t lanes) {
              Vec part = {};
              std::memcpy(&part, wide + i, lanes * sizeof(Acc));
              return part;
            },
            [&](int64_t i, int64_t lanes, Vec values) { std::memcpy(wide + i, &values, lanes * sizeof(Acc)); });
      }
      Unit* to = static_cast<Unit*>(scratch.q) + row * (dim / kPair<D>);
      for (int64_t i = 0; i < dim; i += kPair<D>) to[i / kPair<D>] = Op::narrow_unit(wide + i);
    }
  }

  // Where slots [begin, begin + count) lie in the caches; the last stands for the rest of the tile.
  void find_slots(int64_t begin, int64_t count, int64_t* offsets) const {
    const int32_t* table = p.block_tables + task.sequence * p.table_stride;
    int64_t page = begin / p.page_size, in_page = begin % p.page_size;
    for (int64_t i = 0; i < count; ++i) {
      offsets[i] = ((table[page] * p.page_size + in_page) * p.num_kv_heads + kv_head) * p.head_dim;
      if (++in_page == p.page_size) {
        in_page = 0;
        ++page;
      }
    }
    for (int64_t i = count; i < kTileSlots; ++i) offsets[i] = offsets[count - 1];
  }

  // Prefetches the first tile of a piece; the others are prefetched by the tile before them.
  void fetch(const void* cache, const int64_t* offsets, int64_t count) const {
    for (int64_t i = 0; i < count; ++i) {
      const auto* slot = static_cast<const Storage*>(cache) + offsets[i];
      for (int64_t e = 0; e < p.head_dim; e += 64 / sizeof(Storage)) __builtin_prefetch(slot + e, 0, 2);
    }
  }

  // The next elements of a head that has `left` of them, then zeros.
  static typename Op::Vec load_units(const Storage* from, int64_t left) {
    if (left >= kUnitLanes<D>) return Op::load_units(from);
    Storage chunk[kUnitLanes<D>] = {};
    std::memcpy(chunk, from, left * sizeof(chunk[0]));
    return Op::load_units(chunk);
  }

  void stage_keys(int64_t count, const TileRows& tile) const {
    const auto* cache = static_cast<const Storage*>(p.k_cache);
    Unit* to = static_cast<Unit*>(scratch.k);
    for (int64_t slot = 0; slot < count; slot += kLanes<D>) {
      for (int64_t i = 0; i < p.head_dim; i += kUnitLanes<D>) {
        typename Op::Vec block[kLanes<D>];
        for (int s = 0; s < kLanes<D>; ++s) {
          block[s] = load_units(cache + tile.offsets[slot + s] + i, p.head_dim - i);
          tile.prefetch(cache, slot + s, i);
        }
        transpose(block);
        for (int u = 0; u < kLanes<D>; ++u) {
          std::memcpy(to + (i / kPair<D> + u) * kTileSlots + slot, &block[u], sizeof(block[u]));
        }
      }
    }
    if constexpr (kOnTiles<D>) {
      for (int64_t i = round_up(p.head_dim, kUnitLanes<D>) / 2; i < dim / 2; ++i) {
        std::memset(to + i * kTileSlots, 0, kTileSlots * sizeof(*to));
      }
    }
  }

  void stage_values(int64_t count, const TileRows& tile) const {
    const auto* cache = static_cast<const Storage*>(p.v_cache);
    Unit* to = static_cast<Unit*>(scratch.v);
    for (int64_t slot = 0; slot < count; slot += kPair<D>) {
      for (int64_t i = 0; i < p.head_dim; i += kUnitLanes<D>) {
        typename Op::Vec row[kPair<D>];
        for (int s = 0; s < kPair<D>; ++s) {
          row[s] = load_units(cache + tile.offsets[slot + s] + i, p.head_dim - i);
          tile.prefetch(cache, slot + s, i);
        }
        if constexpr (kPair<D> == 2) {
          U16Full low, high;
          zip((U16Full)row[0], (U16Full)row[1], low, high);
          row[0] = (typename Op::Vec)low;
          row[1] = (typename Op::Vec)high;
        }
        std::memcpy(to + slot / kPair<D> * dim + i, row, sizeof(row));
      }
    }
  }

  // Turns one row's scores of `count` slots into probabilities and adds them to its state.
  void softmax(int64_t row, int64_t count, const SoftmaxState& state) const {
    Acc* scores = static_cast<Acc*>(scratch.scores) + row * kTileSlots;
    Unit* probabilities = static_cast<Unit*>(scratch.probabilities) + row * (kTileSlots / kPair<D>);
    const int64_t padded = round_up(count, kLanes<D>);
    for (int64_t i = count; i < padded; ++i) scores[i] = 0;
    Acc& max = static_cast<Acc*>(state.max)[row];
    Acc& sum = static_cast<Acc*>(state.sum)[row];
    for (int64_t i = 0; i < padded; i += kLanes<D>) {
      const Vec scaled = load<Vec>(scores + i) * static_cast<Acc>(p.scale);
      std::memcpy(scores + i, &scaled, sizeof(scaled));
    }
    // Only after the scaling, since the scale may be negative.
    for (int64_t i = count; i < padded; ++i) scores[i] = -__builtin_inff();
    Vec largest = Vec{} + max;
    for (int64_t i = 0; i < padded; i += kLanes<D>) {
      const Vec score = load<Vec>(scores + i);
      largest = score > largest ? score : largest;
    }
    const Acc new_max = reduce_lanes(largest, [](Acc a, Acc b) { return a > b ? a : b; });
    Vec added = {};
    for (int64_t i = 0; i < padded; i += kLanes<D>) {
      const Vec probability = exp_negative(load<Vec>(scores + i) - new_max);
      if constexpr (kPair<D> == 1) {
        std::memcpy(probabilities + i, &probability, sizeof(probability));
        added += probability;
      } else {
        added += narrow_probabilities(probability, probabilities + i / 2);
      }
    }
    const Acc shrink = exp_one<D>(max - new_max);
    if (max != new_max) {
      Acc* out = static_cast<Acc*>(state.out) + row * dim;
      for (int64_t i = 0; i < dim; ++i) out[i] *= shrink;
    }
    sum = sum * shrink + reduce_lanes(added, [](Acc a, Acc b) { return a + b; });
    max = new_max;
  }

#ifdef RRT_BF16_PAIRS
  // Rounds to bfloat16 and returns the rounded values, which are the ones that the sum has to count.
  static F32 narrow_probabilities(F32 probability, uint32_t* to) {
    const U16 narrow = Operands<BFloat16>::narrow(probability);
    std::memcpy(to, &narrow, sizeof(narrow));
    return BFloat16::widen(reinterpret_cast<const uint16_t*>(to));
  }
#endif

  // Attends to the slots [begin, end) of one piece of the context, in the rows that see any of them.
  void attend_split(int64_t begin, int64_t end, const SoftmaxState& state) const {
    for (int64_t row = 0; row < rows; ++row) {
      static_cast<Acc*>(state.max)[row] = kLowest<Acc>;
      static_cast<Acc*>(state.sum)[row] = 0;
    }
    auto* out = static_cast<Acc*>(state.out);
    for (int64_t i = 0; i < rows * dim; ++i) out[i] = 0;
    end = smaller(end, visible(rows - 1));
    if (begin >= end) return;
    int64_t *offsets = scratch.offsets, *next = scratch.next_offsets;
    int64_t count = smaller(kTileSlots, end - begin);
    find_slots(begin, count, offsets);
    fetch(p.k_cache, offsets, count);
    fetch(p.v_cache, offsets, count);
    while (count > 0) {
      const int64_t next_count = smaller(kTileSlots, end - begin - count);
      if (next_count > 0) find_slots(begin + count, next_count, next);
      attend_tile(begin, count, {offsets, next_count > 0 ? next : nullptr}, state);
      int64_t* done = offsets;
      offsets = next;
      next = done;
      begin += count;
      count = next_count;
    }
  }

  void attend_tile(int64_t begin, int64_t count, const TileRows& tile, const SoftmaxState& state) const {
    const int64_t first = begin < task.visible ? 0 : (begin - task.visible + 1) * group;  // row that sees a slot
    const int64_t q_stride = dim / kPair<D>;
    const auto* q = static_cast<const Unit*>(scratch.q) + first * q_stride;
    auto* scores = static_cast<Acc*>(scratch.scores) + first * kTileSlots;
    if (direct) {
      const auto* keys = static_cast<const Storage*>(p.k_cache);
      for (int64_t slot = 0; slot < count; slot += kLanes<D>) {
        dot_rows<D, kLanes<D> / 2>(q, q_stride, keys, tile.from(slot), p.head_dim / kUnitLanes<D>, scores + slot,
                               kTileSlots, rows - first);
      }
    } else {
      stage_keys(count, tile);
      const Blocks<D> keys{static_cast<const Unit*>(scratch.k), kTileSlots};
      const int64_t width = kOnTiles<D> ? dim : p.head_dim, block = kOnTiles<D> ? kPadDim : kUnitLanes<D>;
      multiply_rows<D, kMaxRows, false>(q, q_stride, keys, width, scores, kTileSlots, rows - first,
                                        round_up(count, block));
    }
    for (int64_t row = first; row < rows; ++row) softmax(row, smaller(count, visible(row) - begin), state);
    if (direct) {
      add_values(Direct<D>{static_cast<const Storage*>(p.v_cache), tile}, p.head_dim, first, begin, count,
                 state);
    } else {
      stage_values(count, tile);
      add_values(Staged<D>{static_cast<const Unit*>(scratch.v), dim}, dim, first, begin, count, state);
    }
  }

  // Rows that see the same number of slots go together: a value that a row must not see is never multiplied. On tiles
  // only whole tiles of slots are: which those are depends on the row alone, and so its bits do.
  template <class B>
  void add_values(const B& values, int64_t columns, int64_t first, int64_t begin, int64_t count,
                  const SoftmaxState& state) const {
    constexpr int64_t kStride = kTileSlots / kPair<D>;
    const auto* probabilities = static_cast<const Unit*>(scratch.probabilities);
    auto* out = static_cast<Acc*>(state.out);
    while (first < rows) {
      const int64_t seen = smaller(count, visible(first) - begin);
      const int64_t end = seen == count ? rows : first + group;
      if constexpr (kOnTiles<D> && std::is_same_v<B, Staged<D>>) {
        if (seen == kTileSlots) {
          multiply_rows<D, kMaxRows, true>(probabilities + first * kStride, kStride, Blocks<D>{values}, seen,
                                           out + first * dim, dim, end - first, columns);
          first = end;
          continue;
        }
      }
      multiply_rows<D, kMaxRows, true>(probabilities + first * kStride, kStride, values, seen, out + first * dim, dim,
                                       end - first, columns);
      first = end;
    }
  }
};

// Adds row `from` of one state to row `to` of another: softmax over both their slots. `from` may have seen none.
template <class D>
void merge_row(const SoftmaxState& to_state, int64_t to, const SoftmaxState& from_state, int64_t from, int64_t dim) {
  using Acc = typename D::Acc;
  Acc& max = static_cast<Acc*>(to_state.max)[to];
  Acc& sum = static_cast<Acc*>(to_state.sum)[to];
  const Acc from_max = static_cast<const Acc*>(from_state.max)[from];
  const Acc from_sum = static_cast<const Acc*>(from_state.sum)[from];
  if (from_max == kLowest<Acc> && from_sum == 0) return;
  const Acc new_max = from_max > max ? from_max : max;
  const Acc shrink = exp_one<D>(max - new_max), from_shrink = exp_one<D>(from_max - new_max);
  Acc* out = static_cast<Acc*>(to_state.out) + to * dim;
  const Acc* from_out = static_cast<const Acc*>(from_state.out) + from * dim;
  for (int64_t i = 0; i < dim; ++i) out[i] = out[i] * shrink + from_out[i] * from_shrink;
  sum = sum * shrink + from_sum * from_shrink;
  max = new_max;
}

// The results of a task's rows, from `first` on in the state.
template <class D>
void store_rows(const AttentionWork& work, int64_t first_query, int64_t num_queries, int64_t kv_head,
                const SoftmaxState& state, int64_t first) {
  using Acc = typename D::Acc;
  const AttentionParams& p = *work.params;
  const int64_t group = p.num_heads / p.num_kv_heads;
  for (int64_t row = 0; row < num_queries * group; ++row) {
    const int64_t query = first_query + row / group, head = kv_head * group + row % group;
    auto* to = static_cast<typename D::Storage*>(p.out) + (query * p.num_heads + head) * p.head_dim;
    const Acc* from = static_cast<const Acc*>(state.out) + (first + row) * work.padded_dim;
    const Acc inverse = 1 / static_cast<const Acc*>(state.sum)[first + row];
    for (int64_t i = 0; i < p.head_dim; ++i) to[i] = D::narrow(from[i] * inverse);
  }
}

template <class D>
void attend(const AttentionWork& work, int64_t index, int64_t kv_head, const Scratch& scratch) {
  using Acc = typename D::Acc;
  const Attend<D> a(work, index, kv_head, scratch);
  [[maybe_unused]] TileRegisters<D> registers(!a.direct);
  const AttentionTask& task = a.task;
  a.load_queries();
  if (task.partial >= 0) {
    const int64_t first = task.partial * a.p.num_heads + kv_head * a.rows;
    const SoftmaxState& all = work.partial;
    a.attend_split(task.split_begin * kSplitSlots, task.split_end * kSplitSlots,
                   {static_cast<Acc*>(all.max) + first, static_cast<Acc*>(all.sum) + first,
                    static_cast<Acc*>(all.out) + first * a.dim});
    return;
  }
  for (int64_t split = task.split_begin; split < task.split_end; ++split) {
    const SoftmaxState& state = split == 0 ? scratch.total : scratch.split;
    a.attend_split(split * kSplitSlots, (split + 1) * kSplitSlots, state);
    if (split == 0) continue;
    for (int64_t row = 0; row < a.rows; ++row) merge_row<D>(scratch.total, row, state, row, a.dim);
  }
  store_rows<D>(work, task.first_query, task.num_queries, kv_head, scratch.total, 0);
}

template <class D>
void merge(const AttentionWork& work, int64_t index, int64_t kv_head) {
  const AttentionParams& p = *work.params;
  const MergeTask& task = work.merges[index];
  const int64_t rows = task.num_queries * (p.num_heads / p.num_kv_heads);
  const int64_t first = task.partial * p.num_heads + kv_head * rows;
  for (int64_t split = 1; split < task.num_splits; ++split) {
    const int64_t from = first + split * task.num_queries * p.num_heads;
    for (int64_t row = 0; row < rows; ++row) {
      merge_row<D>(work.partial, first + row, work.partial, from + row, work.padded_dim);
    }
  }
  store_rows<D>(work, task.first_query, task.num_queries, kv_head, work.partial, first);
}

}  // namespace

const CpuKernels RRT_KERNELS = {
    {write<Float32>, write<Float64>, write<BFloat16>, write<Float16>},
    {attend<Float32>, attend<Float64>, attend<BFloat16>, attend<Float16>},
    {merge<Float32>, merge<Float64>, merge<BFloat16>, merge<Float16>},
};

}  // namespace rrt::kv_cache
