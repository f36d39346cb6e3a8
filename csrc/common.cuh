// Building blocks of the kernels: vectors of 128 bits, widening, sums over threads.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "host_device.h"
#include "row_threads.h"

namespace mmalign {

// fp64 is computed in fp64, everything else in fp32.
template <class T>
struct ComputeType {
  using type = float;
};
template <>
struct ComputeType<double> {
  using type = double;
};
template <class T>
using Compute = typename ComputeType<T>::type;

__device__ __forceinline__ float upcast(float x) { return x; }
__device__ __forceinline__ double upcast(double x) { return x; }
__device__ __forceinline__ float upcast(__half x) { return __half2float(x); }
__device__ __forceinline__ float upcast(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T>
__device__ __forceinline__ T narrow(Compute<T> x) {
  return static_cast<T>(x);
}
template <>
__device__ __forceinline__ __half narrow<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// Two neighbours, rounded and packed, and back.
__device__ __forceinline__ uint32_t pack(float x, float y, __half) {
  return bits_as<uint32_t>(__floats2half2_rn(x, y));
}
__device__ __forceinline__ uint32_t pack(float x, float y, __nv_bfloat16) {
  return bits_as<uint32_t>(__floats2bfloat162_rn(x, y));
}
__device__ __forceinline__ float2 unpack_two(uint32_t two, __half) {
  return __half22float2(bits_as<__half2>(two));
}
__device__ __forceinline__ float2 unpack_two(uint32_t two, __nv_bfloat16) {
  return make_float2(__uint_as_float(two << 16), __uint_as_float(two & 0xffff0000u));
}

__device__ __forceinline__ float reciprocal_root(float x) { return rsqrtf(x); }
__device__ __forceinline__ double reciprocal_root(double x) { return rsqrt(x); }

// As many T as one access moves.
template <class T>
struct alignas(kVectorBytes) Vector {
  static constexpr int kLanes = kVectorBytes / sizeof(T);
  T lanes[kLanes];
};

// 128 bits as they travel.
using Packed = uint4;

template <class T>
__device__ __forceinline__ Vector<T> unpack(const Packed& packed) {
  return bits_as<Vector<T>>(packed);
}

// Predicated loads, zero outside. In assembly, because the compiler turns each
// `if (inside) load` and pulls the lanes apart inside it: the next load then waits for this one.
#define MMALIGN_GUARDED_LOAD(LOAD)                                            \
  Packed packed;                                                              \
  asm volatile(                                                               \
      "{ .reg .pred inside; setp.ne.b32 inside, %5, 0;"                       \
      " mov.b32 %0, 0; mov.b32 %1, 0; mov.b32 %2, 0; mov.b32 %3, 0;"          \
      " @inside " LOAD " {%0, %1, %2, %3}, [%4]; }"                           \
      : "=&r"(packed.x), "=&r"(packed.y), "=&r"(packed.z), "=&r"(packed.w)    \
      : "l"(at), "r"(static_cast<int>(inside)));                              \
  return packed

// Read once: first to leave the caches.
template <class T>
__device__ __forceinline__ Packed load_streaming(const T* at, bool inside) {
  MMALIGN_GUARDED_LOAD("ld.global.cs.v4.b32");
}

// Read by every block, written by none.
template <class T>
__device__ __forceinline__ Packed load_shared_by_all(const T* at, bool inside) {
  MMALIGN_GUARDED_LOAD("ld.global.nc.v4.b32");
}

// Written by other multiprocessors in the same launch: from L2.
template <class T>
__device__ __forceinline__ Packed load_from_l2(const T* at, bool inside) {
  MMALIGN_GUARDED_LOAD("ld.global.cg.v4.b32");
}

#undef MMALIGN_GUARDED_LOAD

template <class T>
__device__ __forceinline__ void store(T* at, const Packed& packed) {
  *reinterpret_cast<Packed*>(at) = packed;
}

template <class T>
__device__ __forceinline__ T warp_sum(T x) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}

// 16 bytes from global to shared memory without a register, seen by this thread after waiting.
__device__ __forceinline__ void copy_async(void* shared, const void* global) {
  const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
}

__device__ __forceinline__ void copy_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most kPending of this thread's committed groups are in flight.
template <int kPending>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace mmalign
