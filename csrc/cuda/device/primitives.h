// The few operations that kernel bodies ask of the hardware, one function each. A body that uses nothing else compiles
// as host C++ too: the tests put csrc/tests/emulation before csrc/cuda on the include path, where another
// device/primitives.h gives these functions a thread block of emulated threads. So the same source is checked, lane by
// lane, on a machine without a GPU.
//
// Pointers called `shared` point into dynamic shared memory and are read and written through load_shared and
// store_shared alone; global memory that should be counted is read through load_global and copy_async.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#define RRT_DEVICE __device__ __forceinline__

namespace rrt::device {

struct alignas(16) Vector {  // 16 bytes: what one thread moves at once
  uint32_t word[4];
};

struct Index {
  int x, y, z;
};

RRT_DEVICE int thread_index() { return threadIdx.x; }
RRT_DEVICE Index block_index() {
  return {static_cast<int>(blockIdx.x), static_cast<int>(blockIdx.y), static_cast<int>(blockIdx.z)};
}

RRT_DEVICE char* shared_memory() {
  extern __shared__ __align__(128) char memory[];
  return memory;
}

template <class T>
RRT_DEVICE T load_shared(const T* shared) {
  return *shared;
}
template <class T>
RRT_DEVICE void store_shared(T* shared, T value) {
  *shared = value;
}
template <class T>
RRT_DEVICE T load_global(const T* global) {
  return *global;
}
template <class T>
RRT_DEVICE void store_global(T* global, T value) {
  *global = value;
}

// 16 bytes at once: the compiler may cut the store of a struct or a float4 into four.
RRT_DEVICE void store_floats(float* global, const float (&values)[4]) {
  asm volatile("st.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(global), "f"(values[0]), "f"(values[1]), "f"(values[2]),
               "f"(values[3])
               : "memory");
}

// What may be read at any time, since it only says what is worth prefetching: the kernel before may be writing it. Nothing
// of it stays in the first-level cache, where it would hide what that kernel writes.
RRT_DEVICE int32_t load_hint(const int32_t* global) {
  int32_t value;
  asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(global) : "memory");
  return value;
}

// Asks the second-level cache for so many bytes; address and size are multiples of 16. On an A100 it does nothing: no
// kernel starts there before the one before has ended, so that there is nothing to be ahead of.
RRT_DEVICE void prefetch(const void* global, int bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(global), "r"(bytes) : "memory");
#endif
}

// An address in shared memory in 32 bits, which kernels may reckon with: making one from a pointer takes instructions.
using SharedAddress = uint32_t;
RRT_DEVICE SharedAddress shared_address(const void* shared) {
  return static_cast<SharedAddress>(__cvta_generic_to_shared(shared));
}

// 16 bytes from global to shared memory, or zeros if not `valid`; there once copy_wait says so, for this thread.
RRT_DEVICE void copy_async(SharedAddress address, const void* global, bool valid) {
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(address), "l"(global), "r"(bytes)
               : "memory");
}
RRT_DEVICE void copy_async(Vector* shared, const void* global, bool valid) {
  copy_async(shared_address(shared), global, valid);
}
RRT_DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// All but the newest `GROUPS` groups of this thread have arrived.
template <int GROUPS>
RRT_DEVICE void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(GROUPS) : "memory");
}

RRT_DEVICE void block_barrier() { __syncthreads(); }

// The same among the lanes of a warp.
RRT_DEVICE void warp_barrier() { __syncwarp(); }

// The value of the lane whose number differs in the bits of `mask`; every lane of the warp takes part.
template <class T>
RRT_DEVICE T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

// The value of lane `source`; every lane of the warp takes part.
template <class T>
RRT_DEVICE T shuffle_from(T value, int source) {
  return __shfl_sync(0xffffffffu, value, source);
}

// Whether any lane's `condition` is true; every lane of the warp takes part.
RRT_DEVICE bool any_lane(bool condition) { return __any_sync(0xffffffffu, condition); }

// One instruction, within 2 units in the last place: results below 2^-126 become 0.
RRT_DEVICE float exp2(float value) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value));
  return result;
}
RRT_DEVICE double exp2(double value) { return ::exp2(value); }

// Four matrices of 8 x 8 16-bit values; lane l points at row l % 8 of matrix l / 8. Of each matrix the lane gets the
// values of row lane / 4 in columns lane % 4 * 2 (low) and the next (high).
RRT_DEVICE void load_matrices(uint32_t (&to)[4], SharedAddress row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(row)
               : "memory");
}
RRT_DEVICE void load_matrices(uint32_t (&to)[4], const void* shared_row) {
  load_matrices(to, shared_address(shared_row));
}

// Likewise, but the values of rows lane % 4 * 2 (low) and the next (high) in column lane / 4.
RRT_DEVICE void load_matrices_transposed(uint32_t (&to)[4], const void* shared_row) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared_row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(address)
               : "memory");
}

// Programmatic dependent launch: nothing that the kernel before it wrote may be read before dependency_wait.
RRT_DEVICE void dependency_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
RRT_DEVICE void launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

struct Float32 {
  using Storage = float;
  using Acc = float;
  static RRT_DEVICE float widen(Storage value) { return value; }
  static RRT_DEVICE Storage narrow(float value) { return value; }
};

struct Float64 {
  using Storage = double;
  using Acc = double;
  static RRT_DEVICE double widen(Storage value) { return value; }
  static RRT_DEVICE Storage narrow(double value) { return value; }
};

struct BFloat16 {
  using Storage = __nv_bfloat16;
  using Acc = float;
  static RRT_DEVICE float widen(Storage value) { return __bfloat162float(value); }
  static RRT_DEVICE Storage narrow(float value) { return __float2bfloat16_rn(value); }
  static RRT_DEVICE uint32_t pair(float low, float high) {
    const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&both);
  }
  static RRT_DEVICE void widen_pair(uint32_t pair, float& low, float& high) {
    const float2 both = __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&pair));
    low = both.x;
    high = both.y;
  }
  // d += a b, a [16, 16] and b [16, 8] spread over the lanes of a warp as PTX's m16n8k16 has them.
  static RRT_DEVICE void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
};

struct Float16 {
  using Storage = __half;
  using Acc = float;
  static RRT_DEVICE float widen(Storage value) { return __half2float(value); }
  static RRT_DEVICE Storage narrow(float value) { return __float2half_rn(value); }
  static RRT_DEVICE uint32_t pair(float low, float high) {
    const __half2 both = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&both);
  }
  static RRT_DEVICE void widen_pair(uint32_t pair, float& low, float& high) {
    const float2 both = __half22float2(*reinterpret_cast<const __half2*>(&pair));
    low = both.x;
    high = both.y;
  }
  static RRT_DEVICE void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
};

}  // namespace rrt::device
