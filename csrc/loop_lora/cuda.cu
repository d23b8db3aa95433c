// Launches of rrt::loop_lora_linear on CUDA: shrink, then the product, chained by programmatic dependent launch. The
// choice of kernel and tile (cuda_tiles.h) depends on the number of rows too, which changes no bit.
#include <algorithm>

#include "cuda/launch.h"
#include "loop_lora/cuda_launch.h"
#include "loop_lora/cuda_plain.h"
#include "loop_lora/cuda_tiles_measured.h"

namespace rrt::loop_lora {
namespace {

constexpr int kSharedOfMultiprocessor = 164 << 10;  // an A100's, of which a block takes 1024 bytes more than it asks for

template <class Half, int TOKENS, int STAGES, bool SHRINK>
__global__ void __launch_bounds__(kColumnThreads, 2) column_kernel(const __grid_constant__ DecodeArgs args) {
  column_body<Half, TOKENS, STAGES, SHRINK>(args);
}

template <class Half, int TOKENS, int STAGES>
__global__ void __launch_bounds__(kRowThreads, 2) row_kernel(const __grid_constant__ DecodeArgs args) {
  row_body<Half, TOKENS, STAGES>(args);
}

template <class Half>
__global__ void __launch_bounds__(kAddThreads) add_parts_kernel(const __grid_constant__ DecodeArgs args) {
  add_parts_body<Half>(args);
}

template <class Number, bool SHRINK>
__global__ void __launch_bounds__(kPlainThreads, 1) plain_kernel(const __grid_constant__ DecodeArgs args) {
  plain_body<Number, SHRINK>(args);
}

// A kernel and what a block of it has.
struct Instance {
  void (*kernel)(DecodeArgs) = nullptr;
  int threads, rows, tokens, shared_bytes;
};

// Of the smallest tile that holds m tokens.
template <class Half, bool SHRINK>
Instance column_instance(int64_t m) {
#define RRT_INSTANCE(TOKENS, STAGES)                                                                           \
  static_assert(column_shared_bytes<TOKENS, STAGES>() + 1024 <= kSharedOfMultiprocessor, "no block fits");     \
  if (tile_tokens(m) == TOKENS) {                                                                              \
    return {column_kernel<Half, TOKENS, STAGES, SHRINK>, kColumnThreads, kColumnRows, TOKENS,                  \
            column_shared_bytes<TOKENS, STAGES>()};                                                            \
  }
  RRT_COLUMN_TILES(RRT_INSTANCE)
#undef RRT_INSTANCE
  return {};
}

template <class Half>
Instance row_instance(int64_t m) {
#define RRT_INSTANCE(TOKENS, STAGES)                                                                                \
  static_assert(2 * (row_shared_bytes<TOKENS, STAGES>() + 1024) <= kSharedOfMultiprocessor, "two blocks must fit"); \
  if (tile_tokens(m) == TOKENS) {                                                                                   \
    return {row_kernel<Half, TOKENS, STAGES>, kRowThreads, kBlockRows, TOKENS, row_shared_bytes<TOKENS, STAGES>()}; \
  }
  RRT_ROW_TILES(RRT_INSTANCE)
#undef RRT_INSTANCE
  return {};
}

cudaError_t launch(const Instance& instance, const DecodeArgs& args, int rows, int depth, bool dependent,
                   cudaStream_t stream) {
  const dim3 grid(cuda::num_tiles(rows, instance.rows) * cuda::num_tiles(args.m, instance.tokens), depth);
  return cuda::launch(instance.kernel, args, grid, instance.threads, instance.shared_bytes, dependent, stream);
}

// `slices` blocks share the parts of a tile, and if they are several, `add` comes last. A kernel that waits for the one
// before may be launched dependent, shrink on whatever came before the operator; without shrink the product must
// not be: it reads x at once.
cudaError_t launch_all(const Instance& shrink, const Instance& product, int slices, const Instance& add,
                       const DecodeArgs& args, cudaStream_t stream) {
  const bool dependent = cuda::has_dependent_launch(), has_rank = args.total_rank > 0;
  cudaError_t error = cudaSuccess;
  if (has_rank) error = launch(shrink, args, args.total_rank, args.num_loops, dependent, stream);
  if (error == cudaSuccess) error = launch(product, args, args.n, slices, dependent && has_rank, stream);
  if (error == cudaSuccess && slices > 1) {
    const dim3 grid(cuda::num_tiles(static_cast<int64_t>(args.m) * args.n, add.threads));
    error = cuda::launch(add.kernel, args, grid, add.threads, 0, dependent, stream);
  }
  return error;
}

template <class Half>
cudaError_t launch_decode(const DecodeArgs& args, const Tiling& tiling, cudaStream_t stream) {
  const Instance product =
      tiling.kernel == DecodeKernel::kRows ? row_instance<Half>(args.m) : column_instance<Half, false>(args.m);
  return launch_all(column_instance<Half, true>(args.m), product, tiling.slices,
                    {add_parts_kernel<Half>, kAddThreads, 1, 1, 0}, args, stream);
}

template <class Number>
cudaError_t launch_plain(const DecodeArgs& args, cudaStream_t stream) {
  const auto instance = [](void (*kernel)(DecodeArgs)) -> Instance {
    return {kernel, kPlainThreads, kPlainRows, kPlainTokens, 0};
  };
  return launch_all(instance(plain_kernel<Number, true>), instance(plain_kernel<Number, false>), 1, {}, args, stream);
}

bool segments_begin_at(const Params& p, int64_t multiple) {
  return std::all_of(p.segments.begin(), p.segments.end(),
                     [&](const Segment& segment) { return segment.out_begin % multiple == 0; });
}

bool fits_decode(const Params& p) {
  return rows_are_vectors(p) && segments_begin_at(p, kColumnRows) && p.num_loops <= kMaxLoops;
}

Tiling forced_tiling{DecodeKernel::kColumns, 0};  // slices 0: none is

Tiling tiling_of(const Params& p) {
  const bool rows_fit = segments_begin_at(p, kBlockRows);
  const bool sums_fit = forced_tiling.slices == 1 || sum_bytes(p.m, p.n) <= kMaxSumBytes;
  if (forced_tiling.slices > 0 && sums_fit && (rows_fit || forced_tiling.kernel == DecodeKernel::kColumns)) {
    return forced_tiling;
  }
  return choose_tiling(kMeasuredTilings, cuda::device_facts().multiprocessors, p.n, p.k, p.m, rows_fit);
}

int64_t padded_rows(const Params& p) { return round_up(p.m, 8); }

int64_t align(int64_t bytes) { return round_up(bytes, 16); }

// Of T; the parts' sums lie behind it.
int64_t shrunk_bytes(const Params& p) {
  const int64_t value_bytes = fits_decode(p) ? 2 : p.dtype == Dtype::kFloat64 ? 8 : 4;
  return align(p.num_loops * padded_rows(p) * p.total_rank * value_bytes);
}

}  // namespace

bool rows_are_vectors(const Params& p) {
  bool whole = p.dtype == Dtype::kBFloat16 || p.dtype == Dtype::kFloat16;
  const auto aligned = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; };
  whole = whole && p.k % 8 == 0 && p.x_row_stride % 8 == 0 && p.total_rank % 8 == 0 && p.b_stride % 8 == 0;
  whole = whole && aligned(p.x) && aligned(p.weight) && aligned(p.lora_a) && aligned(p.lora_b);
  for (const Segment& segment : p.segments) whole = whole && segment.rank % 8 == 0 && segment.rank_begin % 8 == 0;
  return whole;
}

int64_t cuda_scratch_bytes(const Params& p, int device) {
  const cuda::DeviceGuard guard(device);
  const bool sums = fits_decode(p) && tiling_of(p).slices > 1;
  return shrunk_bytes(p) + (sums ? sum_bytes(p.m, p.n) : 0);
}

const char* run_cuda(const CudaParams& call, int device, void* raw_stream) {
  const Params& p = *call.params;
  const auto stream = static_cast<cudaStream_t>(raw_stream);
  if (p.m == 0 || p.n == 0) return nullptr;
  const cuda::DeviceGuard guard(device);
  if (guard.error != cudaSuccess) return cuda::error_text(guard.error);
  const bool decode = fits_decode(p);
  const Tiling tiling = decode ? tiling_of(p) : Tiling{};
  DecodeArgs args{};
  args.x = p.x;
  args.x_stride = p.x_row_stride;
  args.loops = call.loops;
  args.weight = p.weight;
  args.bias = p.bias;
  args.bias_loop_stride = p.bias_loop_stride;
  args.lora_a = p.lora_a;
  args.lora_b = p.lora_b;
  args.shrunk = call.scratch;
  args.part_sums = reinterpret_cast<float*>(static_cast<char*>(call.scratch) + shrunk_bytes(p));
  args.y = p.y;
  args.m = static_cast<int>(p.m);
  args.n = static_cast<int>(p.n);
  args.k = static_cast<int>(p.k);
  args.num_loops = static_cast<int>(p.num_loops);
  args.total_rank = static_cast<int>(p.total_rank);
  args.b_stride = static_cast<int>(p.b_stride);
  args.padded_m = static_cast<int>(padded_rows(p));
  args.parts_per_block = decode ? kParts / tiling.slices : 0;
  args.num_segments = static_cast<int>(p.segments.size());
  for (int s = 0; s < args.num_segments; ++s) {
    args.segment_out[s] = static_cast<int>(p.segments[s].out_begin);
    args.segment_rank[s] = static_cast<int>(p.segments[s].rank_begin);
    args.segment_size[s] = static_cast<int>(p.segments[s].rank);
  }
  cudaError_t error = cudaErrorInvalidValue;
  switch (p.dtype) {
    case Dtype::kFloat32: error = launch_plain<device::Float32>(args, stream); break;
    case Dtype::kBFloat16:
      error = decode ? launch_decode<device::BFloat16>(args, tiling, stream) : launch_plain<device::BFloat16>(args, stream);
      break;
    case Dtype::kFloat16:
      error = decode ? launch_decode<device::Float16>(args, tiling, stream) : launch_plain<device::Float16>(args, stream);
      break;
    case Dtype::kFloat64: error = launch_plain<device::Float64>(args, stream); break;
  }
  return cuda::error_text(error);
}

}  // namespace rrt::loop_lora

// For measurements: from now on every product that it fits is tiled so; slices 0: as chosen. Not for use while another
// thread runs the operator.
extern "C" __attribute__((visibility("default"))) void rrt_loop_lora_force_tiling(int rows, int slices) {
  using namespace rrt::loop_lora;
  forced_tiling = {rows != 0 ? DecodeKernel::kRows : DecodeKernel::kColumns, slices};
}
