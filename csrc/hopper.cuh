// Hopper's asynchronous instructions, one function each: barriers in shared memory, tensor copies
// (TMA), clusters, register reallocation between warpgroups; wgmma.cuh has the products. All exist
// on sm_90a only: kernels guard their bodies by __CUDA_ARCH_FEAT_SM90_ALL.
#pragma once

#include <cuda.h>

#include "common.cuh"
#include "wgmma.cuh"

namespace mmalign {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// Addresses in shared memory as the instructions take them.
__device__ __forceinline__ uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// -- barriers (mbarrier): a phase ends when all arrivals and all announced bytes are there

__device__ __forceinline__ void barrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}

// After barrier_init, before the barrier of the block or the cluster that lets others use them.
__device__ __forceinline__ void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}

// One arrival, and the number of bytes still expected in this phase.
__device__ __forceinline__ void barrier_arrive_expect(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(
                   shared_address(barrier)),
               "r"(bytes)
               : "memory");
}

// An arrival at the barrier at the same place in another block of the cluster. It orders no memory
// (that would wait for every store in flight): for readers that are done, through wgmma_wait.
__device__ __forceinline__ void barrier_arrive_remote(uint64_t* barrier, uint32_t rank) {
  asm volatile(
      "{ .reg .b32 remote; mapa.shared::cluster.u32 remote, %0, %1;"
      " mbarrier.arrive.shared::cluster.b64 _, [remote]; }" ::"r"(
          shared_address(barrier)),
      "r"(rank)
      : "memory");
}

// Waits for the end of a phase: parity 0 for the first, then alternating. What others wrote before
// they arrived is visible then; kCluster: also what other blocks of the cluster wrote.
template <bool kCluster = false>
__device__ __forceinline__ void barrier_wait(uint64_t* barrier, uint32_t parity) {
  uint32_t done = 0;
  while (!done) {
    if constexpr (kCluster)
      asm volatile(
          "{ .reg .pred done; mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%1],"
          " %2; selp.b32 %0, 1, 0, done; }"
          : "=r"(done)
          : "r"(shared_address(barrier)), "r"(parity)
          : "memory");
    else
      asm volatile(
          "{ .reg .pred done; mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 done, [%1], %2;"
          " selp.b32 %0, 1, 0, done; }"
          : "=r"(done)
          : "r"(shared_address(barrier)), "r"(parity)
          : "memory");
  }
}

// A barrier of some warps of the block, by number (1 to 15; 0 is __syncthreads).
__device__ __forceinline__ void named_barrier_sync(int number, int num_threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(num_threads) : "memory");
}
__device__ __forceinline__ void named_barrier_arrive(int number, int num_threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(number), "r"(num_threads) : "memory");
}

// Ordinary writes to shared memory before it are seen by wgmma and TMA after the next barrier.
__device__ __forceinline__ void shared_writes_to_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// -- tensor copies: one thread starts them; their bytes count on the barrier

__device__ __forceinline__ void tensor_map_prefetch(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// A box at (x, y), x counting elements of a row; what lies outside the tensor arrives as zero.
__device__ __forceinline__ void tensor_load(void* shared, const CUtensorMap* map, uint64_t* barrier,
                                            int x, int y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4}], [%2];" ::"r"(shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y)
      : "memory");
}
__device__ __forceinline__ void tensor_load(void* shared, const CUtensorMap* map, uint64_t* barrier,
                                            int x, int y, int z) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y), "r"(z)
      : "memory");
}

// The same box to the same place in every block of `ranks` (a bit each), on the barrier of each.
__device__ __forceinline__ void tensor_load_multicast(void* shared, const CUtensorMap* map,
                                                      uint64_t* barrier, int x, int y,
                                                      uint16_t ranks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%4, %5}], [%2], %3;" ::"r"(shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "h"(ranks), "r"(x), "r"(y)
      : "memory");
}

// -- clusters

__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
__device__ __forceinline__ uint32_t cluster_size() {
  uint32_t size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}

// Which cluster of the grid, and of how many (one-dimensional).
__device__ __forceinline__ uint32_t cluster_index() {
  uint32_t index;
  asm("mov.u32 %0, %%clusterid.x;" : "=r"(index));
  return index;
}
__device__ __forceinline__ uint32_t num_clusters() {
  uint32_t number;
  asm("mov.u32 %0, %%nclusterid.x;" : "=r"(number));
  return number;
}

// All threads of all blocks of the cluster, every warp as a whole.
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Two numbers to the same place in another block; their 8 bytes count on the barrier there.
__device__ __forceinline__ void store_remote(float2* shared, uint64_t* barrier, uint32_t rank,
                                             float2 value) {
  asm volatile(
      "{ .reg .b32 to, signal; mapa.shared::cluster.u32 to, %0, %4;"
      " mapa.shared::cluster.u32 signal, %1, %4;"
      " st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [to], {%2, %3},"
      " [signal]; }" ::"r"(shared_address(shared)),
      "r"(shared_address(barrier)), "r"(__float_as_uint(value.x)), "r"(__float_as_uint(value.y)),
      "r"(rank)
      : "memory");
}

// -- registers: all warps of a warpgroup; the kernel has __launch_bounds__(threads, 1)

template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Asked anew where it is needed: what follows from it would else be kept in registers through the
// product.
__device__ __forceinline__ int thread_of_warpgroup() {
  unsigned thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return static_cast<int>(thread % kWarpgroup);
}

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

}  // namespace mmalign
