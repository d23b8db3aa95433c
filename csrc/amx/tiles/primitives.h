// AMX's tile registers: eight of them, each 16 rows of 64 bytes. Everything that tile kernels ask of the hardware is
// here, so that csrc/tests/emulation/tiles/primitives.h can take this file's place and run them on any CPU.
//
// As assembly, since the compilers' intrinsics do not tell them all which memory is read and written.
#pragma once

#include <cstdint>

namespace rrt {
namespace {
namespace tiles {

constexpr int64_t kRows = 16;
constexpr int64_t kRowBytes = 64;

// This thread's registers are set up, all of the full size, while such an object lives. They are nobody else's
// meanwhile: PyTorch's products set up theirs, and give them back, within a call.
class Registers {
 public:
  explicit Registers(bool are_used = true) : are_used_(are_used) {
    if (!are_used) return;
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0;
      uint8_t reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } configuration;
    static_assert(sizeof(configuration) == 64);
    for (int tile = 0; tile < 8; ++tile) {
      configuration.row_bytes[tile] = kRowBytes;
      configuration.rows[tile] = kRows;
    }
    asm volatile("ldtilecfg %0" ::"m"(configuration) : "memory");
  }
  // Else the processor would keep their 8 KiB, at a cost for whatever else it does.
  ~Registers() {
    if (are_used_) asm volatile("tilerelease" ::: "memory");
  }
  Registers(const Registers&) = delete;
  Registers& operator=(const Registers&) = delete;

 private:
  const bool are_used_;
};

template <int TILE>
inline void zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(TILE));
}

// Rows are `stride` bytes apart.
template <int TILE>
inline void load(const void* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(TILE) : "memory");
}

template <int TILE>
inline void store(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(TILE) : "memory");
}

// ACC[m][n] += sum over k of A[m][k] B[k][n], for A and B of pairs of bfloat16 and ACC of float. Two sums, of the pairs'
// first elements and of the second, run over k from zero, are added, and then to ACC: each row by itself. Subnormals
// count as zeros and become zeros.
template <int ACC, int A, int B>
inline void multiply_add_bf16() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(ACC), "i"(A), "i"(B));
}

}  // namespace tiles
}  // namespace
}  // namespace rrt
