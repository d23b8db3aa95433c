// Prints every CUDA kernel's name, the threads of its blocks and their bytes of dynamic shared memory, one kernel a line:
// what bench/kernel_resources.py needs to know beside what the compiler says.
#include <cstdio>

#include "kv_cache/cuda_plain.h"
#include "loop_lora/cuda_plain.h"
#include "loop_lora/cuda_prefill.h"

namespace {

void print(const char* kernel, const char* number, const char* rest, int threads, int bytes) {
  std::printf("%s<%s%s>\t%d\t%d\n", kernel, number, rest, threads, bytes);
}

constexpr const char* kNumbers[] = {"Float32", "Float64", "BFloat16", "Float16"};
constexpr const char* kHalves[] = {"BFloat16", "Float16"};

void print_loop_lora() {
  using namespace rrt::loop_lora;
  for (const char* half : kHalves) {
#define RRT_PRINT(TOKENS, STAGES)                                                                    \
  print("loop_lora::column_kernel", half, ", " #TOKENS ", " #STAGES ", true", kColumnThreads,        \
        column_shared_bytes<TOKENS, STAGES>());                                                      \
  print("loop_lora::column_kernel", half, ", " #TOKENS ", " #STAGES ", false", kColumnThreads,       \
        column_shared_bytes<TOKENS, STAGES>());
    RRT_COLUMN_TILES(RRT_PRINT)
#undef RRT_PRINT
#define RRT_PRINT(TOKENS, STAGES) \
  print("loop_lora::row_kernel", half, ", " #TOKENS ", " #STAGES, kRowThreads, row_shared_bytes<TOKENS, STAGES>());
    RRT_ROW_TILES(RRT_PRINT)
#undef RRT_PRINT
    print("loop_lora::add_parts_kernel", half, "", kAddThreads, 0);
#define RRT_PRINT(TOKEN_TILES, OUT_GROUPS, STAGES)                                                                   \
  print("loop_lora::prefill_kernel", half, ", " #TOKEN_TILES ", " #OUT_GROUPS ", " #STAGES, kPrefillThreads,         \
        PrefillTile<rrt::device::BFloat16, TOKEN_TILES, OUT_GROUPS, STAGES>::kSharedBytes);
    RRT_PREFILL_TILES(RRT_PRINT)
#undef RRT_PRINT
  }
  for (const char* number : kNumbers) {
    for (const char* shrink : {", true", ", false"}) print("loop_lora::plain_kernel", number, shrink, kPlainThreads, 0);
  }
}

void print_kv_cache() {
  using namespace rrt::kv_cache;
  for (const char* half : kHalves) {
#define RRT_PRINT(HEAD_DIM, STAGES)                                                    \
  print("kv_cache::decode_kernel", half, ", " #HEAD_DIM ", " #STAGES, kThreads,        \
        AttentionShared<HEAD_DIM, STAGES>::bytes<false>());                            \
  print("kv_cache::prefill_kernel", half, ", " #HEAD_DIM ", " #STAGES, kThreads,       \
        AttentionShared<HEAD_DIM, STAGES>::bytes<true>());
    RRT_HEAD_DIMS(RRT_PRINT)
#undef RRT_PRINT
    print("kv_cache::combine_kernel", half, "", kThreads, 0);
  }
  for (const char* number : kNumbers) {
    print("kv_cache::write_kernel", number, "", kThreads, 0);
    print("kv_cache::plain_kernel", number, "", kThreads, 0);
  }
}

}  // namespace

int main() {
  print_loop_lora();
  print_kv_cache();
  std::puts("image_probe\t1\t0");  // of cuda_info.cu
}
