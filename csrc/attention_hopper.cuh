// The kernel of attention_block.h on a Hopper GPU.
#pragma once

#include "attention_block.h"
#include "attention_machine.cuh"

namespace mmalign {

constexpr int kMatrixRegisters = 216, kFetchRegisters = 72;  // of 168 each at the start

// Empty on other architectures: the launcher rejects those GPUs.
template <class T, int kHeadDim>
__global__ void __launch_bounds__(kAttentionThreads, 1)
    rotary_attention_kernel(const __grid_constant__ CUtensorMap projection,
                            const __grid_constant__ CUtensorMap rotated_keys,
                            const __grid_constant__ AttentionCall call) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using Shared = AttentionShared<kHeadDim>;
  extern __shared__ char raw[];
  const auto arrivals = [](int barrier) { return Shared::arrivals(barrier); };
  const auto machine = start_block<T, Shared>(raw, arrivals, &projection, &rotated_keys);
  if (machine.group() < 0) {
    give_registers<kFetchRegisters>();
    const int warp = __shfl_sync(0xffffffffu, threadIdx.x / kWarp, 0);
    if (warp > 0)
      rotate_queries<kHeadDim>(machine, call, warp - 1);
    else if (threadIdx.x == 0)
      fetch<kHeadDim>(machine, call);
  } else {
    take_registers<kMatrixRegisters>();
    attend_to_all<kHeadDim>(machine, call);
  }
#endif
}

}  // namespace mmalign
