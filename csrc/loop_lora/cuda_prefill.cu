// Launches of rrt::loop_lora_prefill on CUDA: shrink, then the product over W and B_l, chained by programmatic
// dependent launch. The choice of tile depends on the number of tiles, which changes no bit.
#include "cuda/launch.h"
#include "loop_lora/cuda_launch.h"
#include "loop_lora/cuda_prefill.h"

namespace rrt::loop_lora {
namespace {

// Registers leave a multiprocessor room for 8 warps.
template <class Half, int TOKEN_WARPS, int OUT_WARPS, int TOKEN_TILES, int OUT_GROUPS, int STAGES>
__global__ void __launch_bounds__(32 * TOKEN_WARPS * OUT_WARPS, 8 / (TOKEN_WARPS * OUT_WARPS))
    prefill_kernel(const __grid_constant__ PrefillArgs args) {
  prefill_body<PrefillTile<Half, TOKEN_WARPS, OUT_WARPS, TOKEN_TILES, OUT_GROUPS, STAGES>>(args);
}

template <class Half>
cudaError_t launch_prefill(const PrefillArgs& args, int multiprocessors, bool dependent, cudaStream_t stream) {
  const int chosen = choose_prefill_tile(PrefillTiles<Half>{}, args, multiprocessors);
  int index = 0;
  cudaError_t error = cudaSuccess;
  for_each_type(PrefillTiles<Half>{}, [&](auto candidate) {
    using Tile = decltype(candidate);
    static_assert(Tile::kSharedBytes <= 163 << 10, "an A100 has no more");
    if (index++ != chosen) return;
    const dim3 grid(cuda::num_tiles(args.m, Tile::kTokens), Tile::out_tiles(args));
    error = cuda::launch(prefill_kernel<Half, Tile::kTokenWarps, Tile::kOutWarps, Tile::kTokenTiles, Tile::kOutGroups,
                                        Tile::kStages>,
                         args, grid, Tile::kThreads, Tile::kSharedBytes, dependent, stream);
  });
  return error;
}

template <class Half>
cudaError_t launch_both(const PrefillArgs& args, const void* lora_a, void* shrunk, cudaStream_t stream) {
  const cuda::DeviceFacts facts = cuda::device_facts();
  if (args.total_rank > 0) {
    // Not dependent: the product may start as soon as shrink has, and reads x before it waits.
    const cudaError_t error =
        launch_prefill<Half>(shrink_args(args, lora_a, shrunk), facts.multiprocessors, false, stream);
    if (error != cudaSuccess) return error;
  }
  return launch_prefill<Half>(args, facts.multiprocessors, args.total_rank > 0 && facts.dependent_launch, stream);
}

}  // namespace

bool fits_cuda_prefill(const Params& p) { return rows_are_vectors(p); }

const char* run_cuda_prefill(const Params& p, int64_t loop, void* shrunk, int device, void* raw_stream) {
  if (p.m == 0 || p.n == 0) return nullptr;
  const cuda::DeviceGuard guard(device);
  if (guard.error != cudaSuccess) return cuda::error_text(guard.error);
  const auto of_loop = [&](const void* tensor, int64_t elements) -> const void* {
    return tensor == nullptr ? nullptr : static_cast<const char*>(tensor) + loop * elements * 2;
  };
  PrefillArgs args{};
  args.x = p.x;
  args.x_stride = p.x_row_stride;
  args.weight = p.weight;
  args.bias = of_loop(p.bias, p.bias_loop_stride);
  args.shrunk = shrunk;
  args.lora_b = of_loop(p.lora_b, p.n * p.b_stride);
  args.y = p.y;
  args.m = static_cast<int>(p.m);
  args.n = static_cast<int>(p.n);
  args.k = static_cast<int>(p.k);
  args.total_rank = static_cast<int>(p.total_rank);
  args.b_stride = static_cast<int>(p.b_stride);
  args.num_segments = static_cast<int>(p.segments.size());
  for (int s = 0; s < args.num_segments; ++s) {
    args.segment_out[s] = static_cast<int>(p.segments[s].out_begin);
    args.segment_rank[s] = static_cast<int>(p.segments[s].rank_begin);
    args.segment_size[s] = static_cast<int>(p.segments[s].rank);
  }
  args.segment_out[args.num_segments] = args.n;
  const void* lora_a = of_loop(p.lora_a, p.total_rank * p.k);
  const auto stream = static_cast<cudaStream_t>(raw_stream);
  return cuda::error_text(p.dtype == Dtype::kBFloat16
                              ? launch_both<device::BFloat16>(args, lora_a, shrunk, stream)
                              : launch_both<device::Float16>(args, lora_a, shrunk, stream));
}

}  // namespace rrt::loop_lora
