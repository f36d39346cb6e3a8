// The machine of attention_block.h and attention_gradient_block.h on a Hopper GPU.
#pragma once

#include "attention_keys.cuh"
#include "hopper.cuh"

namespace mmalign {

constexpr int kAttentionThreads = 3 * kWarpgroup;  // one loads, two multiply

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// The machine of attention_block.h.
template <class T, class Shared>
struct Hopper {
  using Element = ElementOf<T>;

  char* shared;
  int group_of_block;  // warpgroup that multiplies
  const CUtensorMap *projection, *rotated, *grad_out;

  __device__ int group() const { return group_of_block; }
  __device__ int thread() const { return threadIdx.x % kWarpgroup; }
  __device__ int lane() const { return threadIdx.x % kWarp; }
  template <class X>
  __device__ X* at(int byte) const {
    return reinterpret_cast<X*>(shared + byte);
  }
  __device__ uint32_t address(int byte) const { return shared_address(shared) + byte; }
  __device__ uint64_t* barrier(int number) const {
    return at<uint64_t>(Shared::kBarriersAt) + number;
  }

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
    const CUtensorMap* map = tensor == Tensors::kProjection ? projection
                             : tensor == Tensors::kRotated   ? rotated
                                                            : grad_out;
    tensor_load(shared + to, map, barrier(number), column, row);
  }
  __device__ int load_index(const int* from) const { return __ldg(from); }
  __device__ float load_statistic(const float* from) const { return __ldg(from); }
  __device__ StatisticPair load_pair(const float* from) const {
    return bits_as<StatisticPair>(__ldg(reinterpret_cast<const float2*>(from)));
  }
  __device__ Angles load_angles(const float* from) const { return mmalign::load_angles(from); }
  __device__ void writes_to_async() const { shared_writes_to_async(); }
  __device__ void store_chunk(void* to, int64_t element, const Chunk& chunk) const {
    mmalign::store_chunk(static_cast<T*>(to) + element, chunk);
  }

  // Registers that products read or write are as they should be; more products may follow.
  template <class... Registers>
  __device__ void fence(Registers&... registers) const {
    (hold(registers), ...);
    wgmma_fence();
  }
  template <int kCount>
  __device__ void multiply(float (&sums)[kCount], uint64_t a, uint64_t b, bool adds) const {
    Wgmma<T, 2 * kCount>::run(sums, a, b, adds);
  }
  template <int kCount>
  __device__ void multiply_transposed(float (&sums)[kCount], const uint32_t (&a)[4],
                                      uint64_t b) const {
    Wgmma<T, 2 * kCount, true>::run(sums, a, b, true);
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
  template <int kPending, class... Registers>
  __device__ void wait_products(Registers&... registers) const {
    wgmma_wait<kPending>();
    (hold(registers), ...);
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

// A block begins: its shared memory from a multiple of 1024, its barriers, its roles.
template <class T, class Shared, class Arrivals>
__device__ __forceinline__ Hopper<T, Shared> start_block(char* raw, Arrivals arrivals,
                                                         const CUtensorMap* projection,
                                                         const CUtensorMap* rotated,
                                                         const CUtensorMap* grad_out = nullptr) {
  const int group = __shfl_sync(0xffffffffu, threadIdx.x / kWarpgroup, 0);
  char* shared = raw + (kPatternBytes - shared_address(raw) % kPatternBytes) % kPatternBytes;
  const Hopper<T, Shared> machine = {shared, group - 1, projection, rotated, grad_out};
  if (threadIdx.x == 0) {
    for (int i = 0; i < Shared::kBarriers; ++i) barrier_init(machine.barrier(i), arrivals(i));
    barrier_init_fence();
    for (const CUtensorMap* map : {projection, rotated, grad_out})
      if (map) tensor_map_prefetch(map);
  }
  __syncthreads();
  return machine;
}

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

}  // namespace mmalign
