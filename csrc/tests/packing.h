// pack_cpu on the tests' arrays.
#pragma once

#include "kernels.h"
#include "packed_linear/launch.h"

namespace rrt::tests {

inline Array pack(Dtype dtype, const Array& from, int64_t count, int64_t n, int64_t k) {
  Array to(dtype, count * packed_linear::packed_size(dtype, n, k), Aligned::kFresh);
  packed_linear::pack_cpu(dtype, from.data(), count, n, k, to.data(), run_threaded);
  return to;
}

}  // namespace rrt::tests
