// The interface to op.cpp for CUDA tensors.
#pragma once

#include "kv_cache/launch.h"

namespace rrt::kv_cache {

// Values of slots, pages, lengths and positions stay on the device, unchecked by the host: the kernels skip a bad
// slot, and make the rows of a bad page or position NaN, or of a context longer than its block table. Only query_start
// must be right.
struct CudaWriteParams {
  const WriteParams* params;
  int64_t num_slots, max_positions;
};

struct CudaAttentionParams {
  const AttentionParams* params;
  const int32_t* query_start;  // [num_sequences + 1]; null: decode
  const int32_t* context_lens;
  int64_t num_sequences, num_pages, max_pages, max_positions;
  void* partial;  // cuda_scratch_bytes of device memory
};

constexpr int64_t kCudaMaxHeadDim = 512;

int64_t cuda_scratch_bytes(const CudaAttentionParams& params);

// Queue the kernels on `stream` (a cudaStream_t) of `device`: no allocation, no synchronisation. Return null, or the
// error's text.
const char* write_cuda(const CudaWriteParams& params, int device, void* stream);
const char* attention_cuda(const CudaAttentionParams& params, int device, void* stream);

}  // namespace rrt::kv_cache
