// Helpers of the tests of the CPU kernels: arrays that end where their allocation does, dtypes as doubles, threads.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "cpu_isa.h"
#include "dtype.h"

namespace rrt::tests {

constexpr Dtype kDtypes[] = {Dtype::kFloat32, Dtype::kFloat64, Dtype::kBFloat16, Dtype::kFloat16};

// Distance of 1 to the next number.
inline double epsilon(Dtype dtype) {
  switch (dtype) {
    case Dtype::kFloat64: return 0x1p-52;
    case Dtype::kFloat32: return 0x1p-23;
    case Dtype::kBFloat16: return 0x1p-7;
    default: return 0x1p-10;
  }
}

inline double read(Dtype dtype, const char* from) {
  uint16_t half;
  float single;
  double value;
  switch (dtype) {
    case Dtype::kFloat64: std::memcpy(&value, from, 8); return value;
    case Dtype::kFloat32: std::memcpy(&single, from, 4); return single;
    default: std::memcpy(&half, from, 2); break;
  }
  const int bits = dtype == Dtype::kBFloat16 ? 7 : 10;  // of the mantissa
  const int bias = dtype == Dtype::kBFloat16 ? 127 : 15;
  const int exponent = (half & 0x7fff) >> bits, mantissa = half & ((1 << bits) - 1);
  if (exponent == 2 * bias + 1) {
    value = mantissa != 0 ? std::numeric_limits<double>::quiet_NaN() : std::numeric_limits<double>::infinity();
  } else {
    value = std::ldexp(mantissa + (exponent > 0 ? 1 << bits : 0), (exponent > 0 ? exponent : 1) - bias - bits);
  }
  return half & 0x8000 ? -value : value;
}

// Random numbers of [-1, 1] in steps of 1/64, which every dtype holds exactly.
inline void write_random(Random& random, Dtype dtype, char* to) {
  const double value = static_cast<double>(between(random, -64, 64)) / 64;
  const auto single = static_cast<float>(value);
  uint16_t half = 0;
  switch (dtype) {
    case Dtype::kFloat64: std::memcpy(to, &value, 8); return;
    case Dtype::kFloat32: std::memcpy(to, &single, 4); return;
    default: break;
  }
  if (value != 0) {
    int exponent;
    const double mantissa = std::frexp(std::abs(value), &exponent);  // of [0.5, 1)
    const int bits = dtype == Dtype::kBFloat16 ? 7 : 10, bias = dtype == Dtype::kBFloat16 ? 127 : 15;
    half = static_cast<uint16_t>((exponent - 1 + bias) << bits | static_cast<int>((2 * mantissa - 1) * (1 << bits)));
    if (value < 0) half |= 0x8000;
  }
  std::memcpy(to, &half, 2);
}

// Memory is aligned to one element and no more, as a slice of a tensor may be, or as the allocator aligns it.
enum class Aligned { kElement, kFresh };

// `size` elements on the heap that end where the allocation does. NaN at first.
class Array {
 public:
  Array(Dtype dtype, int64_t size, Aligned aligned = Aligned::kElement)
      : dtype_(dtype),
        size_(size),
        element_size_(bytes_of(dtype)),
        memory_(new char[(size + (aligned == Aligned::kElement ? 1 : 0)) * element_size_]),
        data_(memory_.get() + (aligned == Aligned::kElement ? element_size_ : 0)) {
    std::memset(data_, 0xff, size * element_size_);
  }
  Array(Dtype dtype, int64_t size, Random& random) : Array(dtype, size) {
    for (int64_t i = 0; i < size; ++i) write_random(random, dtype, at(i));
  }

  void* data() { return at(0); }
  const void* data() const { return at(0); }
  int64_t size() const { return size_; }
  double operator[](int64_t i) const { return read(dtype_, at(i)); }
  char* at(int64_t i) const { return data_ + i * element_size_; }
  bool same_bits(int64_t i, const Array& other, int64_t j, int64_t count) const {
    return std::memcmp(at(i), other.at(j), count * element_size_) == 0;
  }

 private:
  Dtype dtype_;
  int64_t size_;
  int64_t element_size_;
  std::unique_ptr<char[]> memory_;
  char* data_;
};

// sqrt(sum of squared differences / sum of squares): NaN, so above any bound, if a result is missing.
class RelativeError {
 public:
  void add(double found, double expected) {
    difference_ += (found - expected) * (found - expected);
    norm_ += expected * expected;
  }
  bool below(double bound) const { return std::sqrt(difference_) <= bound * std::sqrt(norm_); }

 private:
  double difference_ = 0, norm_ = 0;
};

inline void run_serially(int64_t begin, int64_t end, int64_t, void (*body)(int64_t, int64_t, void*), void* context) {
  if (begin < end) body(begin, end, context);
}

// Three threads, however little there is to do, and a part of the range each.
inline void run_threaded(int64_t begin, int64_t end, int64_t, void (*body)(int64_t, int64_t, void*), void* context) {
  constexpr int64_t kThreads = 3;
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < kThreads; ++i) {
    const int64_t from = begin + (end - begin) * i / kThreads, to = begin + (end - begin) * (i + 1) / kThreads;
    if (from < to) threads.emplace_back(body, from, to, context);
  }
  for (std::thread& thread : threads) thread.join();
}

// For main to return if the instruction set that RRT_CPU_ISA asks for is not the one in use.
constexpr int kSkipped = 77;

inline bool lacks_instruction_set() {
#ifdef RRT_TILES_BESIDE_AVX512
  if (!__builtin_cpu_supports("avx512bf16")) {
    std::cerr << "this CPU lacks AVX512-BF16\n";
    return true;
  }
#endif
  const char* requested = std::getenv("RRT_CPU_ISA");
  if (requested == nullptr || std::strcmp(requested, cpu_isa_name(cpu_isa())) == 0) return false;
  std::cerr << "this CPU has " << cpu_isa_name(cpu_isa()) << ", not " << requested << '\n';
  return true;
}

}  // namespace rrt::tests
