// The functions of csrc/cuda/device/primitives.h for a thread block of emulated threads; the include path chooses
// between the two files. Every thread is a fiber that runs until it must wait for others; the order in which fibers run
// is shuffled with a seed. The emulation reports:
//
//   races       two threads touch a byte of shared memory, one of them writing, without a barrier of the block,
//               or of the warp that both are in, between
//   async copies  a byte is read before the copy that brings it was waited for, or by another thread before a barrier
//   dependence  global memory that the kernel before writes is read before dependency_wait, or anything is written before
//               it, or no thread comes to it
//   bounds      shared memory beyond what was asked for; global memory outside the registered regions
//   deadlocks   a barrier or warp-wide operation that not every thread reaches
//
// load_hint lies most of the time, unless `honest_hints`: a result that depends on it is wrong.
//
// A violation ends the launch with a report; bytes read from and written to each registered region are counted.
#pragma once

#include <cmath>
#include <cstdint>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#define RRT_DEVICE inline

namespace rrt::device {

struct alignas(16) Vector {
  uint32_t word[4];
};

struct Index {
  int x, y, z;
};

}  // namespace rrt::device

namespace rrt::emulation {

struct Region {
  std::string name;
  const char* begin;
  int64_t size;
  bool writable = false;
  bool dependent = false;   // written by the kernel before: not to be read before dependency_wait
  int64_t bytes_read = 0;   // by load_global and copy_async, every time
  int64_t bytes_written = 0;
  std::vector<std::pair<int64_t, int64_t>> prefetched = {};  // byte ranges [begin, end) that a hint asked for
};

// Faults that the emulation commits in the body's place, to show that they are noticed.
enum class Sabotage {
  kNone,
  kSkipBarrier,
  kSkipCopyWait,
  kSkipDependencyWait,
  kSkipWarpBarrier,
  kWrongLaneMap,
  kWrongRows
};

struct Report {
  std::string violation;  // empty: none
  std::vector<Region> regions;
  bool early_dependents = false;  // a thread let the next kernel start before it came to dependency_wait itself

  int64_t bytes_read(const std::string& name) const { return region(name).bytes_read; }
  int64_t bytes_written(const std::string& name) const { return region(name).bytes_written; }
  const Region& region(const std::string& name) const;
};

struct Launch {
  device::Index grid;
  int threads;
  int shared_bytes;
  uint64_t seed;
  std::vector<Region> regions;
  Sabotage sabotage = Sabotage::kNone;
  bool honest_hints = false;
};

// Runs `body` in every thread of every block, blocks one after the other.
Report run(const Launch& launch, const std::function<void()>& body);

// The functions of rrt::device below call these, which know the running thread.
int thread_index();
device::Index block_index();
char* shared_memory();
void touch_shared(const void* address, int64_t size, bool write);
void touch_global(const void* address, int64_t size, bool write);
int32_t load_hint(const int32_t* address);
void prefetch(const void* address, int bytes);
void copy_async(void* shared, const void* global, int64_t size, bool valid);
void copy_commit();
void copy_wait(int groups);
void block_barrier();
double shuffle_from(double value, int source);
void warp_barrier();
void load_matrices(uint32_t (&to)[4], const void* shared_row, bool transposed);
void launch_dependents();
void dependency_wait();
void matrix_multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], float (*widen)(uint16_t));

float widen_bfloat16(uint16_t value);
float widen_float16(uint16_t value);
uint16_t narrow_bfloat16(float value);
uint16_t narrow_float16(float value);

}  // namespace rrt::emulation

namespace rrt::device {

inline int thread_index() { return emulation::thread_index(); }
inline Index block_index() { return emulation::block_index(); }
inline char* shared_memory() { return emulation::shared_memory(); }

template <class T>
T load_shared(const T* shared) {
  emulation::touch_shared(shared, sizeof(T), false);
  return *shared;
}
template <class T>
void store_shared(T* shared, T value) {
  emulation::touch_shared(shared, sizeof(T), true);
  *shared = value;
}
template <class T>
T load_global(const T* global) {
  emulation::touch_global(global, sizeof(T), false);
  return *global;
}
template <class T>
void store_global(T* global, T value) {
  emulation::touch_global(global, sizeof(T), true);
  *global = value;
}

inline void store_floats(float* global, const float (&values)[4]) {
  emulation::touch_global(global, sizeof(values), true);
  for (int i = 0; i < 4; ++i) global[i] = values[i];
}

inline int32_t load_hint(const int32_t* global) { return emulation::load_hint(global); }
inline void prefetch(const void* global, int bytes) { emulation::prefetch(global, bytes); }

using SharedAddress = uint32_t;
inline SharedAddress shared_address(const void* shared) {
  return static_cast<SharedAddress>(static_cast<const char*>(shared) - shared_memory());
}
inline void copy_async(SharedAddress address, const void* global, bool valid) {
  emulation::copy_async(shared_memory() + address, global, sizeof(Vector), valid);
}
inline void copy_async(Vector* shared, const void* global, bool valid) {
  emulation::copy_async(shared, global, sizeof(Vector), valid);
}
inline void copy_commit() { emulation::copy_commit(); }
template <int GROUPS>
void copy_wait() {
  emulation::copy_wait(GROUPS);
}
inline void block_barrier() { emulation::block_barrier(); }
inline void warp_barrier() { emulation::warp_barrier(); }
inline void load_matrices(uint32_t (&to)[4], const void* shared_row) {
  emulation::load_matrices(to, shared_row, false);
}
inline void load_matrices(uint32_t (&to)[4], SharedAddress row) { load_matrices(to, shared_memory() + row); }
inline void load_matrices_transposed(uint32_t (&to)[4], const void* shared_row) {
  emulation::load_matrices(to, shared_row, true);
}
inline float exp2(float value) { return std::exp2(value); }
inline double exp2(double value) { return std::exp2(value); }
template <class T>
T shuffle_from(T value, int source) {
  return static_cast<T>(emulation::shuffle_from(value, source));
}
template <class T>
T shuffle_xor(T value, int mask) {
  return shuffle_from(value, thread_index() % 32 ^ mask);
}
inline bool any_lane(bool condition) {
  double any = condition;
  for (int mask = 1; mask < 32; mask *= 2) any += shuffle_xor(any, mask);
  return any > 0;
}
inline void dependency_wait() { emulation::dependency_wait(); }
inline void launch_dependents() { emulation::launch_dependents(); }

struct Float32 {
  using Storage = float;
  using Acc = float;
  static float widen(Storage value) { return value; }
  static Storage narrow(float value) { return value; }
};

struct Float64 {
  using Storage = double;
  using Acc = double;
  static double widen(Storage value) { return value; }
  static Storage narrow(double value) { return value; }
};

struct BFloat16 {
  struct Storage {
    uint16_t bits;
  };
  using Acc = float;
  static float widen(Storage value) { return emulation::widen_bfloat16(value.bits); }
  static Storage narrow(float value) { return {emulation::narrow_bfloat16(value)}; }
  static uint32_t pair(float low, float high) {
    return emulation::narrow_bfloat16(low) | static_cast<uint32_t>(emulation::narrow_bfloat16(high)) << 16;
  }
  static void widen_pair(uint32_t pair, float& low, float& high) {
    low = emulation::widen_bfloat16(static_cast<uint16_t>(pair));
    high = emulation::widen_bfloat16(static_cast<uint16_t>(pair >> 16));
  }
  static void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    emulation::matrix_multiply(d, a, b, emulation::widen_bfloat16);
  }
};

struct Float16 {
  struct Storage {
    uint16_t bits;
  };
  using Acc = float;
  static float widen(Storage value) { return emulation::widen_float16(value.bits); }
  static Storage narrow(float value) { return {emulation::narrow_float16(value)}; }
  static uint32_t pair(float low, float high) {
    return emulation::narrow_float16(low) | static_cast<uint32_t>(emulation::narrow_float16(high)) << 16;
  }
  static void widen_pair(uint32_t pair, float& low, float& high) {
    low = emulation::widen_float16(static_cast<uint16_t>(pair));
    high = emulation::widen_float16(static_cast<uint16_t>(pair >> 16));
  }
  static void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    emulation::matrix_multiply(d, a, b, emulation::widen_float16);
  }
};

}  // namespace rrt::device
