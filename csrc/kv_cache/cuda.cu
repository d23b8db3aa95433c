// Launches of the key/value operators on CUDA.
#include <algorithm>

#include "cuda/launch.h"
#include "kv_cache/cuda_decode_attention.h"
#include "kv_cache/cuda_launch.h"
#include "kv_cache/cuda_plain.h"
#include "kv_cache/cuda_prefill_attention.h"

namespace rrt::kv_cache {
namespace {

using cuda::launch;

constexpr int kMaxSharedBytes = 163 << 10;

template <class Number>
__global__ void __launch_bounds__(kThreads) write_kernel(const __grid_constant__ CudaWriteArgs args) {
  write_body<Number>(args);
}

template <class Half, int HEAD_DIM, int STAGES>
__global__ void __maxnreg__(kDecodeRegisters<HEAD_DIM>)
    decode_kernel(const __grid_constant__ CudaAttentionArgs args) {
  decode_attention_body<Half, HEAD_DIM, STAGES>(args);
}

template <class Half, int HEAD_DIM, int WARPS, int ROW_TILES, int SLOTS, int STAGES>
__global__ void __launch_bounds__(32 * WARPS, 1) prefill_kernel(const __grid_constant__ CudaAttentionArgs args) {
  prefill_attention_body<Half, HEAD_DIM, WARPS, ROW_TILES, SLOTS, STAGES>(args);
}

template <class Half, int HEAD_DIM, int AT_ONCE>
__global__ void __launch_bounds__(kCombineThreads<HEAD_DIM>)
    combine_kernel(const __grid_constant__ CudaAttentionArgs args) {
  combine_body<Half, HEAD_DIM, AT_ONCE>(args);
}

template <class Number>
__global__ void __launch_bounds__(kThreads, 1) plain_kernel(const __grid_constant__ CudaAttentionArgs args) {
  plain_attention_body<Number>(args);
}

template <class Half, class Shared>
cudaError_t launch_decode(const CudaAttentionArgs& attention, cudaStream_t stream) {
  static_assert(Shared::kBytes <= kMaxSharedBytes, "an A100 has no more");
  const auto kernel = decode_kernel<Half, Shared::kHeadDim, Shared::kStages>;
  static const bool prefetches = cuda::is_switched_on("RRT_PREFETCH");
  cuda::KernelFacts facts;
  cudaError_t error = cuda::prepare(reinterpret_cast<const void*>(kernel), kThreads, Shared::kBytes, facts);
  if (error != cudaSuccess) return error;
  const bool dependent = cuda::has_dependent_launch() && facts.waits;
  CudaAttentionArgs args = attention;
  args.first_wave = prefetches && dependent ? facts.resident_blocks : 0;
  const dim3 grid(args.num_queries, args.num_kv_heads * args.head_tiles.value, args.pieces);
  error = cuda::launch_prepared(kernel, args, grid, kThreads, Shared::kBytes, dependent, stream);
  if (error != cudaSuccess || args.pieces == 1) return error;
  const auto combine = combines_many(args.pieces) ? combine_kernel<Half, Shared::kHeadDim, kManyPieces>
                                                  : combine_kernel<Half, Shared::kHeadDim, kFewPieces>;
  return launch(combine, args, dim3(args.num_queries, args.num_heads), kCombineThreads<Shared::kHeadDim>, 0,
                cuda::has_dependent_launch(), stream);
}

template <class Half, class Shared>
cudaError_t launch_prefill(const CudaAttentionArgs& attention, cudaStream_t stream) {
  static_assert(Shared::kBytes <= kMaxSharedBytes, "an A100 has no more");
  CudaAttentionArgs args = attention;
  args.tiles = Shared::tiles(args);
  const dim3 grid(args.tiles, args.num_kv_heads);
  return launch(prefill_kernel<Half, Shared::kHeadDim, Shared::kPrefillWarps, Shared::kRowTiles, Shared::kSlots,
                               Shared::kStages>,
                args, grid, Shared::kPrefillThreads, Shared::kBytes, false, stream);
}

template <class Number>
cudaError_t launch_plain(const CudaAttentionArgs& args, cudaStream_t stream) {
  const dim3 grid(cuda::num_tiles(static_cast<int64_t>(args.num_queries) * args.num_heads, kWarps));
  return launch(plain_kernel<Number>, args, grid, kThreads, 0, cuda::has_dependent_launch(), stream);
}

constexpr int kMaxGridDepth = 65535;

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// The instances want keys, values and results at 16-byte addresses, numbers of slots in 32 bits, and a scale under
// which the largest product is the largest score.
template <class Half>
cudaError_t launch_half(const CudaAttentionArgs& args, cudaStream_t stream) {
  cudaError_t (*launcher)(const CudaAttentionArgs&, cudaStream_t) = launch_plain<Half>;
  const bool fits = static_cast<float>(args.scale) > 0 && args.pieces <= kMaxGridDepth &&
                    static_cast<int64_t>(args.num_pages) * args.page_size.value <= INT32_MAX;
  if (fits && aligned(args.k_cache) && aligned(args.v_cache) && aligned(args.out)) {
    const auto choose = [&](auto instances, auto launch_of) {
      for_each_type(instances, [&](auto candidate) {
        if (args.head_dim == decltype(candidate)::kHeadDim) launcher = launch_of(candidate);
      });
    };
    if (args.query_start == nullptr) {
      choose(DecodeInstances{}, [](auto candidate) { return launch_decode<Half, decltype(candidate)>; });
    } else {
      choose(PrefillInstances{}, [](auto candidate) { return launch_prefill<Half, decltype(candidate)>; });
    }
  }
  return launcher(args, stream);
}

CudaRope device_rope(const Rope& rope, int64_t max_positions) {
  return {rope.positions, rope.cos_sin, static_cast<int>(max_positions), static_cast<int>(rope.rotary_dim)};
}

int64_t pieces_of(const CudaAttentionParams& p) {
  return most_pieces(p.max_pages * p.params->page_size);
}

}  // namespace

int64_t cuda_scratch_bytes(const CudaAttentionParams& call) {
  const AttentionParams& p = *call.params;
  const int64_t pieces = pieces_of(call);
  if (call.query_start != nullptr || pieces <= 1) return 0;
  return p.num_queries * p.num_heads * pieces * (p.head_dim + kPartialEnds) * static_cast<int64_t>(sizeof(float));
}

const char* write_cuda(const CudaWriteParams& call, int device, void* raw_stream) {
  const WriteParams& p = *call.params;
  if (p.m == 0) return nullptr;
  const cuda::DeviceGuard guard(device);
  if (guard.error != cudaSuccess) return cuda::error_text(guard.error);
  CudaWriteArgs args{};
  args.k = p.k;
  args.v = p.v;
  args.k_row_stride = p.k_row_stride;
  args.k_head_stride = p.k_head_stride;
  args.v_row_stride = p.v_row_stride;
  args.v_head_stride = p.v_head_stride;
  args.k_cache = p.k_cache;
  args.v_cache = p.v_cache;
  args.slots = p.slots;
  args.num_slots = call.num_slots;
  args.rope = device_rope(p.rope, call.max_positions);
  args.num_kv_heads = static_cast<int>(p.num_kv_heads);
  args.head_dim = static_cast<int>(p.head_dim);
  void (*kernel)(CudaWriteArgs) = nullptr;
  switch (p.dtype) {
    case Dtype::kFloat32: kernel = write_kernel<device::Float32>; break;
    case Dtype::kFloat64: kernel = write_kernel<device::Float64>; break;
    case Dtype::kBFloat16: kernel = write_kernel<device::BFloat16>; break;
    case Dtype::kFloat16: kernel = write_kernel<device::Float16>; break;
  }
  const auto stream = static_cast<cudaStream_t>(raw_stream);
  return cuda::error_text(launch(kernel, args, dim3(static_cast<unsigned>(p.m)), kThreads, 0,
                                 cuda::has_dependent_launch(), stream));
}

const char* attention_cuda(const CudaAttentionParams& call, int device, void* raw_stream) {
  const AttentionParams& p = *call.params;
  if (p.num_queries == 0 || p.num_heads == 0 || p.head_dim == 0) return nullptr;
  const cuda::DeviceGuard guard(device);
  if (guard.error != cudaSuccess) return cuda::error_text(guard.error);
  CudaAttentionArgs args{};
  args.q = p.q;
  args.q_row_stride = p.q_row_stride;
  args.q_head_stride = p.q_head_stride;
  args.k_cache = p.k_cache;
  args.v_cache = p.v_cache;
  args.block_tables = p.block_tables;
  args.table_stride = p.table_stride;
  args.query_start = call.query_start;
  args.context_lens = call.context_lens;
  args.scale = p.scale;
  args.rope = device_rope(p.rope, call.max_positions);
  args.out = p.out;
  args.partial = static_cast<float*>(call.partial);
  args.num_queries = static_cast<int>(p.num_queries);
  args.num_sequences = static_cast<int>(call.num_sequences);
  args.num_heads = static_cast<int>(p.num_heads);
  args.num_kv_heads = static_cast<int>(p.num_kv_heads);
  args.head_dim = static_cast<int>(p.head_dim);
  args.group = make_divisor(p.num_heads / p.num_kv_heads);
  args.head_tiles = make_divisor(cuda::num_tiles(args.group.value, kMmaRows));
  args.page_size = make_divisor(std::max<int64_t>(1, p.page_size));
  args.num_pages = static_cast<int>(call.num_pages);
  args.max_pages = p.page_size == 0 ? 0 : static_cast<int>(call.max_pages);
  args.pieces = static_cast<int>(pieces_of(call));
  args.vector_queries = has_vector_queries(args);
  const auto stream = static_cast<cudaStream_t>(raw_stream);
  cudaError_t error = cudaErrorInvalidValue;
  switch (p.dtype) {
    case Dtype::kFloat32: error = launch_plain<device::Float32>(args, stream); break;
    case Dtype::kFloat64: error = launch_plain<device::Float64>(args, stream); break;
    case Dtype::kBFloat16: error = launch_half<device::BFloat16>(args, stream); break;
    case Dtype::kFloat16: error = launch_half<device::Float16>(args, stream); break;
  }
  return cuda::error_text(error);
}

}  // namespace rrt::kv_cache
