// Host side of launches, shared by the operators' .cu files.
#pragma once

#include <cuda_runtime.h>

#include <cstdlib>
#include <cstring>

namespace rrt::cuda {

// Makes `device` current, and the one before it again at the end.
struct DeviceGuard {
  explicit DeviceGuard(int device) {
    error = cudaGetDevice(&previous);
    if (error == cudaSuccess && previous != device) error = cudaSetDevice(device);
  }
  ~DeviceGuard() { cudaSetDevice(previous); }
  DeviceGuard(const DeviceGuard&) = delete;

  int previous = 0;
  cudaError_t error;
};

// Programmatic dependent launch: sm_90 on, unless RRT_PDL=0.
inline bool has_dependent_launch() {
  static const bool wanted = [] {
    const char* asked = std::getenv("RRT_PDL");
    return asked == nullptr || std::strcmp(asked, "0") != 0;
  }();
  int device = 0, major = 0;
  return wanted && cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess && major >= 9;
}

// `dependent`: may start before the kernel before it has ended, which its dependency_wait makes up for.
template <class Args>
cudaError_t launch(void (*kernel)(Args), const Args& args, dim3 grid, int threads, int shared_bytes, bool dependent,
                   cudaStream_t stream) {
  if (shared_bytes > 48 << 10) {
    const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                   cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &attribute;
  config.numAttrs = dependent ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, args);
}

inline const char* error_text(cudaError_t error) {
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

inline unsigned ceil_div(int64_t size, int64_t tile) { return static_cast<unsigned>((size + tile - 1) / tile); }

}  // namespace rrt::cuda
