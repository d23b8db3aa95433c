// Which task attends to which slots, and the checks of index values.
#include <limits>
#include <map>
#include <vector>

#include "check.h"
#include "kv_cache/plan.h"

using namespace rrt::kv_cache;
using namespace rrt::tests;

namespace {

struct Batch {
  std::vector<int32_t> starts, contexts;
  bool decode;
  const int32_t* query_start() const { return decode ? nullptr : starts.data(); }
  int64_t size() const { return static_cast<int64_t>(contexts.size()); }
};

Batch random_batch(Random& random) {
  Batch batch{{0}, {}, between(random, 0, 1) == 0};
  for (int64_t i = between(random, 0, 6); i > 0; --i) {
    const int64_t before = between(random, 0, 3) == 0 ? 0 : between(random, 0, 3 * kSplitSlots);
    const int64_t queries = batch.decode ? 1 : between(random, 0, 2) * between(random, 0, 90);
    const bool empty = batch.decode && between(random, 0, 4) == 0;
    batch.starts.push_back(static_cast<int32_t>(batch.starts.back() + queries));
    batch.contexts.push_back(static_cast<int32_t>(empty ? 0 : before + queries));
  }
  return batch;
}

void check_plan(const Batch& batch, int64_t group) {
  const AttentionPlan plan = plan_attention(batch.query_start(), batch.contexts.data(), batch.size(), group);
  std::map<int64_t, int64_t> merge_of_partial;  // index of the merge by each partial result
  for (size_t i = 0; i < plan.merges.size(); ++i) {
    const MergeTask& merge = plan.merges[i];
    CHECK(merge.num_splits > 1);
    for (int64_t j = 0; j < merge.num_queries * merge.num_splits; ++j) {
      CHECK(merge_of_partial.emplace(merge.partial + j, i).second);
    }
  }
  CHECK_EQ(static_cast<int64_t>(merge_of_partial.size()), plan.num_partial);
  if (!merge_of_partial.empty()) {
    CHECK_EQ(merge_of_partial.begin()->first, 0);
    CHECK_EQ(merge_of_partial.rbegin()->first, plan.num_partial - 1);
  }

  std::vector<std::vector<int>> seen(batch.starts.back());  // [query][slot]: how often
  int64_t max_queries = 0;
  for (const AttentionTask& task : plan.tasks) {
    CHECK(task.num_queries >= 1);
    CHECK(task.num_queries == 1 || task.num_queries * group <= kTileRows);
    CHECK(task.split_begin < task.split_end);
    max_queries = std::max(max_queries, task.num_queries);
    for (int64_t i = 0; i < task.num_queries; ++i) {
      const int64_t visible = task.visible + i;
      const int64_t last = std::min(visible, task.split_end * kSplitSlots);
      std::vector<int>& slots = seen[task.first_query + i];
      if (static_cast<int64_t>(slots.size()) < last) slots.resize(last, 0);
      for (int64_t slot = task.split_begin * kSplitSlots; slot < last; ++slot) ++slots[slot];
    }
    const int64_t splits = rrt::ceil_div(task.visible + task.num_queries - 1, kSplitSlots);
    if (task.partial < 0) {
      // Final: all of the context at once.
      CHECK_EQ(task.split_begin, 0);
      CHECK_EQ(task.split_end, splits);
    } else {
      const auto found = merge_of_partial.find(task.partial);
      CHECK(found != merge_of_partial.end());
      if (found == merge_of_partial.end()) continue;
      const MergeTask& merge = plan.merges[found->second];
      CHECK_EQ(merge.first_query, task.first_query);
      CHECK_EQ(merge.num_queries, task.num_queries);
      CHECK_EQ(merge.num_splits, splits);
      CHECK_EQ(task.split_end, task.split_begin + 1);
      CHECK_EQ(task.partial, merge.partial + task.split_begin * task.num_queries);
      CHECK(task.num_queries <= kMaxSplitQueries);
    }
  }
  CHECK_EQ(plan.max_queries, max_queries);

  std::vector<std::vector<int>> expected(seen.size());
  std::vector<int64_t> padding;
  for (int64_t s = 0; s < batch.size(); ++s) {
    const int64_t length = batch.decode ? batch.contexts[s] > 0 : batch.starts[s + 1] - batch.starts[s];
    if (batch.decode && length == 0) padding.push_back(s);
    for (int64_t i = 0; i < length; ++i) expected[batch.starts[s] + i].assign(batch.contexts[s] - length + i + 1, 1);
  }
  CHECK(seen == expected);
  CHECK(plan.padding == padding);
}

void every_query_sees_each_of_its_slots_once() {
  Random random(1);
  for (int round = 0; round < 100; ++round) check_plan(random_batch(random), between(random, 1, 2 * kTileRows));
  for (int64_t around : {1, 2, 3}) {
    for (int32_t off : {-1, 0, 1}) {
      const auto context = static_cast<int32_t>(around * kSplitSlots + off);
      check_plan({{0, 1}, {context}, true}, 8);
      for (int32_t queries : {1, 4, 5, 200}) check_plan({{0, queries}, {context}, false}, 8);
    }
  }
}

bool same_but_place(const AttentionTask& a, const AttentionTask& b) {
  return a.num_queries == b.num_queries && a.visible == b.visible && a.split_begin == b.split_begin &&
         a.split_end == b.split_end && (a.partial < 0) == (b.partial < 0);
}

void a_sequence_is_cut_the_same_in_any_batch() {
  Random random(2);
  for (int round = 0; round < 100; ++round) {
    const Batch batch = random_batch(random);
    const int64_t group = between(random, 1, 16);
    const AttentionPlan together = plan_attention(batch.query_start(), batch.contexts.data(), batch.size(), group);
    size_t next = 0;
    for (int64_t s = 0; s < batch.size(); ++s) {
      const int32_t start[] = {0, batch.starts[s + 1] - batch.starts[s]};
      const AttentionPlan alone = plan_attention(batch.decode ? nullptr : start, &batch.contexts[s], 1, group);
      for (const AttentionTask& task : alone.tasks) {
        CHECK(next < together.tasks.size());
        if (next == together.tasks.size()) return;
        CHECK_EQ(together.tasks[next].sequence, s);
        CHECK(same_but_place(together.tasks[next++], task));
      }
    }
    CHECK_EQ(next, together.tasks.size());
  }
}

void the_first_bad_value_is_named() {
  const int64_t slots[] = {-1, 7, 8, -2};
  CHECK_EQ(find_bad_slot(slots, 4, 9), 3);
  CHECK_EQ(find_bad_slot(slots, 4, 8), 2);
  CHECK_EQ(find_bad_slot(slots, 3, 9), -1);

  const int32_t positions[] = {0, 4, -1, 5};
  const auto all = [](int64_t) { return true; };
  CHECK_EQ(find_bad_position(positions, 4, 5, all), 2);
  CHECK_EQ(find_bad_position(positions, 4, 4, all), 1);
  CHECK_EQ(find_bad_position(positions, 4, 5, [](int64_t i) { return i != 2; }), 3);
  CHECK_EQ(find_bad_position(positions, 4, 5, [](int64_t i) { return i < 2; }), -1);

  const int32_t contexts[] = {0, 6, -1};
  CHECK_EQ(find_bad_context(contexts, 2, 6), -1);
  CHECK_EQ(find_bad_context(contexts, 3, 6), 2);
  CHECK_EQ(find_bad_context(contexts, 3, 5), 1);

  const int32_t starts[] = {0, 2, 2, 5, 4};
  CHECK_EQ(find_bad_query_start(starts, 3, 5), -1);
  CHECK_EQ(find_bad_query_start(starts, 3, 6), 3);
  CHECK_EQ(find_bad_query_start(starts, 4, 4), 4);
  CHECK_EQ(find_bad_query_start(starts + 1, 1, 2), 0);
  const int32_t lengths[] = {2, 0, 2};
  CHECK_EQ(find_short_context(starts, lengths, 2), -1);
  CHECK_EQ(find_short_context(starts, lengths, 3), 2);
  CHECK_EQ(find_short_context(nullptr, lengths, 3), -1);
}

void only_pages_that_are_needed_are_looked_at() {
  constexpr int32_t kAny = std::numeric_limits<int32_t>::min();
  // Row by row: 5 positions of 2 per page, none, 1.
  const int32_t tables[] = {0, 3, 1, kAny, kAny, kAny, kAny, kAny, 2, kAny, kAny, kAny};
  const int32_t contexts[] = {5, 0, 1};
  const auto bad = [&](int64_t num_pages) { return find_bad_page(tables, 4, nullptr, contexts, 3, 2, num_pages); };
  CHECK_EQ(bad(4).row, -1);
  CHECK_EQ(bad(3).row, 0);
  CHECK_EQ(bad(3).column, 1);
  const int32_t long_contexts[] = {5, 0, 3};
  const TableEntry entry = find_bad_page(tables, 4, nullptr, long_contexts, 3, 2, 4);
  CHECK_EQ(entry.row, 2);
  CHECK_EQ(entry.column, 1);
  // A chunk without queries needs no pages.
  const int32_t starts[] = {0, 2, 2, 2};
  CHECK_EQ(find_bad_page(tables, 4, starts, long_contexts, 3, 2, 4).row, -1);
}

}  // namespace

int main() {
  return run(every_query_sees_each_of_its_slots_once, a_sequence_is_cut_the_same_in_any_batch,
             the_first_bad_value_is_named, only_pages_that_are_needed_are_looked_at);
}
