// What op.cpp calls for CUDA tensors.
#pragma once

#include "dtype.h"
#include "loop_lora/launch.h"

namespace rrt::loop_lora {

struct CudaParams {
  const Params* params;      // not packed; pointers to device memory
  const int32_t* loops;      // [m], on the device
  void* shrunk;              // cuda_scratch_bytes of device memory, aligned to 16; null if there is no rank
};

int64_t cuda_scratch_bytes(const Params& params);

// Queues the kernels on `stream` (a cudaStream_t) of `device`: no allocation, no synchronisation. Returns null, or
// what failed.
const char* run_cuda(const CudaParams& params, int device, void* stream);

}  // namespace rrt::loop_lora
