// rrt._plan: host planning of the operators and the page table, as Python sees them. rrt/_plan.pyi is the interface.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "kv_cache/page_table.h"
#include "kv_cache/plan.h"
#include "loop_lora/plan.h"

extern const char* const rrt_source_digest;

namespace py = pybind11;
using namespace py::literals;

namespace {

using rrt::kv_cache::AttentionPlan;
using rrt::kv_cache::AttentionTask;
using rrt::kv_cache::MergeTask;
using rrt::kv_cache::PageCopy;
using rrt::kv_cache::PageTable;
using rrt::loop_lora::LoopGroups;
using rrt::loop_lora::RowBlock;
using rrt::loop_lora::RowPiece;
using rrt::packed_linear::RowTile;

[[noreturn]] void fail(const std::string& name, const std::string& found, const std::string& expected) {
  throw std::invalid_argument(name + ": found " + found + "; expected " + expected);
}

[[noreturn]] void fail(const std::string& name, int64_t found, const std::string& expected) {
  fail(name, std::to_string(found), expected);
}

int64_t at_least(const char* name, int64_t value, int64_t least) {
  if (value < least) fail(name, value, "at least " + std::to_string(least));
  return value;
}

// Integers [size]. An array of T is read in place; anything else that numpy makes an array of integers of is copied.
template <class T>
class Integers {
 public:
  Integers(const char* name, const py::object& values) {
    if (Array::check_(values)) {
      array_ = py::reinterpret_borrow<Array>(values);
      if (array_.ndim() == 1) return;
    }
    const auto array = py::array::ensure(values);
    if (!array) throw py::error_already_set();
    const char kind = array.dtype().kind();
    if (array.ndim() != 1 || (array.size() > 0 && kind != 'i' && kind != 'u')) {
      const std::string found = py::str(array.dtype());
      fail(name, found + " " + std::string(py::str(py::list(array.attr("shape")))), "integers [M]");
    }
    if (kind == 'u' && array.dtype().itemsize() == 8 && array.size() > 0) {
      const auto largest = array.attr("max")().cast<uint64_t>();
      if (largest > static_cast<uint64_t>(std::numeric_limits<T>::max())) {
        fail(name, std::to_string(largest), "an int32");
      }
    }
    const auto wide = py::array_t<int64_t, py::array::c_style | py::array::forcecast>::ensure(array);
    if (!wide) throw py::error_already_set();
    array_ = Array(wide.size());
    for (py::ssize_t i = 0; i < wide.size(); ++i) {
      const int64_t value = wide.data()[i];
      if (value < std::numeric_limits<T>::min() || value > std::numeric_limits<T>::max()) {
        fail(std::string(name) + "[" + std::to_string(i) + "]", value, "an int32");
      }
      array_.mutable_data()[i] = static_cast<T>(value);
    }
  }

  const T* data() const { return array_.data(); }
  int64_t size() const { return array_.size(); }

 private:
  using Array = py::array_t<T, py::array::c_style>;
  Array array_;
};

void check_same_size(const char* name, int64_t size, int64_t handles) {
  if (size != handles) fail(name, std::to_string(size) + " entries", std::to_string(handles) + " as in handles");
}

// The vector becomes the array's memory.
template <class T>
py::array_t<T> own(std::vector<T>&& values) {
  auto held = std::make_unique<std::vector<T>>(std::move(values));
  std::vector<T>* vector = held.release();
  const py::capsule owner(vector, [](void* raw) { delete static_cast<std::vector<T>*>(raw); });
  return py::array_t<T>(vector->size(), vector->data(), owner);
}

// A read-only array over a field of the Python object `owner`.
template <class Owner, class T>
auto view(std::vector<T> Owner::*field) {
  return [field](const py::object& owner) {
    const std::vector<T>& values = owner.cast<const Owner&>().*field;
    py::array_t<T> array(values.size(), values.data(), owner);
    array.attr("setflags")("write"_a = false);
    return array;
  };
}

void define_loop_lora(py::module_& m) {
  PYBIND11_NUMPY_DTYPE(RowTile, begin, rows);
  PYBIND11_NUMPY_DTYPE(RowPiece, begin, rows, loop);
  py::class_<RowBlock>(m, "RowBlock")
      .def_readonly("begin", &RowBlock::begin)
      .def_readonly("rows", &RowBlock::rows)
      .def_property_readonly("tiles", view(&RowBlock::tiles))
      .def_property_readonly("pieces", view(&RowBlock::pieces))
      .def_property_readonly("present", view(&RowBlock::loop_starts));

  m.def(
      "group_rows_by_loop",
      [](const py::object& loops, int64_t num_loops) {
        at_least("num_loops", num_loops, 0);
        const Integers<int32_t> rows("loops", loops);
        LoopGroups groups = rrt::loop_lora::group_rows_by_loop(rows.data(), rows.size(), num_loops);
        if (!groups.ok()) {
          fail("loops[" + std::to_string(groups.bad_row) + "]", rows.data()[groups.bad_row],
               "a loop in [0, " + std::to_string(num_loops) + ")");
        }
        return std::make_pair(own(std::move(groups.order)), own(std::move(groups.offsets)));
      },
      "loops"_a, "num_loops"_a);

  m.def(
      "plan_rows",
      [](const py::object& offsets, int64_t tile_rows, int64_t block_rows) {
        at_least("tile_rows", tile_rows, 1);
        at_least("block_rows", block_rows, 1);
        const Integers<int64_t> ends("offsets", offsets);
        LoopGroups groups;
        groups.offsets.assign(ends.data(), ends.data() + ends.size());
        int64_t last = 0;
        for (int64_t i = 0; i < ends.size(); ++i) {
          const int64_t offset = groups.offsets[i];
          if (i == 0 ? offset != 0 : offset < last) {
            fail("offsets[" + std::to_string(i) + "]", offset, i == 0 ? "0" : "at least " + std::to_string(last));
          }
          last = offset;
        }
        if (groups.offsets.empty()) fail("offsets", "no entries", "num_loops + 1, as group_rows_by_loop returns");
        return rrt::loop_lora::plan_rows(groups, tile_rows, block_rows);
      },
      "offsets"_a, "tile_rows"_a, "block_rows"_a);
}

void define_kv_cache(py::module_& m) {
  m.attr("SPLIT_SLOTS") = rrt::kv_cache::kSplitSlots;
  m.attr("TILE_ROWS") = rrt::kv_cache::kTileRows;
  m.attr("MAX_SPLIT_QUERIES") = rrt::kv_cache::kMaxSplitQueries;
  PYBIND11_NUMPY_DTYPE(AttentionTask, sequence, first_query, num_queries, visible, split_begin, split_end, partial);
  PYBIND11_NUMPY_DTYPE(MergeTask, first_query, num_queries, num_splits, partial);
  py::class_<AttentionPlan>(m, "AttentionPlan")
      .def_property_readonly("tasks", view(&AttentionPlan::tasks))
      .def_property_readonly("merges", view(&AttentionPlan::merges))
      .def_property_readonly("padding", view(&AttentionPlan::padding))
      .def_readonly("num_partial", &AttentionPlan::num_partial)
      .def_readonly("max_queries", &AttentionPlan::max_queries)
      .def_readonly("num_scores", &AttentionPlan::num_scores);

  m.def(
      "plan_attention",
      [](const py::object& context_lens, int64_t group, const py::object& query_start) {
        using namespace rrt::kv_cache;
        at_least("group", group, 1);
        const Integers<int32_t> contexts("context_lens", context_lens);
        const int64_t num_sequences = contexts.size();
        constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
        const int64_t bad = find_bad_context(contexts.data(), num_sequences, kMost);
        if (bad >= 0) fail("context_lens[" + std::to_string(bad) + "]", contexts.data()[bad], "at least 0");
        if (query_start.is_none()) return plan_attention(nullptr, contexts.data(), num_sequences, group);

        const Integers<int32_t> starts("query_start", query_start);
        if (starts.size() != num_sequences + 1) {
          fail("query_start", std::to_string(starts.size()) + " entries",
               std::to_string(num_sequences + 1) + ", one more than context_lens has");
        }
        const int64_t num_queries = starts.data()[num_sequences];
        const int64_t fallen = find_bad_query_start(starts.data(), num_sequences, num_queries);
        if (fallen >= 0) {
          fail("query_start[" + std::to_string(fallen) + "]", starts.data()[fallen],
               fallen == 0 ? "0" : "at least " + std::to_string(starts.data()[fallen - 1]));
        }
        const int64_t brief = find_short_context(starts.data(), contexts.data(), num_sequences);
        if (brief >= 0) {
          fail("context_lens[" + std::to_string(brief) + "]", contexts.data()[brief],
               "at least " + std::to_string(num_queries_of(starts.data(), contexts.data(), brief)) +
                   ", the sequence's queries");
        }
        return plan_attention(starts.data(), contexts.data(), num_sequences, group);
      },
      "context_lens"_a, "group"_a, "query_start"_a = py::none());
}

py::list copies_list(const std::vector<PageCopy>& copies) {
  py::list list(copies.size());
  for (size_t i = 0; i < copies.size(); ++i) list[i] = py::make_tuple(copies[i].source, copies[i].target);
  return list;
}

void define_page_table(py::module_& m) {
  py::register_exception<rrt::kv_cache::OutOfPages>(m, "OutOfPages", PyExc_RuntimeError);
  py::class_<PageTable>(m, "PageTable")
      .def(py::init<int64_t, int64_t>(), "num_pages"_a, "page_size"_a)
      .def_property_readonly("num_pages", &PageTable::num_pages)
      .def_property_readonly("page_size", &PageTable::page_size)
      .def_property_readonly("num_free_pages", &PageTable::num_free_pages)
      .def_property_readonly("num_used_pages", &PageTable::num_used_pages)
      .def_property_readonly("num_sequences", &PageTable::num_sequences)
      .def("create", &PageTable::create)
      .def("length", &PageTable::length, "handle"_a)
      .def("pages", &PageTable::pages, "handle"_a)
      .def("refcount", &PageTable::refcount, "page"_a)
      .def("pages_needed", &PageTable::pages_needed, "handle"_a, "count"_a)
      .def(
          "append",
          [](PageTable& table, int64_t handle, int64_t count) { return copies_list(table.append(handle, count)); },
          "handle"_a, "count"_a)
      .def(
          "append_many",
          [](PageTable& table, const py::object& handles, const py::object& counts) {
            const Integers<int64_t> rows("handles", handles);
            const Integers<int32_t> numbers("counts", counts);
            check_same_size("counts", numbers.size(), rows.size());
            return copies_list(table.append_many(rows.data(), numbers.data(), rows.size()));
          },
          "handles"_a, "counts"_a)
      .def("fork", &PageTable::fork, "handle"_a)
      .def("alias", &PageTable::alias, "handle"_a, "of"_a)
      .def("truncate", &PageTable::truncate, "handle"_a, "length"_a)
      .def("free", &PageTable::free, "handle"_a)
      .def(
          "slots",
          [](const PageTable& table, const py::object& handles, const py::object& positions) {
            const Integers<int64_t> rows("handles", handles);
            const Integers<int32_t> places("positions", positions);
            check_same_size("positions", places.size(), rows.size());
            py::array_t<int64_t> slots(rows.size());
            table.slots(rows.data(), places.data(), rows.size(), slots.mutable_data());
            return slots;
          },
          "handles"_a, "positions"_a)
      .def(
          "block_tables",
          [](const PageTable& table, const py::object& handles) {
            const Integers<int64_t> rows("handles", handles);
            const int64_t width = table.max_pages(rows.data(), rows.size());
            py::array_t<int32_t> tables({rows.size(), width});
            table.block_tables(rows.data(), rows.size(), width, tables.mutable_data());
            return tables;
          },
          "handles"_a)
      .def("check", &PageTable::check);
}

}  // namespace

PYBIND11_MODULE(_plan, m) {
  m.attr("source_digest") = rrt_source_digest;
  define_loop_lora(m);
  define_kv_cache(m);
  define_page_table(m);
}
