// wgmma: a warpgroup multiplies 64 rows by N columns, 16-bit elements, accumulated in fp32.
//
// Order of a product: wgmma_fence(), any number of Wgmma<T, N>::run(), wgmma_commit(), and before
// any thread reads the accumulators or overwrites the operands, wgmma_wait<kPending>() and
// hold(accumulators), which keeps the compiler from moving a read before the wait.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "matrix_layout.h"

namespace mmalign {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

template <int kCount>
__device__ __forceinline__ void hold(float (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}
template <int kSteps>
__device__ __forceinline__ void hold(uint32_t (&operands)[kSteps][4]) {
#pragma unroll
  for (int i = 0; i < 4 * kSteps; ++i) asm volatile("" : "+r"(operands[i / 4][i % 4])::"memory");
}

// d += a * b; with adds = false d = a * b. d (64, N), as accumulator_row and _column say; a
// (64, 16) and b (N, 16) by descriptor, or a in registers as operand_row and _column say.
// kTransposed: b lies as (16, N).
template <class T, int N, bool kTransposed = false>
struct Wgmma;

#define MMALIGN_16(d, i)                                                                       \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7]), "+f"(d[i + 8]), "+f"(d[i + 9]), "+f"(d[i + 10]),        \
      "+f"(d[i + 11]), "+f"(d[i + 12]), "+f"(d[i + 13]), "+f"(d[i + 14]), "+f"(d[i + 15])
#define MMALIGN_32(d, i) MMALIGN_16(d, i), MMALIGN_16(d, i + 16)
#define MMALIGN_64(d, i) MMALIGN_32(d, i), MMALIGN_32(d, i + 32)

#define MMALIGN_NAMES_32                                                                     \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, "   \
  "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define MMALIGN_NAMES_64                                                                    \
  MMALIGN_NAMES_32                                                                          \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, " \
  "%49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define MMALIGN_NAMES_112                                                                   \
  MMALIGN_NAMES_64                                                                          \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, " \
  "%81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, "   \
  "%98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111"
#define MMALIGN_NAMES_128                                                                    \
  MMALIGN_NAMES_112                                                                          \
  ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, "   \
  "%126, %127"

#define MMALIGN_PRODUCT(TYPE, COLUMNS, NAMES, A, B, ADDS, SIGNS, ...)                          \
  asm volatile("{ .reg .pred adds; setp.ne.b32 adds, " ADDS ", 0; "                            \
               "wgmma.mma_async.sync.aligned.m64n" #COLUMNS "k16.f32." TYPE "." TYPE " {"      \
               NAMES "}, " A ", " B ", adds, 1, 1, " SIGNS "; }"                               \
               : __VA_ARGS__)

// P0 to P5: numbers of the operands after the accumulators.
#define MMALIGN_WGMMA(COLUMNS, NAMES, ACCUMULATORS, P0, P1, P2, P3, P4, P5, P6)                  \
  template <class T, bool kTransposed>                                                           \
  struct Wgmma<T, COLUMNS, kTransposed> {                                                        \
    static __device__ __forceinline__ void run(float (&d)[COLUMNS / 2], uint64_t a, uint64_t b, \
                                               bool adds) {                                      \
      const int scale = adds;                                                                    \
      if constexpr (std::is_same_v<T, __half>)                                                   \
        MMALIGN_PRODUCT("f16", COLUMNS, NAMES, P0, P1, P2, "0, " P3, ACCUMULATORS                \
                        : "l"(a), "l"(b), "r"(scale), "n"(kTransposed) : "memory");              \
      else                                                                                       \
        MMALIGN_PRODUCT("bf16", COLUMNS, NAMES, P0, P1, P2, "0, " P3, ACCUMULATORS               \
                        : "l"(a), "l"(b), "r"(scale), "n"(kTransposed) : "memory");              \
    }                                                                                            \
    static __device__ __forceinline__ void run(float (&d)[COLUMNS / 2],                          \
                                               const uint32_t (&a)[4], uint64_t b, bool adds) {  \
      const int scale = adds;                                                                    \
      if constexpr (std::is_same_v<T, __half>)                                                   \
        MMALIGN_PRODUCT("f16", COLUMNS, NAMES, "{" P0 ", " P1 ", " P2 ", " P3 "}", P4, P5, P6,   \
                        ACCUMULATORS                                                             \
                        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(scale),        \
                          "n"(kTransposed) : "memory");                                          \
      else                                                                                       \
        MMALIGN_PRODUCT("bf16", COLUMNS, NAMES, "{" P0 ", " P1 ", " P2 ", " P3 "}", P4, P5, P6,  \
                        ACCUMULATORS                                                             \
                        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(scale),        \
                          "n"(kTransposed) : "memory");                                          \
    }                                                                                            \
  }

#define MMALIGN_ALL(...) __VA_ARGS__
MMALIGN_WGMMA(64, MMALIGN_NAMES_32, MMALIGN_ALL(MMALIGN_32(d, 0)), "%32", "%33", "%34", "%35",
              "%36", "%37", "%38");
MMALIGN_WGMMA(128, MMALIGN_NAMES_64, MMALIGN_ALL(MMALIGN_64(d, 0)), "%64", "%65", "%66", "%67",
              "%68", "%69", "%70");
MMALIGN_WGMMA(224, MMALIGN_NAMES_112,
              MMALIGN_ALL(MMALIGN_64(d, 0), MMALIGN_32(d, 64), MMALIGN_16(d, 96)), "%112", "%113",
              "%114", "%115", "%116", "%117", "%118");
MMALIGN_WGMMA(256, MMALIGN_NAMES_128, MMALIGN_ALL(MMALIGN_64(d, 0), MMALIGN_64(d, 64)), "%128",
              "%129", "%130", "%131", "%132", "%133", "%134");

#undef MMALIGN_16
#undef MMALIGN_32
#undef MMALIGN_64
#undef MMALIGN_ALL
#undef MMALIGN_NAMES_32
#undef MMALIGN_NAMES_64
#undef MMALIGN_NAMES_112
#undef MMALIGN_NAMES_128
#undef MMALIGN_PRODUCT
#undef MMALIGN_WGMMA

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

}  // namespace mmalign
