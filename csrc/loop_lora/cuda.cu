// Launches of rrt::loop_lora_linear on CUDA: shrink, then the product, each perhaps with a kernel that adds its parts,
// all chained by programmatic dependent launch. The choice of kernels and tiles (cuda_tiles.h) depends on the number of
// rows, which changes no bit.
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

template <class Half, int TOKENS, int PARTS, int STAGES, bool SHRINK>
__global__ void __launch_bounds__(32 * PARTS, 2) column_kernel(const __grid_constant__ DecodeArgs args) {
  column_body<Half, TOKENS, PARTS, STAGES, SHRINK>(args);
}

template <class Half, int TOKENS, int WARP_TILES, int STAGES, bool SHRINK>
__global__ void __launch_bounds__(kRowThreads, 2) row_kernel(const __grid_constant__ DecodeArgs args) {
  row_body<Half, TOKENS, WARP_TILES, STAGES, SHRINK>(args);
}

template <class Half>
__global__ void __launch_bounds__(kAddThreads) add_shrunk_kernel(const __grid_constant__ DecodeArgs args) {
  add_shrunk_body<Half>(args);
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

// The one of `Instances` with so many tokens, of the column kernel.
template <class Half, bool SHRINK, class Instances>
Instance choose_column_instance(Instances instances, int tokens) {
  Instance chosen;
  for_each_type(instances, [&](auto candidate) {
    using C = decltype(candidate);
    if (C::kTokens != tokens) return;
    constexpr int kSharedBytes = column_shared_bytes<C::kTokens, C::kBlockParts, C::kStages>();
    static_assert(C::kBlockParts < kParts || C::kStages == ring_stages(DecodeKernel::kColumns, C::kTokens),
                  "the choice is made for these stages");
    static_assert(kSharedBytes + kReservedShared <= kSharedOfMultiprocessor, "no thread block fits");
    chosen.kernel = column_kernel<Half, C::kTokens, C::kBlockParts, C::kStages, SHRINK>;
    chosen.threads = 32 * C::kBlockParts;
    chosen.rows = kColumnTileRows;
    chosen.tokens = C::kTokens;
    chosen.shared_bytes = kSharedBytes;
  });
  return chosen;
}

// The one of `Instances` with so many outputs and tokens, of the row kernel.
template <class Half, bool SHRINK, class Instances>
Instance choose_row_instance(Instances instances, int64_t rows, int tokens) {
  Instance chosen;
  for_each_type(instances, [&](auto candidate) {
    using C = decltype(candidate);
    if (C::kRows != rows || C::kTokens != tokens) return;
    constexpr int kSharedBytes = row_shared_bytes<C::kTokens, C::kWarpTiles, C::kStages>();
    constexpr DecodeKernel kKernel = C::kRows == 64 ? DecodeKernel::kRows64 : DecodeKernel::kRows;
    static_assert(C::kStages == ring_stages(kKernel, C::kTokens), "the choice is made for these stages");
    static_assert(2 * (kSharedBytes + kReservedShared) <= kSharedOfMultiprocessor, "two thread blocks must fit");
    chosen.kernel = row_kernel<Half, C::kTokens, C::kWarpTiles, C::kStages, SHRINK>;
    chosen.threads = kRowThreads;
    chosen.rows = C::kRows;
    chosen.tokens = C::kTokens;
    chosen.shared_bytes = kSharedBytes;
  });
  return chosen;
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

// Thread block x: tile; y and z as the kernel has them.
cudaError_t launch(const Instance& instance, const DecodeArgs& args, int rows, int grid_y, int grid_z, bool dependent,
                   cudaStream_t stream) {
  const dim3 grid(cuda::num_tiles(rows, instance.rows) * cuda::num_tiles(args.m, instance.tokens), grid_y, grid_z);
  return cuda::launch(instance.kernel, args, grid, instance.threads, instance.shared_bytes, dependent, stream);
}

// Of a kernel that adds the parts' sums of [m, columns].
cudaError_t launch_add(void (*kernel)(DecodeArgs), const DecodeArgs& args, int columns, bool dependent,
                       cudaStream_t stream) {
  return cuda::launch(kernel, args, dim3(args.m, cuda::num_tiles(columns, kAddThreads)), kAddThreads, 0, dependent,
                      stream);
}

// Whether a layer has LoRA, which shrink begins.
bool has_shrink(const DecodeArgs& args) { return args.total_rank > 0 && args.num_loops > 0; }

template <class Half>
Instance choose_shrink_instance(ShrinkKernel kernel, int64_t m) {
  const int tokens = shrink_tokens(kernel, m);
  switch (kernel) {
    case ShrinkKernel::kColumns: return choose_column_instance<Half, true>(ShrinkInstances{}, tokens);
    case ShrinkKernel::kSplitColumns: return choose_column_instance<Half, true>(SplitShrinkInstances{}, tokens);
    case ShrinkKernel::kRows: return choose_row_instance<Half, true>(RowShrinkInstances{}, kRowShrinkRanks, tokens);
  }
  return {};
}

// Each kernel is launched dependent, whatever came before the operator: all wait for what they read.
template <class Half>
cudaError_t launch_decode(const DecodeArgs& decode_args, const Tiling& tiling, ShrinkKernel shrink_kernel,
                          cudaStream_t stream) {
  DecodeArgs args = decode_args;
  const bool dependent = cuda::has_dependent_launch();
  args.starts_early &= dependent;
  cudaError_t error = cudaSuccess;
  if (has_shrink(args)) {
    const Instance shrink = choose_shrink_instance<Half>(shrink_kernel, args.m);
    const int groups = shrink_kernel == ShrinkKernel::kColumns ? 1 : kParts;  // of parts, a thread block each
    error = launch(shrink, args, args.total_rank, args.num_loops, groups, dependent, stream);
    if (error == cudaSuccess && groups > 1) {
      error = launch_add(add_shrunk_kernel<Half>, args, args.total_rank, dependent, stream);
    }
  }
  const bool columns = tiling.kernel == DecodeKernel::kColumns;
  const Instance product =
      columns ? choose_column_instance<Half, false>(ColumnInstances{}, tile_tokens(args.m, kMaxColumnTokens))
              : choose_row_instance<Half, false>(RowInstances{}, tile_rows(tiling.kernel), tile_tokens(args.m));
  if (error == cudaSuccess) error = launch(product, args, args.n, tiling.slices, 1, dependent, stream);
  if (error == cudaSuccess && tiling.slices > 1) {
    error = launch_add(add_parts_kernel<Half>, args, args.n, dependent, stream);
  }
  return error;
}

template <class Number>
cudaError_t launch_plain(const DecodeArgs& args, cudaStream_t stream) {
  const bool dependent = cuda::has_dependent_launch();
  cudaError_t error = cudaSuccess;
  if (has_shrink(args)) {
    error = launch(plain_instance<Number, true>(), args, args.total_rank, args.num_loops, 1, dependent, stream);
  }
  if (error != cudaSuccess) return error;
  return launch(plain_instance<Number, false>(), args, args.n, 1, 1, dependent, stream);
}

bool segments_begin_at(const Params& p, int64_t multiple) {
  return std::all_of(p.segments.begin(), p.segments.end(),
                     [&](const Segment& segment) { return segment.out_begin % multiple == 0; });
}

// The decode kernels step from row to row by 32 bits.
bool fits_decode(const Params& p) {
  constexpr int64_t kMaxStride = int64_t{1} << 26;
  return rows_are_vectors(p) && segments_begin_at(p, kColumnTileRows) && p.num_loops <= kMaxLoops &&
         p.k < kMaxStride && p.x_row_stride < kMaxStride && p.x_row_stride >= 0;
}

Tiling forced_tiling{DecodeKernel::kColumns, 0};  // with 0 slices, no tiling is forced

Gpu current_gpu() {
  const cuda::DeviceFacts facts = cuda::device_facts();
  return {facts.multiprocessors, facts.shared_bytes};
}

Tiling tiling_of(const Params& p) {
  const bool sums_fit = forced_tiling.slices == 1 || sum_bytes(p.m, p.n) <= kMaxSumBytes;
  const auto fits = [&](DecodeKernel kernel) { return segments_begin_at(p, tile_rows(kernel)); };
  if (forced_tiling.slices > 0 && sums_fit && fits(forced_tiling.kernel)) return forced_tiling;
  return choose_tiling(kMeasuredTilings, current_gpu(), p.n, p.k, p.m, fits(DecodeKernel::kRows),
                       fits(DecodeKernel::kRows64));
}

ShrinkKernel shrink_kernel_of(const Params& p) {
  if (p.total_rank == 0 || p.num_loops == 0) return ShrinkKernel::kColumns;
  return choose_shrink(current_gpu(), p.total_rank, p.num_loops, p.k, p.m);
}

int forced_order = -1;

// Whether the product may start before shrink has waited (cuda_decode.h); if not, shrink gives hints.
void choose_order(const Params& p, const Tiling& tiling, ShrinkKernel kernel, DecodeArgs& args) {
  args.starts_early = true;
  if (p.total_rank == 0 || p.num_loops == 0) return;
  const Gpu gpu = current_gpu();
  int64_t rank = 0;
  for (const Segment& segment : p.segments) rank = std::max<int64_t>(rank, segment.rank);
  const ShrinkEstimate shrink = estimate_shrink(kernel, gpu, p.total_rank, p.num_loops, p.k, p.m, rank);
  args.starts_early =
      forced_order >= 0 ? forced_order == 1 : should_start_early(shrink, tiling, gpu, p.n, p.k, p.m);
  static const bool with_hints = cuda::is_switched_on("RRT_PREFETCH");
  if (args.starts_early || !with_hints || !cuda::has_dependent_launch()) return;
  if (!should_give_hints(shrink, tiling, gpu, p.n, p.k, p.m)) return;
  const WeightHints hints = choose_hints(tiling, gpu, p.n, p.k, p.m, shrink);
  args.hint_rows = static_cast<int>(hints.rows);
  args.hint_row_step = static_cast<int>(hints.row_step);
  args.hint_parts = static_cast<int>(hints.parts);
  args.hint_columns = static_cast<int>(hints.columns);
}

int64_t padded_rows(const Params& p) { return round_up(p.m, 8); }

int64_t align(int64_t bytes) { return round_up(bytes, 16); }

// Bytes of T, behind which the parts' sums lie: those of shrink, then those of the product, which writes them once
// shrink's have been added.
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
  if (!fits_decode(p)) return shrunk_bytes(p);
  const int64_t of_shrink = shrink_kernel_of(p) != ShrinkKernel::kColumns ? sum_bytes(p.m, p.total_rank) : 0;
  const int64_t of_product = tiling_of(p).slices > 1 ? sum_bytes(p.m, p.n) : 0;
  return shrunk_bytes(p) + std::max(of_shrink, of_product);
}

const char* run_cuda(const CudaParams& call, int device, void* raw_stream) {
  const Params& p = *call.params;
  const auto stream = static_cast<cudaStream_t>(raw_stream);
  if (p.m == 0 || p.n == 0) return nullptr;
  const cuda::DeviceGuard guard(device);
  if (guard.error != cudaSuccess) return cuda::error_text(guard.error);
  const bool decode = fits_decode(p);
  const Tiling tiling = decode ? tiling_of(p) : Tiling{};
  const ShrinkKernel shrink = decode ? shrink_kernel_of(p) : ShrinkKernel::kColumns;
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
  args.shrink_sums = args.part_sums = reinterpret_cast<float*>(static_cast<char*>(call.scratch) + shrunk_bytes(p));
  args.y = p.y;
  args.m = static_cast<int>(p.m);
  args.n = static_cast<int>(p.n);
  args.k = static_cast<int>(p.k);
  args.num_loops = static_cast<int>(p.num_loops);
  args.total_rank = static_cast<int>(p.total_rank);
  args.b_stride = static_cast<int>(p.b_stride);
  args.padded_m = static_cast<int>(padded_rows(p));
  if (decode) choose_order(p, tiling, shrink, args);
  args.prefetches = decode && should_prefetch(shrink, p.total_rank, p.num_loops, p.k, p.m);
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
      error = decode ? launch_decode<device::BFloat16>(args, tiling, shrink, stream)
                     : launch_plain<device::BFloat16>(args, stream);
      break;
    case Dtype::kFloat16:
      error = decode ? launch_decode<device::Float16>(args, tiling, shrink, stream)
                     : launch_plain<device::Float16>(args, stream);
      break;
    case Dtype::kFloat64: error = launch_plain<device::Float64>(args, stream); break;
  }
  return cuda::error_text(error);
}

}  // namespace rrt::loop_lora

// For measurements: from now on every product that the tiling fits is tiled so; with 0 slices, tilings are chosen
// again. `rows`: 64 or 128 of a tile of the row kernel (1 is 128, too), or 0 for the column kernel. Not for use while
// another thread runs the operator.
extern "C" __attribute__((visibility("default"))) void rrt_loop_lora_force_tiling(int rows, int slices) {
  using namespace rrt::loop_lora;
  const DecodeKernel by_rows = rows == 64 ? DecodeKernel::kRows64 : DecodeKernel::kRows;
  forced_tiling = {rows == 0 ? DecodeKernel::kColumns : by_rows, slices};
}

// For measurements: from now on every product starts early (1) or late (0), or in the order that is chosen (-1).
extern "C" __attribute__((visibility("default"))) void rrt_loop_lora_force_order(int order) {
  rrt::loop_lora::forced_order = order;
}
