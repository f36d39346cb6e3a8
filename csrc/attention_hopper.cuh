// The kernel of attention_block.h on a Hopper GPU.
#pragma once

#include "attention_block.h"
#include "attention_machine.cuh"

namespace mmalign {

constexpr int kMatrixRegisters = 200, kFetchRegisters = 104;  // of 168 each at the start

// sm_90a only: the launcher rejects other GPUs, and an image built without the suffix traps.
template <class T, int kHeadDim>
__global__ void __launch_bounds__(kAttentionThreads, 1)
    rotary_attention_kernel(const __grid_constant__ CUtensorMap projection,
                            const __grid_constant__ CUtensorMap rotated_keys,
                            const __grid_constant__ AttentionCall call) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using Shared = AttentionShared<kHeadDim>;
  static_assert(Shared::kBytes + kPatternBytes <= 227 * 1024, "more than a block can have");
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
#else
  __trap();
#endif
}

}  // namespace mmalign
