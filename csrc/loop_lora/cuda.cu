// Launches of rrt::loop_lora_linear on CUDA: shrink, then the product, chained by programmatic dependent launch. The
// choice of kernel and tile (cuda_tiles.h) depends on the number of rows, which changes no bit.
#include <algorithm>

#include "cuda/launch.h"
#include "loop_lora/cuda_column_kernel.h"
#include "loop_lora/cuda_launch.h"
#include "loop_lora/cuda_plain.h"
#include "loop_lora/cuda_row_kernel.h"
#include "loop_lora/cuda_tiles_measured.h"

namespace rrt::loop_lora {
namespace {

constexpr int kSharedOfMultiprocessor = 164 << 10;  // an A100's
constexpr int kReservedShared = 1 << 10;            // taken by every thread block beside what it asks for

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

// A kernel, and its thread block: threads, the tile of outputs and tokens, dynamic shared memory.
struct Instance {
  void (*kernel)(DecodeArgs) = nullptr;
  int threads = 0, rows = 0, tokens = 0, shared_bytes = 0;
};

template <class Half, int TOKENS, int STAGES, bool SHRINK>
Instance column_instance() {
  Instance instance;
  instance.kernel = column_kernel<Half, TOKENS, STAGES, SHRINK>;
  instance.threads = kColumnThreads;
  instance.rows = kColumnTileRows;
  instance.tokens = TOKENS;
  constexpr int kSharedBytes = column_shared_bytes<TOKENS, STAGES>();
  static_assert(kSharedBytes + kReservedShared <= kSharedOfMultiprocessor, "no thread block fits");
  instance.shared_bytes = kSharedBytes;
  return instance;
}

template <class Half, int TOKENS, int STAGES>
Instance row_instance() {
  Instance instance;
  instance.kernel = row_kernel<Half, TOKENS, STAGES>;
  instance.threads = kRowThreads;
  instance.rows = kRowTileRows;
  instance.tokens = TOKENS;
  constexpr int kSharedBytes = row_shared_bytes<TOKENS, STAGES>();
  static_assert(2 * (kSharedBytes + kReservedShared) <= kSharedOfMultiprocessor, "two thread blocks must fit");
  instance.shared_bytes = kSharedBytes;
  return instance;
}

// The instance with the smallest tile that holds m tokens, or with the largest.
template <class Half, bool SHRINK>
Instance choose_column_instance(int64_t m) {
  Instance chosen;
  for_each_type(ColumnInstances{}, [&](auto candidate) {
    using C = decltype(candidate);
    if (C::kTokens == tile_tokens(m)) chosen = column_instance<Half, C::kTokens, C::kStages, SHRINK>();
  });
  return chosen;
}

template <class Half>
Instance choose_row_instance(int64_t m) {
  Instance chosen;
  for_each_type(RowInstances{}, [&](auto candidate) {
    using C = decltype(candidate);
    if (C::kTokens == tile_tokens(m)) chosen = row_instance<Half, C::kTokens, C::kStages>();
  });
  return chosen;
}

template <class Half>
Instance add_instance() {
  Instance instance;
  instance.kernel = add_parts_kernel<Half>;
  instance.threads = kAddThreads;
  return instance;
}

template <class Number, bool SHRINK>
Instance plain_instance() {
  Instance instance;
  instance.kernel = plain_kernel<Number, SHRINK>;
  instance.threads = kPlainThreads;
  instance.rows = kPlainRows;
  instance.tokens = kPlainTokens;
  return instance;
}

cudaError_t launch(const Instance& instance, const DecodeArgs& args, int rows, int grid_y, bool dependent,
                   cudaStream_t stream) {
  const dim3 grid(cuda::num_tiles(rows, instance.rows) * cuda::num_tiles(args.m, instance.tokens), grid_y);
  return cuda::launch(instance.kernel, args, grid, instance.threads, instance.shared_bytes, dependent, stream);
}

// `add` comes last if there are several slices. A kernel that waits for the one before it may be launched dependent: so
// may shrink, whatever came before the operator. A product without shrink may not, since it reads x at once.
cudaError_t launch_all(const Instance& shrink, const Instance& product, int slices, const Instance& add,
                       const DecodeArgs& args, cudaStream_t stream) {
  const bool dependent = cuda::has_dependent_launch(), has_rank = args.total_rank > 0 && args.num_loops > 0;
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
  const Instance product = tiling.kernel == DecodeKernel::kRows ? choose_row_instance<Half>(args.m)
                                                                : choose_column_instance<Half, false>(args.m);
  return launch_all(choose_column_instance<Half, true>(args.m), product, tiling.slices, add_instance<Half>(), args,
                    stream);
}

template <class Number>
cudaError_t launch_plain(const DecodeArgs& args, cudaStream_t stream) {
  return launch_all(plain_instance<Number, true>(), plain_instance<Number, false>(), 1, Instance{}, args, stream);
}

bool segments_begin_at(const Params& p, int64_t multiple) {
  return std::all_of(p.segments.begin(), p.segments.end(),
                     [&](const Segment& segment) { return segment.out_begin % multiple == 0; });
}

bool fits_decode(const Params& p) {
  return rows_are_vectors(p) && segments_begin_at(p, kColumnTileRows) && p.num_loops <= kMaxLoops;
}

Tiling forced_tiling{DecodeKernel::kColumns, 0};  // with 0 slices, no tiling is forced

Tiling tiling_of(const Params& p) {
  const bool rows_fit = segments_begin_at(p, kRowTileRows);
  const bool sums_fit = forced_tiling.slices == 1 || sum_bytes(p.m, p.n) <= kMaxSumBytes;
  if (forced_tiling.slices > 0 && sums_fit && (rows_fit || forced_tiling.kernel == DecodeKernel::kColumns)) {
    return forced_tiling;
  }
  return choose_tiling(kMeasuredTilings, cuda::device_facts().multiprocessors, p.n, p.k, p.m, rows_fit);
}

int64_t padded_rows(const Params& p) { return round_up(p.m, 8); }

int64_t align(int64_t bytes) { return round_up(bytes, 16); }

// Bytes of T, behind which the parts' sums lie.
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
      error = decode ? launch_decode<device::BFloat16>(args, tiling, stream)
                     : launch_plain<device::BFloat16>(args, stream);
      break;
    case Dtype::kFloat16:
      error = decode ? launch_decode<device::Float16>(args, tiling, stream)
                     : launch_plain<device::Float16>(args, stream);
      break;
    case Dtype::kFloat64: error = launch_plain<device::Float64>(args, stream); break;
  }
  return cuda::error_text(error);
}

}  // namespace rrt::loop_lora

// For measurements: from now on every product that the tiling fits is tiled so; with 0 slices, tilings are chosen
// again. Not for use while another thread runs the operator.
extern "C" __attribute__((visibility("default"))) void rrt_loop_lora_force_tiling(int rows, int slices) {
  using namespace rrt::loop_lora;
  forced_tiling = {rows != 0 ? DecodeKernel::kRows : DecodeKernel::kColumns, slices};
}
