// Host planning of the key/value operators: checks of index values, and which task attends to which slots.
// Pure C++17 over plain memory, so that kernels, host checks and tests share it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "rounding.h"

namespace rrt::kv_cache {

// A context is split every kSplitSlots slots, whatever else is in the batch. Each piece has a softmax of its own, and
// pieces are merged in order: so the result does not depend on how tasks are dealt out.
constexpr int64_t kSplitSlots = 256;
// Rows (queries x query heads of one key/value head) that share one reading of keys and values.
constexpr int64_t kTileRows = 64;
// For up to so many queries, a tile's pieces become tasks of their own, which keeps all threads busy when a long
// context is all there is to do. The pieces' results then lie in memory, which for more queries would be too much.
constexpr int64_t kMaxSplitQueries = 4;

// The checks return the first index whose value does not fit, or -1.
inline int64_t find_bad_slot(const int64_t* slots, int64_t m, int64_t num_slots) {
  for (int64_t i = 0; i < m; ++i) {
    if (slots[i] < -1 || slots[i] >= num_slots) return i;
  }
  return -1;
}

// Positions of rows that are padding (kept(i) is false) may be anything.
template <class Kept>
int64_t find_bad_position(const int32_t* positions, int64_t m, int64_t max_positions, Kept kept) {
  for (int64_t i = 0; i < m; ++i) {
    if (kept(i) && (positions[i] < 0 || positions[i] >= max_positions)) return i;
  }
  return -1;
}

inline int64_t find_bad_context(const int32_t* context_lens, int64_t num_sequences, int64_t most) {
  for (int64_t s = 0; s < num_sequences; ++s) {
    if (context_lens[s] < 0 || context_lens[s] > most) return s;
  }
  return -1;
}

// query_start [num_sequences + 1] has to go from 0 to num_queries and never fall.
inline int64_t find_bad_query_start(const int32_t* query_start, int64_t num_sequences, int64_t num_queries) {
  if (query_start[0] != 0) return 0;
  for (int64_t s = 1; s <= num_sequences; ++s) {
    if (query_start[s] < query_start[s - 1]) return s;
  }
  return query_start[num_sequences] != num_queries ? num_sequences : -1;
}

// Here and below, query_start is null in decode: a sequence has one query, or none if its context is empty.
inline int64_t num_queries_of(const int32_t* query_start, const int32_t* context_lens, int64_t s) {
  if (query_start == nullptr) return context_lens[s] > 0;
  return query_start[s + 1] - query_start[s];
}

inline int64_t find_short_context(const int32_t* query_start, const int32_t* context_lens, int64_t num_sequences) {
  for (int64_t s = 0; s < num_sequences; ++s) {
    if (context_lens[s] < num_queries_of(query_start, context_lens, s)) return s;
  }
  return -1;
}

struct TableEntry {
  int64_t row, column;
};

// The first bad entry among those that sequences with queries need, or row -1. Contexts have been checked before.
inline TableEntry find_bad_page(const int32_t* block_tables, int64_t table_stride, const int32_t* query_start,
                                const int32_t* context_lens, int64_t num_sequences, int64_t page_size,
                                int64_t num_pages) {
  for (int64_t s = 0; s < num_sequences; ++s) {
    if (num_queries_of(query_start, context_lens, s) == 0) continue;
    const int32_t* table = block_tables + s * table_stride;
    const int64_t needed = ceil_div(context_lens[s], page_size);
    for (int64_t i = 0; i < needed; ++i) {
      if (table[i] < 0 || table[i] >= num_pages) return {s, i};
    }
  }
  return {-1, -1};
}

// Consecutive queries of one sequence against some pieces of their context. Per key/value head.
struct AttentionTask {
  int64_t sequence;     // row of block_tables
  int64_t first_query;  // row of q
  int64_t num_queries;
  int64_t visible;  // slots that the first query sees; each next query sees one more
  int64_t split_begin, split_end;
  int64_t partial;  // where the task's results lie among the partial ones, counted in queries; -1: they are final
};

// The partial results of a tile's tasks, one task after the other from `partial` on.
struct MergeTask {
  int64_t first_query;
  int64_t num_queries;
  int64_t num_splits;
  int64_t partial;
};

struct AttentionPlan {
  std::vector<AttentionTask> tasks;
  std::vector<MergeTask> merges;
  std::vector<int64_t> padding;  // queries without a context: zeros
  int64_t num_partial = 0;       // queries of all partial results
  int64_t max_queries = 0;       // of one task
  int64_t num_scores = 0;        // about the number of pairs of query and slot: a measure of the work
};

// `group`: query heads per key/value head.
inline AttentionPlan plan_attention(const int32_t* query_start, const int32_t* context_lens, int64_t num_sequences,
                                    int64_t group) {
  AttentionPlan plan;
  const int64_t tile_queries = std::max<int64_t>(1, kTileRows / std::max<int64_t>(1, group));
  for (int64_t s = 0; s < num_sequences; ++s) {
    const int64_t length = num_queries_of(query_start, context_lens, s);
    const int64_t begin = query_start == nullptr ? s : query_start[s];
    if (query_start == nullptr && length == 0) plan.padding.push_back(s);
    for (int64_t i = 0; i < length; i += tile_queries) {
      const int64_t queries = std::min(tile_queries, length - i);
      const int64_t visible = context_lens[s] - length + i + 1;
      const int64_t splits = ceil_div(visible + queries - 1, kSplitSlots);
      plan.max_queries = std::max(plan.max_queries, queries);
      plan.num_scores += queries * visible;
      if (splits == 1 || queries > kMaxSplitQueries) {
        plan.tasks.push_back({s, begin + i, queries, visible, 0, splits, -1});
        continue;
      }
      plan.merges.push_back({begin + i, queries, splits, plan.num_partial});
      for (int64_t split = 0; split < splits; ++split) {
        plan.tasks.push_back({s, begin + i, queries, visible, split, split + 1, plan.num_partial});
        plan.num_partial += queries;
      }
    }
  }
  return plan;
}

}  // namespace rrt::kv_cache
