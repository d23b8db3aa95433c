// Stands in for csrc/amx/tiles/primitives.h: the same operations in plain C++, so that tile kernels run on any CPU. As the
// hardware would fault, using registers that are not set up ends the program.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace rrt {
namespace {
namespace tiles {

constexpr int64_t kRows = 16;
constexpr int64_t kRowBytes = 64;

struct Tile {
  unsigned char rows[kRows][kRowBytes];
};

inline thread_local bool are_set_up = false;
inline thread_local Tile registers[8];

class Registers {
 public:
  explicit Registers(bool are_used = true) {
    if (!are_used) return;
    if (are_set_up) fail("set up twice");
    are_set_up = true;
    std::memset(registers, 0, sizeof(registers));
  }
  ~Registers() { are_set_up = false; }
  Registers(const Registers&) = delete;
  Registers& operator=(const Registers&) = delete;

  static void fail(const char* what) {
    std::fprintf(stderr, "emulated tile registers: %s\n", what);
    std::abort();
  }
};

template <int TILE>
Tile& tile() {
  static_assert(TILE >= 0 && TILE < 8);
  if (!are_set_up) Registers::fail("used without being set up");
  return registers[TILE];
}

template <int TILE>
void zero() {
  std::memset(&tile<TILE>(), 0, sizeof(Tile));
}

template <int TILE>
void load(const void* from, int64_t stride) {
  for (int64_t row = 0; row < kRows; ++row) {
    std::memcpy(tile<TILE>().rows[row], static_cast<const char*>(from) + row * stride, kRowBytes);
  }
}

template <int TILE>
void store(void* to, int64_t stride) {
  for (int64_t row = 0; row < kRows; ++row) {
    std::memcpy(static_cast<char*>(to) + row * stride, tile<TILE>().rows[row], kRowBytes);
  }
}

constexpr float kLeast = 0x1p-126f;  // normal number

inline float flushed(float value) { return std::fabs(value) < kLeast ? std::copysign(0.0f, value) : value; }

inline float element(const Tile& from, int64_t row, int64_t column) {
  uint16_t half;
  std::memcpy(&half, from.rows[row] + 2 * column, sizeof(half));
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return flushed(value);
}

// sum + a * b, rounded once. A product of two numbers of bfloat16 is a float, unless it leaves their range.
inline float multiply_add(float a, float b, float sum) {
  const float product = a * b, size = std::fabs(product);
  return flushed(size >= kLeast && size <= 0x1p127f ? sum + product : std::fma(a, b, sum));
}

template <int ACC, int A, int B>
void multiply_add_bf16() {
  static_assert(ACC != A && ACC != B && A != B);
  Tile &acc = tile<ACC>(), &a_tile = tile<A>(), &b_tile = tile<B>();
  float a[kRows][32], b[kRows][32];
  for (int64_t row = 0; row < kRows; ++row) {
    for (int64_t i = 0; i < 32; ++i) {
      a[row][i] = element(a_tile, row, i);
      b[row][i] = element(b_tile, row, i);
    }
  }
  for (int64_t m = 0; m < kRows; ++m) {
    float sums[32] = {};
    for (int64_t k = 0; k < 16; ++k) {
      for (int64_t i = 0; i < 32; ++i) sums[i] = multiply_add(a[m][2 * k + i % 2], b[k][i], sums[i]);
    }
    for (int64_t n = 0; n < 16; ++n) {
      float total;
      std::memcpy(&total, acc.rows[m] + 4 * n, sizeof(total));
      total = flushed(flushed(total) + flushed(sums[2 * n] + sums[2 * n + 1]));
      std::memcpy(acc.rows[m] + 4 * n, &total, sizeof(total));
    }
  }
}

}  // namespace tiles
}  // namespace
}  // namespace rrt
