#include "checks.h"

#include <torch/csrc/stable/ops.h>

#ifdef RRT_CUDA
// Torch's own header declares it for builds with CUDA alone; on a torch without CUDA the symbol is null.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);
#endif

namespace rrt {

std::string dtype_text(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Short: return "int16";
    case ScalarType::Char: return "int8";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Bool: return "bool";
    case ScalarType::ComplexFloat: return "complex64";
    case ScalarType::ComplexDouble: return "complex128";
    default: return torch::headeronly::toString(dtype);
  }
}

std::string list_text(const std::vector<std::string>& items) {
  std::string text = "[";
  for (size_t i = 0; i < items.size(); ++i) text += (i ? ", " : "") + items[i];
  return text + "]";
}

Dtype Checks::float_dtype(const char* name, const Tensor& tensor) const {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Dtype::kFloat32;
    case ScalarType::Double: return Dtype::kFloat64;
    case ScalarType::BFloat16: return Dtype::kBFloat16;
    case ScalarType::Half: return Dtype::kFloat16;
    default:
      fail(name, ": found dtype ", dtype_text(tensor.scalar_type()),
           "; expected float32, float64, bfloat16 or float16");
  }
}

void Checks::dtype(const char* name, const Tensor& tensor, ScalarType expected) const {
  if (tensor.scalar_type() == expected) return;
  fail(name, ": found dtype ", dtype_text(tensor.scalar_type()), "; expected ", dtype_text(expected));
}

void Checks::same_device(const char* name, const Tensor& tensor, const Tensor& first, const char* first_name) const {
  if (tensor.is_cpu() == first.is_cpu() && tensor.get_device_index() == first.get_device_index()) return;
  const auto text = [](const Tensor& t) {
    return t.is_cpu() ? std::string("cpu") : "cuda:" + std::to_string(t.get_device_index());
  };
  fail(name, ": found device ", text(tensor), "; expected ", first_name, "'s, ", text(first));
}

void Checks::shape(const char* name, const Tensor& tensor, const std::vector<Dim>& expected) const {
  const auto sizes = tensor.sizes();
  bool matches = sizes.size() == expected.size();
  for (size_t i = 0; matches && i < expected.size(); ++i) {
    matches = expected[i].size < 0 || expected[i].size == sizes[i];
  }
  if (matches) return;
  std::vector<std::string> wanted;
  for (const Dim& dim : expected) wanted.push_back(dim.size < 0 ? dim.name : std::to_string(dim.size));
  fail(name, ": found shape ", ints_text(sizes), "; expected ", list_text(wanted));
}

void Checks::contiguous(const char* name, const Tensor& tensor) const {
  if (tensor.is_contiguous()) return;
  fail(name, ": found strides ", ints_text(tensor.strides()),
       "; expected a contiguous tensor (call .contiguous() once, when loading)");
}

Tensor with_dense_last_dim(const Tensor& x) {
  const int64_t last = static_cast<int64_t>(x.sizes().size()) - 1;
  return x.size(last) <= 1 || x.stride(last) == 1 ? x : torch::stable::contiguous(x);
}

Tensor empty_as(const Tensor& x) { return torch::stable::new_empty(x, x.sizes()); }

#ifdef RRT_CUDA
void* current_cuda_stream(int32_t device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return stream;
}
#endif

void torch_parallel(int64_t begin, int64_t end, int64_t grain_size, void (*body)(int64_t, int64_t, void*),
                    void* context) {
  if (begin < end) TORCH_ERROR_CODE_CHECK(torch_parallel_for(begin, end, grain_size, body, context));
}

}  // namespace rrt
