// Page accounting of the key/value cache: which pages hold the positions of which sequence. No tensors here.
// rrt/decode/page_table.py is the same class in Python, readable and for checkouts without a compiler; tests hold the
// two together, page number by page number.
//
// A sequence here is a virtual one: one loop of one request (csrc/kv_cache knows no loops). Pages are counted by
// reference, so that sequences share them; a shared page that is partly filled is copied before it is appended to.
// Full pages are never written again, hence never copied. Not thread-safe.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "rounding.h"

namespace rrt::kv_cache {

// Thrown before anything has changed.
struct OutOfPages : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct PageCopy {
  int32_t source;
  int32_t target;
};

class PageTable {
 public:
  // Throws std::invalid_argument, as every method does for an argument out of its range.
  PageTable(int64_t num_pages, int64_t page_size) : page_size_(page_size) {
    if (num_pages < 1 || num_pages > kMax) throw_invalid("num_pages", num_pages, "1 to 2147483647");
    if (page_size < 1 || page_size > kMax) throw_invalid("page_size", page_size, "1 to 2147483647");
    refcounts_.assign(num_pages, 0);
    free_pages_.reserve(num_pages);
    for (int64_t page = num_pages - 1; page >= 0; --page) free_pages_.push_back(static_cast<int32_t>(page));
  }

  int64_t num_pages() const { return static_cast<int64_t>(refcounts_.size()); }
  int64_t page_size() const { return page_size_; }
  int64_t num_free_pages() const { return static_cast<int64_t>(free_pages_.size()); }
  int64_t num_used_pages() const { return num_pages() - num_free_pages(); }
  int64_t num_sequences() const { return static_cast<int64_t>(sequences_.size() - free_sequences_.size()); }

  // The handle of an empty sequence. Handles are never reused: a freed one stays an error.
  int64_t create() {
    if (free_sequences_.empty()) {
      free_sequences_.push_back(static_cast<int32_t>(sequences_.size()));
      sequences_.emplace_back();
    }
    const int32_t index = free_sequences_.back();
    free_sequences_.pop_back();
    sequences_[index].live = true;
    return sequences_[index].generation << 32 | index;
  }

  int64_t length(int64_t handle) const { return at(handle).length; }
  const std::vector<int32_t>& pages(int64_t handle) const { return at(handle).pages; }

  // How many sequences hold the page; 0 for a free one.
  int64_t refcount(int64_t page) const {
    if (page < 0 || page >= num_pages()) {
      throw_invalid("page", page, "a page in [0, " + std::to_string(num_pages()) + ")");
    }
    return refcounts_[page];
  }

  // Pages that append(handle, count) takes from the free ones, that of a copy included.
  int64_t pages_needed(int64_t handle, int64_t count) const {
    const Sequence& sequence = at(handle);
    check_count(sequence, count);
    return pages_of(sequence.length + count) - static_cast<int64_t>(sequence.pages.size()) +
           needs_copy(sequence, count);
  }

  // Makes room for `count` more positions. The caller makes the copies before it writes to the new positions, and
  // writes before it forks. Throws OutOfPages.
  std::vector<PageCopy> append(int64_t handle, int64_t count) {
    check_count(at(handle), count);
    const int32_t narrow = static_cast<int32_t>(count);
    return append_many(&handle, &narrow, 1);
  }

  // append of many sequences: all of them, or none. A handle may come more than once.
  std::vector<PageCopy> append_many(const int64_t* handles, const int32_t* counts, int64_t size) {
    std::vector<PageCopy> copies;
    undo_.clear();
    undo_.reserve(size);
    try {
      for (int64_t i = 0; i < size; ++i) append_one(handles[i], counts[i], copies);
    } catch (...) {
      // In reverse, so that the free pages come back in their order.
      for (auto done = undo_.rbegin(); done != undo_.rend(); ++done) {
        Sequence& sequence = at(done->handle);
        cut(sequence, done->length);
        if (done->copied_from >= 0) {
          release(sequence.pages.back());
          sequence.pages.back() = done->copied_from;
          ++refcounts_[done->copied_from];
        }
      }
      throw;
    }
    return copies;
  }

  // A new sequence of the same length that shares all pages.
  int64_t fork(int64_t handle) {
    at(handle);
    const int64_t forked = create();
    share(at(forked), at(handle));
    return forked;
  }

  // `handle` gives up its pages and shares those of `of` instead. Later appends on either do not show in the other.
  void alias(int64_t handle, int64_t of) {
    Sequence& sequence = at(handle);
    const Sequence& source = at(of);
    if (&sequence == &source) return;
    cut(sequence, 0);
    share(sequence, source);
  }

  // Drops the positions from `length` on.
  void truncate(int64_t handle, int64_t length) {
    Sequence& sequence = at(handle);
    if (length < 0 || length > sequence.length) {
      throw_invalid("length", length, "0 to " + std::to_string(sequence.length));
    }
    cut(sequence, length);
  }

  void free(int64_t handle) {
    Sequence& sequence = at(handle);
    cut(sequence, 0);
    sequence.live = false;
    sequence.generation = sequence.generation == kMax ? 1 : sequence.generation + 1;
    free_sequences_.push_back(static_cast<int32_t>(handle & kIndexMask));
  }

  // out[i] = the slot page * page_size + offset of positions[i] of the sequence handles[i], to be written: positions
  // in a shared page are refused.
  void slots(const int64_t* handles, const int32_t* positions, int64_t size, int64_t* out) const {
    for (int64_t i = 0; i < size; ++i) {
      const Sequence& sequence = at(handles[i]);
      const int64_t position = positions[i];
      if (position < 0 || position >= sequence.length) {
        throw_invalid("positions[" + std::to_string(i) + "]", position,
                      "a position in [0, " + std::to_string(sequence.length) + "), what the sequence holds");
      }
      const int64_t column = position / page_size_, page = sequence.pages[column];
      if (refcounts_[page] > 1) {
        throw_invalid("positions[" + std::to_string(i) + "]", position, "one in a page that no other sequence shares");
      }
      out[i] = position + (page - column) * page_size_;
    }
  }

  // The width of block_tables: the most pages that one of the sequences has.
  int64_t max_pages(const int64_t* handles, int64_t size) const {
    size_t most = 0;
    for (int64_t i = 0; i < size; ++i) most = std::max(most, at(handles[i]).pages.size());
    return static_cast<int64_t>(most);
  }

  // out [size, width], width = max_pages(handles, size): the pages of each sequence, then zeros.
  void block_tables(const int64_t* handles, int64_t size, int64_t width, int32_t* out) const {
    for (int64_t i = 0; i < size; ++i, out += width) {
      const std::vector<int32_t>& pages = at(handles[i]).pages;
      std::fill(std::copy(pages.begin(), pages.end(), out), out + width, 0);
    }
  }

  // Verifies every invariant; throws std::logic_error that names the broken one. For tests.
  void check() const {
    std::vector<int64_t> holders(refcounts_.size(), 0);
    for (const Sequence& sequence : sequences_) {
      if (!sequence.live && sequence.length != 0) throw std::logic_error("a freed sequence has positions");
      if (static_cast<int64_t>(sequence.pages.size()) != pages_of(sequence.length)) {
        throw std::logic_error("a sequence has another number of pages than its length needs");
      }
      for (int32_t page : sequence.pages) ++holders[page];
    }
    if (holders != refcounts_) throw std::logic_error("a reference count is not the number of holders");
    for (int32_t page : free_pages_) {
      if (holders[page]++ != 0) throw std::logic_error("a free page is in use, or free twice");
    }
    if (std::count(holders.begin(), holders.end(), 0) != 0) throw std::logic_error("a page is neither free nor used");
  }

 private:
  struct Sequence {
    int64_t generation = 1;  // the upper half of its handle
    int64_t length = 0;
    std::vector<int32_t> pages;
    bool live = false;
  };
  struct Undo {
    int64_t handle;
    int64_t length;
    int32_t copied_from;  // -1: no copy
  };
  static constexpr int64_t kMax = std::numeric_limits<int32_t>::max();
  static constexpr int64_t kIndexMask = 0xffffffff;

  [[noreturn]] static void throw_invalid(const std::string& name, int64_t found, const std::string& expected) {
    throw std::invalid_argument(name + ": found " + std::to_string(found) + "; expected " + expected);
  }

  const Sequence& at(int64_t handle) const {
    const int64_t index = handle & kIndexMask;
    if (index >= static_cast<int64_t>(sequences_.size()) || !sequences_[index].live ||
        sequences_[index].generation != handle >> 32) {
      throw_invalid("handle", handle, "a sequence that was created and not freed");
    }
    return sequences_[index];
  }
  Sequence& at(int64_t handle) { return const_cast<Sequence&>(std::as_const(*this).at(handle)); }

  int64_t pages_of(int64_t length) const { return ceil_div(length, page_size_); }

  static void check_count(const Sequence& sequence, int64_t count) {
    if (count < 0 || count > kMax - sequence.length) {
      throw_invalid("count", count, "0 to " + std::to_string(kMax - sequence.length));
    }
  }

  bool needs_copy(const Sequence& sequence, int64_t count) const {
    return count > 0 && sequence.length % page_size_ != 0 && refcounts_[sequence.pages.back()] > 1;
  }

  void append_one(int64_t handle, int64_t count, std::vector<PageCopy>& copies) {
    Sequence& sequence = at(handle);
    const int64_t needed = pages_needed(handle, count);
    if (needed > num_free_pages()) {
      throw OutOfPages("found " + std::to_string(num_free_pages()) + " free pages of " + std::to_string(num_pages()) +
                       "; expected " + std::to_string(needed) + " or more");
    }
    Undo undo{handle, sequence.length, -1};
    if (needs_copy(sequence, count)) {
      int32_t& last = sequence.pages.back();
      undo.copied_from = last;
      --refcounts_[last];
      last = take();
      copies.push_back({undo.copied_from, last});
    }
    sequence.length += count;
    const size_t num_pages = pages_of(sequence.length);
    while (sequence.pages.size() < num_pages) sequence.pages.push_back(take());
    undo_.push_back(undo);
  }

  int32_t take() {
    const int32_t page = free_pages_.back();
    free_pages_.pop_back();
    refcounts_[page] = 1;
    return page;
  }

  void release(int32_t page) {
    if (--refcounts_[page] == 0) free_pages_.push_back(page);
  }

  void cut(Sequence& sequence, int64_t length) {
    const size_t num_pages = pages_of(length);
    while (sequence.pages.size() > num_pages) {
      release(sequence.pages.back());
      sequence.pages.pop_back();
    }
    sequence.length = length;
  }

  void share(Sequence& sequence, const Sequence& source) {
    sequence.pages = source.pages;
    sequence.length = source.length;
    for (int32_t page : sequence.pages) ++refcounts_[page];
  }

  int64_t page_size_;
  std::vector<int64_t> refcounts_;   // [num_pages]
  std::vector<int32_t> free_pages_;  // a stack: the page freed last, its memory still warm, is taken first
  std::vector<Sequence> sequences_;
  std::vector<int32_t> free_sequences_;
  std::vector<Undo> undo_;  // of append_many, kept for its memory
};

}  // namespace rrt::kv_cache
