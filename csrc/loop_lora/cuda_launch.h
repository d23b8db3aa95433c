// The interface to op.cpp for CUDA tensors. Pointers in Params are then to device memory, and nothing is packed.
#pragma once

#include "dtype.h"
#include "loop_lora/launch.h"

namespace rrt::loop_lora {

struct CudaParams {
  const Params* params;
  const int32_t* loops;      // [m], on the device
  void* scratch;             // cuda_scratch_bytes of device memory, aligned to 16 bytes; null if that is 0
};

int64_t cuda_scratch_bytes(const Params& params, int device);

// Queues the kernels on `stream` (a cudaStream_t) of `device`: no allocation, no synchronisation. Returns null, or
// the error's text.
const char* run_cuda(const CudaParams& params, int device, void* stream);

// Whether bfloat16 or float16 rows of x, weight, lora_a and lora_b and the segments' ranks are whole 16-byte vectors,
// as the matrix kernels read them.
bool rows_are_vectors(const Params& params);

// The prefill kernels, for rows that are all of `loop` and parameters that fit. `shrunk` is device memory for [m,
// total_rank] in the dtype of x, aligned to 16 bytes. Otherwise as run_cuda.
bool fits_cuda_prefill(const Params& params);
const char* run_cuda_prefill(const Params& params, int64_t loop, void* shrunk, int device, void* stream);

}  // namespace rrt::loop_lora
