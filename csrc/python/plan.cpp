// rrt._plan: the page table as Python sees it. rrt/_plan.pyi is the interface.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "kv_cache/page_table.h"

extern const char* const rrt_source_digest;

namespace py = pybind11;
using namespace py::literals;

namespace {

using rrt::kv_cache::PageCopy;
using rrt::kv_cache::PageTable;

[[noreturn]] void fail(const std::string& name, const std::string& found, const std::string& expected) {
  throw std::invalid_argument(name + ": found " + found + "; expected " + expected);
}

[[noreturn]] void fail(const std::string& name, int64_t found, const std::string& expected) {
  fail(name, std::to_string(found), expected);
}

// Integers [size]. An array of T is read in place; whatever else numpy can make an array of integers from is copied.
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
        fail(name, std::to_string(largest), "an int" + std::to_string(8 * sizeof(T)));
      }
    }
    const auto wide = py::array_t<int64_t, py::array::c_style | py::array::forcecast>::ensure(array);
    if (!wide) throw py::error_already_set();
    array_ = Array(wide.size());
    for (py::ssize_t i = 0; i < wide.size(); ++i) {
      const int64_t value = wide.data()[i];
      if (value < std::numeric_limits<T>::min() || value > std::numeric_limits<T>::max()) {
        fail(std::string(name) + "[" + std::to_string(i) + "]", value, "an int" + std::to_string(8 * sizeof(T)));
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
  define_page_table(m);
}
