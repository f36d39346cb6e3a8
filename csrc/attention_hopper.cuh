// The machine of attention_block.h on a Hopper card, and its kernel.
#pragma once

#include "attention_block.h"
#include "attention_keys.cuh"
#include "hopper.cuh"

namespace mmalign {

constexpr int kAttentionThreads = 3 * kWarpgroup;

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

constexpr int kMatrixRegisters = 216, kFetchRegisters = 72;  // of 168 each at the start

// The machine of attention_block.h.
template <class T, int kHeadDim>
struct Hopper {
  using Element = ElementOf<T>;
  static constexpr int kBarriersAt = AttentionShared<kHeadDim>::kBarriersAt;

  char* shared;
  const CUtensorMap* projection;
  const CUtensorMap* turned_keys;
  int group_of_block;  // warpgroup that multiplies

  __device__ int group() const { return group_of_block; }
  __device__ int thread() const { return threadIdx.x % kWarpgroup; }
  __device__ int lane() const { return threadIdx.x % kWarp; }
  template <class X>
  __device__ X* at(int byte) const {
    return reinterpret_cast<X*>(shared + byte);
  }
  __device__ uint32_t address(int byte) const { return shared_address(shared) + byte; }
  __device__ uint64_t* barrier(int number) const { return at<uint64_t>(kBarriersAt) + number; }

  __device__ void wait(int number, uint32_t parity) const { barrier_wait(barrier(number), parity); }
  __device__ void arrive(int number) const { barrier_arrive(barrier(number)); }
  __device__ void expect(int number, int bytes) const {
    barrier_arrive_expect(barrier(number), bytes);
  }
  __device__ void warp_arrive(int number) const {
    __syncwarp();
    if (lane() == 0) arrive(number);
  }
  __device__ void group_sync() const { named_barrier_sync(3 + group(), kWarpgroup); }
  __device__ void wait_turn() const { named_barrier_sync(1 + group(), 2 * kWarpgroup); }
  __device__ void pass_turn() const { named_barrier_arrive(2 - group(), 2 * kWarpgroup); }

  __device__ int take_item(int* counter) const { return atomicAdd(counter, 1); }
  __device__ void load_box(Tensors tensor, int number, int to, int column, int row) const {
    tensor_load(shared + to, tensor == Tensors::kProjection ? projection : turned_keys,
                barrier(number), column, row);
  }
  __device__ int load_index(const int* from) const { return __ldg(from); }
  __device__ Angles load_angles(const float* from) const { return mmalign::load_angles(from); }
  __device__ void writes_to_async() const { shared_writes_to_async(); }
  __device__ void store_chunk(void* to, int64_t element, const Chunk& chunk) const {
    store(static_cast<T*>(to) + element, bits_as<Packed>(chunk));
  }

  static __device__ void hold_words(uint32_t (&words)[kKeyRows / 16][4]) {
#pragma unroll
    for (auto& four : words)
#pragma unroll
      for (uint32_t& word : four) asm volatile("" : "+r"(word)::"memory");
  }
  // Registers that products read or write are as they should be; more products may follow.
  template <int kCount, class... Words>
  __device__ void fence(float (&sums)[kCount], Words&... words) const {
    hold(sums);
    (hold_words(words), ...);
    wgmma_fence();
  }
  __device__ void multiply(float (&scores)[kKeyRows / 2], uint64_t a, uint64_t b, bool adds) const {
    Wgmma<T, kKeyRows>::run(scores, a, b, adds);
  }
  __device__ void multiply_transposed(float (&out)[kHeadDim / 2], const uint32_t (&a)[4],
                                      uint64_t b) const {
    Wgmma<T, kHeadDim, true>::run(out, a, b, true);
  }
  __device__ void commit() const { wgmma_commit(); }
  // What was asked for before this is done before what is asked for after it, these numbers too.
  // ptxas moves arithmetic and arrivals past a wait for products, whatever their order in PTX, but
  // nothing past an instruction that could take effect. This one never does: no number is that low.
  __device__ void computed(const float (&numbers)[2]) const {
    asm volatile(
        "{ .reg .pred never; setp.lt.f32 never, %0, 0fff7fffff; @never nanosleep.u32 0; }" ::"f"(
            numbers[0] + numbers[1])
        : "memory");
  }
  template <int kPending, int kCount, class... Words>
  __device__ void wait_products(float (&sums)[kCount], Words&... words) const {
    wgmma_wait<kPending>();
    hold(sums);
    (hold_words(words), ...);
  }

  __device__ uint32_t quad_exchange(uint32_t word, int with) const {
    return __shfl_xor_sync(0xffffffffu, word, with);
  }
  __device__ float quad_max(float x) const {
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
  }
  __device__ float quad_sum(float x) const {
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
  }
  static __device__ float exp2(float x) {
    float power;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
    return power;
  }
  static __device__ float log2(float x) { return __log2f(x); }
};

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

// Empty on other architectures: the launcher refuses their cards.
template <class T, int kHeadDim>
__global__ void __launch_bounds__(kAttentionThreads, 1)
    rotary_attention_kernel(const __grid_constant__ CUtensorMap projection,
                            const __grid_constant__ CUtensorMap turned_keys,
                            const __grid_constant__ AttentionCall call) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using Shared = AttentionShared<kHeadDim>;
  extern __shared__ char raw[];
  char* shared = raw + (kPatternBytes - shared_address(raw) % kPatternBytes) % kPatternBytes;
  const int group = __shfl_sync(0xffffffffu, threadIdx.x / kWarpgroup, 0);
  Hopper<T, kHeadDim> machine{shared, &projection, &turned_keys, group - 1};
  if (threadIdx.x == 0) {
    for (int i = 0; i < Shared::kBarriers; ++i)
      barrier_init(machine.barrier(i), Shared::arrivals(i));
    barrier_init_fence();
    tensor_map_prefetch(&projection);
    tensor_map_prefetch(&turned_keys);
  }
  __syncthreads();
  if (group == 0) {
    give_registers<kFetchRegisters>();
    const int warp = __shfl_sync(0xffffffffu, threadIdx.x / kWarp, 0);
    if (warp > 0)
      turn_queries<kHeadDim>(machine, call, warp - 1);
    else if (threadIdx.x == 0)
      fetch<kHeadDim>(machine, call);
  } else {
    take_registers<kMatrixRegisters>();
    attend_to_all<kHeadDim>(machine, call);
  }
#endif
}

}  // namespace mmalign
