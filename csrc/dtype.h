// Dtypes as the kernels, which know nothing of torch, name them; and how they spread work over threads.
#pragma once

#include <cstdint>

namespace rrt {

enum class Dtype { kFloat32, kFloat64, kBFloat16, kFloat16 };

constexpr int64_t bytes_of(Dtype dtype) { return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2; }

// Calls body(begin, end, context) over disjoint ranges that cover [begin, end), possibly in parallel.
using ParallelFor = void (*)(int64_t begin, int64_t end, int64_t grain_size,
                             void (*body)(int64_t begin, int64_t end, void* context), void* context);

}  // namespace rrt
