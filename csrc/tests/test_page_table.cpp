// Random operations against a dumb model: a sequence is the list of tokens that were written to its positions.
#include <map>
#include <string>
#include <vector>

#include "check.h"
#include "kv_cache/page_table.h"

using namespace rrt::kv_cache;
using namespace rrt::tests;

namespace {

class Machine {
 public:
  Machine(Random& random, int64_t num_pages, int64_t page_size)
      : random_(random), table_(num_pages, page_size), memory_(num_pages * page_size, -1) {}

  void step() {
    const int64_t what = between(random_, 0, 9);
    if (sequences_.empty() || what == 0) {
      sequences_[table_.create()] = {};
    } else if (what <= 5) {
      append(between(random_, 1, 3));
    } else if (what == 6) {
      const int64_t handle = any();
      sequences_[table_.fork(handle)] = sequences_[handle];
    } else if (what == 7) {
      const int64_t handle = any(), of = any();
      table_.alias(handle, of);
      sequences_[handle] = sequences_[of];
    } else if (what == 8) {
      const int64_t handle = any(), length = between(random_, 0, size_of(handle));
      table_.truncate(handle, length);
      sequences_[handle].resize(length);
    } else {
      const int64_t handle = any();
      table_.free(handle);
      sequences_.erase(handle);
      CHECK_THROWS(table_.length(handle), std::invalid_argument);
      CHECK_THROWS(table_.free(handle), std::invalid_argument);
    }
    check();
  }

  int64_t refused() const { return refused_; }

 private:
  int64_t size_of(int64_t handle) { return static_cast<int64_t>(sequences_[handle].size()); }
  int64_t any() { return std::next(sequences_.begin(), between(random_, 0, sequences_.size() - 1))->first; }

  void append(int64_t num) {
    std::vector<int64_t> handles;
    std::vector<int32_t> counts;
    for (int64_t i = 0; i < num; ++i) {
      handles.push_back(any());
      counts.push_back(static_cast<int32_t>(between(random_, 0, 6)));
    }
    const int64_t free_before = table_.num_free_pages();
    const int64_t needed = table_.pages_needed(handles[0], counts[0]);
    std::vector<PageCopy> copies;
    try {
      copies = table_.append_many(handles.data(), counts.data(), num);
    } catch (const OutOfPages&) {
      ++refused_;
      CHECK_EQ(table_.num_free_pages(), free_before);
      if (num == 1) CHECK(needed > free_before);
      return;
    }
    if (num == 1) CHECK_EQ(free_before - table_.num_free_pages(), needed);
    const int64_t page_size = table_.page_size();
    for (const PageCopy& copy : copies) {
      for (int64_t i = 0; i < page_size; ++i) memory_[copy.target * page_size + i] = memory_[copy.source * page_size + i];
    }
    for (int64_t i = 0; i < num; ++i) {
      for (int32_t j = 0; j < counts[i]; ++j) {
        const auto position = static_cast<int32_t>(sequences_[handles[i]].size());
        int64_t slot;
        table_.slots(&handles[i], &position, 1, &slot);
        CHECK_EQ(table_.refcount(slot / page_size), 1);
        memory_[slot] = next_token_;
        sequences_[handles[i]].push_back(next_token_++);
      }
    }
  }

  void check() {
    table_.check();
    CHECK_EQ(table_.num_sequences(), static_cast<int64_t>(sequences_.size()));
    std::vector<int64_t> holders(table_.num_pages(), 0);
    std::vector<int64_t> handles;
    for (const auto& [handle, tokens] : sequences_) {
      handles.push_back(handle);
      CHECK_EQ(table_.length(handle), static_cast<int64_t>(tokens.size()));
      for (int32_t page : table_.pages(handle)) ++holders[page];
      for (size_t i = 0; i < tokens.size(); ++i) {
        const int64_t page = table_.pages(handle)[i / table_.page_size()];
        CHECK_EQ(memory_[page * table_.page_size() + i % table_.page_size()], tokens[i]);
        // Only positions that no other sequence reads may be written.
        const auto position = static_cast<int32_t>(i);
        int64_t slot;
        if (table_.refcount(page) > 1) {
          CHECK_THROWS(table_.slots(&handle, &position, 1, &slot), std::invalid_argument);
        } else {
          table_.slots(&handle, &position, 1, &slot);
          CHECK_EQ(slot / table_.page_size(), page);
        }
      }
    }
    int64_t used = 0;
    for (int64_t page = 0; page < table_.num_pages(); ++page) {
      CHECK_EQ(table_.refcount(page), holders[page]);
      used += holders[page] > 0;
    }
    CHECK_EQ(table_.num_used_pages(), used);
    CHECK_EQ(table_.num_free_pages(), table_.num_pages() - used);

    const int64_t width = table_.max_pages(handles.data(), handles.size());
    std::vector<int32_t> tables(handles.size() * width, -1);
    table_.block_tables(handles.data(), handles.size(), width, tables.data());
    for (size_t i = 0; i < handles.size(); ++i) {
      std::vector<int32_t> expected = table_.pages(handles[i]);
      CHECK(static_cast<int64_t>(expected.size()) <= width);
      expected.resize(width, 0);
      CHECK(std::equal(expected.begin(), expected.end(), tables.begin() + i * width));
    }
  }

  Random& random_;
  PageTable table_;
  std::vector<int64_t> memory_;  // the token in each slot, as a cache would hold it
  std::map<int64_t, std::vector<int64_t>> sequences_;
  int64_t next_token_ = 0;
  int64_t refused_ = 0;
};

void sequences_read_what_was_written() {
  Random random(1);
  int64_t refused = 0;
  for (int round = 0; round < 60; ++round) {
    Machine machine(random, between(random, 1, 20), between(random, 1, 5));
    for (int step = 0; step < 80; ++step) machine.step();
    refused += machine.refused();
  }
  CHECK(refused > 0);
}

void a_refused_append_leaves_no_trace() {
  PageTable table(3, 2);
  const int64_t first = table.create();
  table.append(first, 3);
  const int64_t second = table.fork(first);
  const std::vector<int32_t> pages = table.pages(first);
  const int64_t handles[] = {second, first, first};
  const int32_t counts[] = {1, 1, 2};  // a copy, none, and no page left
  CHECK_THROWS(table.append_many(handles, counts, 3), OutOfPages);
  CHECK(table.pages(first) == pages && table.pages(second) == pages);
  CHECK_EQ(table.refcount(pages[1]), 2);
  const int32_t negative[] = {1, 1, -1};
  CHECK_THROWS(table.append_many(handles, negative, 3), std::invalid_argument);
  CHECK(table.pages(second) == pages);
  table.check();
}

void bad_arguments_are_refused() {
  CHECK_THROWS(PageTable(0, 1), std::invalid_argument);
  CHECK_THROWS(PageTable(1, 0), std::invalid_argument);
  CHECK_THROWS(PageTable(int64_t{1} << 31, 1), std::invalid_argument);
  PageTable table(2, 2);
  const int64_t handle = table.create();
  table.append(handle, 3);
  for (int64_t unknown : {int64_t{0}, int64_t{-1}, handle + 1, handle + (int64_t{1} << 32), INT64_MIN, INT64_MAX}) {
    CHECK_THROWS(table.pages(unknown), std::invalid_argument);
    CHECK_THROWS(table.alias(unknown, handle), std::invalid_argument);
    CHECK_THROWS(table.alias(handle, unknown), std::invalid_argument);
  }
  CHECK_THROWS(table.append(handle, INT64_MAX), std::invalid_argument);
  CHECK_THROWS(table.append(handle, -1), std::invalid_argument);
  CHECK_THROWS(table.truncate(handle, 4), std::invalid_argument);
  CHECK_THROWS(table.refcount(2), std::invalid_argument);
  CHECK_THROWS(table.refcount(-1), std::invalid_argument);
  for (int32_t position : {-1, 3, INT32_MAX}) {
    int64_t slot;
    CHECK_THROWS(table.slots(&handle, &position, 1, &slot), std::invalid_argument);
  }
  CHECK_EQ(table.length(handle), 3);
  table.check();
}

}  // namespace

int main() {
  return run(sequences_read_what_was_written, a_refused_append_leaves_no_trace, bad_arguments_are_refused);
}
