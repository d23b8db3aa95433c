// Launches of rrt::loop_lora_linear on CUDA: shrink, then expand, chained by programmatic dependent launch. The choice of kernel depends on the layer's shape, that of a tile also on
// the number of rows, which changes no bit.
#include "cuda/launch.h"
#include "loop_lora/cuda_launch.h"
#include "loop_lora/cuda_plain.h"

namespace rrt::loop_lora {
namespace {

template <class Half, int TILES, int TOKENS, int STAGES, bool SHRINK>
__global__ void __launch_bounds__(kThreads, 1) decode_kernel(const __grid_constant__ DecodeArgs args) {
  decode_body<Half, TILES, TOKENS, STAGES, SHRINK>(args);
}

template <class Number, bool SHRINK>
__global__ void __launch_bounds__(kThreads, 1) plain_kernel(const __grid_constant__ DecodeArgs args) {
  plain_body<Number, SHRINK>(args);
}

// Shrink and expand. `rank_kernel` covers `rank_rows` ranks per block, `kernel` `rows` outputs.
cudaError_t launch_both(void (*rank_kernel)(DecodeArgs), int rank_rows, int rank_shared, void (*kernel)(DecodeArgs),
                        int rows, int shared, int tokens, const DecodeArgs& args, cudaStream_t stream) {
  const unsigned token_tiles = cuda::ceil_div(args.m, tokens);
  if (args.total_rank > 0) {
    const dim3 grid(cuda::ceil_div(args.total_rank, rank_rows), args.num_loops, token_tiles);
    const cudaError_t error = cuda::launch(rank_kernel, args, grid, kThreads, rank_shared, false, stream);
    if (error != cudaSuccess) return error;
  }
  const bool dependent = args.total_rank > 0 && cuda::has_dependent_launch();
  const dim3 grid(cuda::ceil_div(args.n, rows), 1, token_tiles);
  return cuda::launch(kernel, args, grid, kThreads, shared, dependent, stream);
}

template <int TOKENS>
constexpr int kNarrowStages = 0;
#define RRT_STAGES(TILES, TOKENS, STAGES) \
  template <>                             \
  constexpr int kNarrowStages<TOKENS> = STAGES;
RRT_NARROW_TILES(RRT_STAGES)
#undef RRT_STAGES

template <class Half, int TILES, int TOKENS, int STAGES>
cudaError_t launch_decode(const DecodeArgs& args, cudaStream_t stream) {
  constexpr int kRankStages = kNarrowStages<TOKENS>;
  constexpr int kShared = decode_shared_bytes<TILES, TOKENS, STAGES>();
  constexpr int kRankShared = decode_shared_bytes<1, TOKENS, kRankStages>();
  static_assert(kShared <= 163 << 10 && kRankShared <= 163 << 10, "an A100 has no more");
  return launch_both(decode_kernel<Half, 1, TOKENS, kRankStages, true>, 16, kRankShared,
                     decode_kernel<Half, TILES, TOKENS, STAGES, false>, 16 * TILES, kShared, TOKENS, args, stream);
}

// The smallest tile that holds all tokens, or the largest.
template <class Half>
cudaError_t launch_decode_of(const DecodeArgs& args, bool wide, cudaStream_t stream) {
  constexpr int kMaxTokens = 64;
#define RRT_LAUNCH(TILES, TOKENS, STAGES) \
  if (args.m <= TOKENS || TOKENS == kMaxTokens) return launch_decode<Half, TILES, TOKENS, STAGES>(args, stream);
  if (wide) {
    RRT_WIDE_TILES(RRT_LAUNCH)
  } else {
    RRT_NARROW_TILES(RRT_LAUNCH)
  }
#undef RRT_LAUNCH
  return cudaErrorInvalidValue;
}

template <class Number>
cudaError_t launch_plain(const DecodeArgs& args, cudaStream_t stream) {
  return launch_both(plain_kernel<Number, true>, kWarps, 0, plain_kernel<Number, false>, kWarps, 0, kPlainTokens, args,
                     stream);
}

bool fits_decode(const Params& p) {
  bool fits = rows_are_vectors(p);
  for (const Segment& segment : p.segments) fits = fits && segment.out_begin % 16 == 0;
  return fits && p.num_loops <= kMaxLoops && p.segments.size() <= DecodeArgs::kMaxSegments;
}

bool fits_wide_tiles(const Params& p) {
  bool fits = p.n >= 8192;
  for (const Segment& segment : p.segments) fits = fits && segment.out_begin % 64 == 0;
  return fits;
}

int64_t padded_rows(const Params& p) { return (p.m + 7) / 8 * 8; }

}  // namespace

bool rows_are_vectors(const Params& p) {
  bool whole = p.dtype == Dtype::kBFloat16 || p.dtype == Dtype::kFloat16;
  const auto aligned = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; };
  whole = whole && p.k % 8 == 0 && p.x_row_stride % 8 == 0 && p.total_rank % 8 == 0 && p.b_stride % 8 == 0;
  whole = whole && aligned(p.x) && aligned(p.weight) && aligned(p.lora_a) && aligned(p.lora_b);
  for (const Segment& segment : p.segments) whole = whole && segment.rank % 8 == 0 && segment.rank_begin % 8 == 0;
  return whole;
}

int64_t cuda_scratch_bytes(const Params& p) {
  const int64_t value_bytes = fits_decode(p) ? 2 : p.dtype == Dtype::kFloat64 ? 8 : 4;
  // Of 16 bytes, so that any element size divides it.
  return (p.num_loops * padded_rows(p) * p.total_rank * value_bytes + 15) / 16 * 16;
}

const char* run_cuda(const CudaParams& call, int device, void* raw_stream) {
  const Params& p = *call.params;
  const auto stream = static_cast<cudaStream_t>(raw_stream);
  if (p.m == 0 || p.n == 0) return nullptr;
  const cuda::DeviceGuard guard(device);
  if (guard.error != cudaSuccess) return cuda::error_text(guard.error);
  DecodeArgs args{};
  args.x = p.x;
  args.x_stride = p.x_row_stride;
  args.loops = call.loops;
  args.weight = p.weight;
  args.bias = p.bias;
  args.bias_loop_stride = p.bias_loop_stride;
  args.lora_a = p.lora_a;
  args.lora_b = p.lora_b;
  args.shrunk = call.shrunk;
  args.y = p.y;
  args.m = static_cast<int>(p.m);
  args.n = static_cast<int>(p.n);
  args.k = static_cast<int>(p.k);
  args.num_loops = static_cast<int>(p.num_loops);
  args.total_rank = static_cast<int>(p.total_rank);
  args.b_stride = static_cast<int>(p.b_stride);
  args.padded_m = static_cast<int>(padded_rows(p));
  args.num_segments = static_cast<int>(p.segments.size());
  for (int s = 0; s < args.num_segments; ++s) {
    args.segment_out[s] = static_cast<int>(p.segments[s].out_begin);
    args.segment_rank[s] = static_cast<int>(p.segments[s].rank_begin);
    args.segment_size[s] = static_cast<int>(p.segments[s].rank);
  }
  cudaError_t error = cudaErrorInvalidValue;
  const bool decode = fits_decode(p), wide = fits_wide_tiles(p);
  switch (p.dtype) {
    case Dtype::kFloat32: error = launch_plain<device::Float32>(args, stream); break;
    case Dtype::kBFloat16:
      error = decode ? launch_decode_of<device::BFloat16>(args, wide, stream) : launch_plain<device::BFloat16>(args, stream);
      break;
    case Dtype::kFloat16:
      error = decode ? launch_decode_of<device::Float16>(args, wide, stream) : launch_plain<device::Float16>(args, stream);
      break;
    case Dtype::kFloat64: error = launch_plain<device::Float64>(args, stream); break;
  }
  return cuda::error_text(error);
}

}  // namespace rrt::loop_lora
