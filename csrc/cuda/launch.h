// Host side of launches, shared by the operators' .cu files.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <utility>

#include "rounding.h"

namespace rrt::cuda {

// Makes `device` current, and the one before it again at the end.
struct DeviceGuard {
  explicit DeviceGuard(int device) {
    error = cudaGetDevice(&previous);
    changed = error == cudaSuccess && previous != device;
    if (changed) error = cudaSetDevice(device);
  }
  ~DeviceGuard() {
    if (changed) cudaSetDevice(previous);
  }
  DeviceGuard(const DeviceGuard&) = delete;

  int previous = 0;
  bool changed = false;
  cudaError_t error;
};

// Whether the environment variable is unset or anything but 0.
inline bool is_switched_on(const char* variable) {
  const char* value = std::getenv(variable);
  return value == nullptr || std::strcmp(value, "0") != 0;
}

// Properties of the current device, for which the driver is asked once.
struct DeviceFacts {
  int multiprocessors = 1;
  int shared_bytes = 0;           // of a multiprocessor
  bool dependent_launch = false;  // sm_90 on, unless RRT_PDL=0
};

inline DeviceFacts device_facts() {
  static std::mutex mutex;
  static std::map<int, DeviceFacts> known;
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return {};
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(device);
  if (found != known.end()) return found->second;
  DeviceFacts facts;
  int major = 0;
  if (cudaDeviceGetAttribute(&facts.multiprocessors, cudaDevAttrMultiProcessorCount, device) != cudaSuccess ||
      cudaDeviceGetAttribute(&facts.shared_bytes, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device) !=
          cudaSuccess ||
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess) {
    return {};
  }
  facts.dependent_launch = major >= 9 && is_switched_on("RRT_PDL");
  return known[device] = facts;
}

inline bool has_dependent_launch() { return device_facts().dependent_launch; }

constexpr int kSharedWithoutAsking = 48 << 10;  // dynamic shared memory that any kernel may have

// What the driver was told of a kernel on a device, and says of it.
struct KernelFacts {
  int shared_bytes = kSharedWithoutAsking;  // most dynamic shared memory that it may have
  bool waits = false;                       // has dependency_wait in it, which is empty in code for less than sm_90
  int resident_blocks = 0;                  // thread blocks that the device holds at once: of a launch, the first wave
};

// Lets `kernel`, all of whose launches have so many threads and so much dynamic shared memory, have that on the current
// device. Of the memory that shared memory and the first-level cache divide between them, shared memory is to get all
// it can (unless RRT_CARVEOUT=0): a multiprocessor runs no kernels side by side that want it divided differently, as
// those chained by dependent launch should run.
inline cudaError_t prepare(const void* kernel, int threads, int shared_bytes, KernelFacts& facts) {
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, KernelFacts> prepared;
  static const bool with_carveout = is_switched_on("RRT_CARVEOUT");
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = prepared.find({kernel, device});
  if (found != prepared.end()) {
    facts = found->second;
  } else {
    // Of the virtual architecture that it was compiled for: a driver also translates code for sm_80 to sm_90.
    cudaFuncAttributes attributes;
    error = cudaFuncGetAttributes(&attributes, kernel);
    if (error != cudaSuccess) return error;
    facts.waits = attributes.ptxVersion >= 90;
    if (with_carveout) {
      constexpr auto kCarveout = cudaFuncAttributePreferredSharedMemoryCarveout;
      error = cudaFuncSetAttribute(kernel, kCarveout, cudaSharedmemCarveoutMaxShared);
      if (error != cudaSuccess) return error;
    }
  }
  if (shared_bytes > facts.shared_bytes) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (error != cudaSuccess) return error;
    facts.shared_bytes = shared_bytes;
  }
  if (facts.resident_blocks == 0) {
    int blocks = 0;
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, shared_bytes);
    if (error != cudaSuccess) return error;
    facts.resident_blocks = blocks * device_facts().multiprocessors;
  }
  prepared[{kernel, device}] = facts;
  return cudaSuccess;
}

// Launches what prepare has told of. `dependent`: may start before the kernel before it has ended, which its
// dependency_wait makes up for; false where the kernel has none.
template <class Args>
cudaError_t launch_prepared(void (*kernel)(Args), const Args& args, dim3 grid, int threads, int shared_bytes,
                            bool dependent, cudaStream_t stream) {
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

// `dependent`: as above, where the kernel has a dependency_wait.
template <class Args>
cudaError_t launch(void (*kernel)(Args), const Args& args, dim3 grid, int threads, int shared_bytes, bool dependent,
                   cudaStream_t stream) {
  KernelFacts facts;
  const cudaError_t error = prepare(reinterpret_cast<const void*>(kernel), threads, shared_bytes, facts);
  if (error != cudaSuccess) return error;
  return launch_prepared(kernel, args, grid, threads, shared_bytes, dependent && facts.waits, stream);
}

inline const char* error_text(cudaError_t error) {
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // or torch would find it after its next launch
  return cudaGetErrorString(error);
}

inline unsigned num_tiles(int64_t size, int64_t tile) { return static_cast<unsigned>(ceil_div(size, tile)); }

}  // namespace rrt::cuda
