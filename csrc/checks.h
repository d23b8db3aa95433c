// Argument checks of the operators. rrt/ops/checks.py makes the same with the same words for the references;
// tests hold the two together.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "dtype.h"

namespace rrt {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A dimension that may be anything is -1 and shown under its name.
struct Dim {
  const char* name;
  int64_t size = -1;
};

std::string dtype_text(ScalarType dtype);
std::string list_text(const std::vector<std::string>& items);

template <class Ints>
std::string ints_text(const Ints& ints) {
  std::vector<std::string> items;
  for (int64_t value : ints) items.push_back(std::to_string(value));
  return list_text(items);
}

// Errors of torch.ops.rrt.<op>: their text begins with "rrt::<op>: ".
struct Checks {
  const char* op;

  template <class... Parts>
  [[noreturn]] void fail(const Parts&... parts) const {
    std::ostringstream message;
    message << "rrt::" << op << ": ";
    (message << ... << parts);
    throw std::runtime_error(message.str());
  }

  // float32, float64, bfloat16 or float16.
  Dtype float_dtype(const char* name, const Tensor& tensor) const;
  void dtype(const char* name, const Tensor& tensor, ScalarType expected) const;
  void same_device(const char* name, const Tensor& tensor, const Tensor& first, const char* first_name) const;
  void shape(const char* name, const Tensor& tensor, const std::vector<Dim>& expected) const;
  void contiguous(const char* name, const Tensor& tensor) const;
};

// x, or a contiguous copy if the elements of its last dimension are not adjacent.
Tensor with_dense_last_dim(const Tensor& x);

Tensor empty_as(const Tensor& x);

#ifdef RRT_CUDA
// The current stream (a cudaStream_t) of CUDA device `device`.
void* current_cuda_stream(int32_t device);
#endif

// Calls body(begin, end, context) over disjoint ranges that cover [begin, end), on torch's threads.
void torch_parallel(int64_t begin, int64_t end, int64_t grain_size, void (*body)(int64_t, int64_t, void*),
                    void* context);

}  // namespace rrt
