// Prints every CUDA kernel's name, the threads of its thread blocks and their bytes of dynamic shared memory, one
// kernel a line: bench/kernel_resources.py puts them beside the compiler's numbers.
#include <cstdio>
#include <string>

#include "kv_cache/cuda_decode_attention.h"
#include "kv_cache/cuda_plain.h"
#include "kv_cache/cuda_prefill_attention.h"
#include "loop_lora/cuda_column_kernel.h"
#include "loop_lora/cuda_plain.h"
#include "loop_lora/cuda_prefill.h"
#include "loop_lora/cuda_row_kernel.h"

namespace {

// `arguments`: the kernel's template arguments.
void print(const std::string& kernel, const std::string& arguments, int threads, int bytes) {
  std::printf("%s<%s>\t%d\t%d\n", kernel.c_str(), arguments.c_str(), threads, bytes);
}

template <class... Numbers>
std::string join(const std::string& first, Numbers... numbers) {
  return (first + ... + (", " + std::to_string(numbers)));
}

constexpr const char* kNumbers[] = {"Float32", "Float64", "BFloat16", "Float16"};
constexpr const char* kHalves[] = {"BFloat16", "Float16"};

void print_loop_lora() {
  using namespace rrt;
  using namespace rrt::loop_lora;
  for (const char* half : kHalves) {
    const auto print_columns = [&](auto instances, const char* shrink) {
      for_each_type(instances, [&](auto instance) {
        using I = decltype(instance);
        print("loop_lora::column_kernel", join(half, I::kTokens, I::kBlockParts, I::kStages) + shrink,
              32 * I::kBlockParts, column_shared_bytes<I::kTokens, I::kBlockParts, I::kStages>());
      });
    };
    print_columns(ColumnInstances{}, ", false");
    print_columns(ShrinkInstances{}, ", true");
    print_columns(SplitShrinkInstances{}, ", true");
    const auto print_rows = [&](auto instances, const char* shrink) {
      for_each_type(instances, [&](auto instance) {
        using I = decltype(instance);
        print("loop_lora::row_kernel", join(half, I::kTokens, I::kWarpTiles, I::kStages) + shrink, kRowThreads,
              row_shared_bytes<I::kTokens, I::kWarpTiles, I::kStages>());
      });
    };
    print_rows(RowInstances{}, ", false");
    print_rows(RowShrinkInstances{}, ", true");
    print("loop_lora::add_shrunk_kernel", half, kAddThreads, 0);
    print("loop_lora::add_parts_kernel", half, kAddThreads, 0);
    for_each_type(PrefillTiles<device::BFloat16>{}, [&](auto tile) {
      using Tile = decltype(tile);
      print("loop_lora::prefill_kernel",
            join(half, Tile::kTokenWarps, Tile::kOutWarps, Tile::kTokenTiles, Tile::kOutGroups, Tile::kStages),
            Tile::kThreads, Tile::kSharedBytes);
    });
  }
  for (const char* number : kNumbers) {
    for (const char* shrink : {", true", ", false"}) {
      print("loop_lora::plain_kernel", std::string(number) + shrink, kPlainThreads, 0);
    }
  }
}

void print_kv_cache() {
  using namespace rrt;
  using namespace rrt::kv_cache;
  for (const char* half : kHalves) {
    for_each_type(DecodeInstances{}, [&](auto instance) {
      using Shared = decltype(instance);
      print("kv_cache::decode_kernel", join(half, Shared::kHeadDim, Shared::kStages), kThreads, Shared::kBytes);
      for (const int at_once : {kFewPieces, kManyPieces}) {
        print("kv_cache::combine_kernel", join(half, Shared::kHeadDim, at_once), kCombineThreads<Shared::kHeadDim>, 0);
      }
    });
    for_each_type(PrefillInstances{}, [&](auto instance) {
      using Shared = decltype(instance);
      print("kv_cache::prefill_kernel",
            join(half, Shared::kHeadDim, Shared::kPrefillWarps, Shared::kRowTiles, Shared::kSlots, Shared::kStages),
            Shared::kPrefillThreads, Shared::kBytes);
    });
  }
  for (const char* number : kNumbers) {
    print("kv_cache::write_kernel", number, kThreads, 0);
    print("kv_cache::plain_kernel", number, kThreads, 0);
  }
}

}  // namespace

int main() {
  print_loop_lora();
  print_kv_cache();
  std::puts("image_probe\t1\t0");  // of cuda_info.cu
}
