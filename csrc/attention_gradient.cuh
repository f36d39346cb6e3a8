// The kernels of the backward pass on a Hopper card: what both need, then gradients.
#pragma once

#include "attention_gradient_block.h"
#include "attention_machine.cuh"

namespace mmalign {

constexpr int kHeadsOfPreparation = 8, kPrepared = 2;  // of a thread, and on their way

// What the preparation reads and writes beside a GradientCall.
template <class T>
struct Preparation {
  const T *qkv, *out, *grad_out;
  const float* logsumexp;
  const int* cu_seqlens;
  T* turned;                                 // (num_tokens, (heads + key heads) * head_dim)
  float* figures;                            // (2, num_heads, num_tokens)
  ScheduledSample *query_table, *key_table;  // (num_samples + 2,), counters in the last
};

// Tables of work for both kernels, their counters at zero.
template <class T>
__device__ __forceinline__ void make_tables(const Preparation<T>& to, const GradientCall& call,
                                            int thread, int num_threads) {
  const int end = call.num_samples + 1;
  if (thread == 0) to.query_table[end].first_item = to.key_table[end].first_item = 0;
  for (int64_t i = thread; i < call.num_samples; i += num_threads) {
    schedule_sample(to.cu_seqlens, call.num_samples, i, call.shape.num_heads, to.query_table);
    schedule_sample(to.cu_seqlens, call.num_samples, i, call.shape.num_key_heads, to.key_table);
  }
}

// A thread has the same eight pairs of columns of a token's heads, and knows their angles.
template <class T, int kHeadDim>
__global__ void __launch_bounds__(kTurnThreads)
    prepare_gradient_kernel(const Preparation<T> to, const GradientCall call) {
  using Element = ElementOf<T>;
  constexpr int kChunks = kHeadDim / 16, kTokens = kTurnThreads / kChunks, kHalf = kHeadDim / 2;
  if (blockIdx.y == 0)
    make_tables(to, call, blockIdx.x * kTurnThreads + threadIdx.x, gridDim.x * kTurnThreads);
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kTokens + threadIdx.x / kChunks;
  const bool inside = token < call.num_tokens;  // the sums below need whole warps
  const int chunk = threadIdx.x % kChunks;
  const int64_t angle =
      static_cast<int64_t>(inside ? call.position_ids[token] : 0) * kHalf + chunk * 8;
  const Angles cos = load_angles(call.cos + angle), sin = load_angles(call.sin + angle);
  const int num_heads = call.shape.num_heads, turning = num_heads + call.shape.num_key_heads;
  const int begin = blockIdx.y * kHeadsOfPreparation;
  const int end = min(begin + kHeadsOfPreparation, turning);
  const T* from = to.qkv + token * call.columns() + chunk * 8;
  T* turned = to.turned + token * turning * kHeadDim + chunk * 8;
  const int64_t row = token * num_heads;
#pragma unroll 1
  for (int first = begin; first < end; first += kPrepared) {
    Packed x[kPrepared][2], out[kPrepared][2], grad[kPrepared][2];
#pragma unroll
    for (int i = 0; i < kPrepared; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int head = first + i;
        const int64_t beside = (row + head) * kHeadDim + chunk * 8 + half * kHalf;
        const bool query = inside && head < num_heads;
        x[i][half] = load_streaming(from + head * kHeadDim + half * kHalf, inside && head < end);
        out[i][half] = load_streaming(to.out + beside, query);
        grad[i][half] = load_streaming(to.grad_out + beside, query);
      }
#pragma unroll
    for (int i = 0; i < kPrepared; ++i) {
      const int head = first + i;
      float delta = 0;
#pragma unroll
      for (int half = 0; half < 2; ++half)
        delta += dot<Element>(bits_as<Chunk>(out[i][half]), bits_as<Chunk>(grad[i][half]));
#pragma unroll
      for (int with = 1; with < kChunks; with *= 2)
        delta += __shfl_xor_sync(0xffffffffu, delta, with);
      if (!inside || head >= end) continue;
      if (chunk == 0 && head < num_heads) {
        const int64_t figure = static_cast<int64_t>(head) * call.num_tokens + token;
        to.figures[figure] = to.logsumexp[row + head] * kLog2E;
        to.figures[figure + static_cast<int64_t>(num_heads) * call.num_tokens] = delta;
      }
      Chunk low = bits_as<Chunk>(x[i][0]), high = bits_as<Chunk>(x[i][1]);
      turn_chunks<Element>(low, high, cos, sin);
      store_chunk(turned + head * kHeadDim, low);
      store_chunk(turned + head * kHeadDim + kHalf, high);
    }
  }
}

constexpr int kGradientRegisters = 232, kPassingRegisters = 40;  // of 168 each at the start

// Empty on other architectures: the launcher refuses their cards.
template <Gradient kOf, class T, int kHeadDim>
__global__ void __launch_bounds__(kAttentionThreads, 1)
    rotary_gradient_kernel(const __grid_constant__ CUtensorMap projection,
                           const __grid_constant__ CUtensorMap turned,
                           const __grid_constant__ CUtensorMap grad_out,
                           const __grid_constant__ GradientCall call) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using Shared = GradientShared<kHeadDim>;
  static_assert(Shared::kBytes + kPatternBytes <= 227 * 1024, "more than a block can have");
  extern __shared__ char raw[];
  const auto arrivals = [](int barrier) { return Shared::arrivals(kOf, barrier); };
  const auto machine = start_block<T, Shared>(raw, arrivals, &projection, &turned, &grad_out);
  if (machine.group() < 0) {
    give_registers<kPassingRegisters>();
    const int warp = __shfl_sync(0xffffffffu, threadIdx.x / kWarp, 0);
    if (threadIdx.x == 0)
      fetch_pairs<kOf, kHeadDim>(machine, call);
    else if (kOf == Gradient::kKeys && warp == 1)
      bring_figures<kHeadDim>(machine, call);
  } else {
    take_registers<kGradientRegisters>();
    compute_gradients<kOf, kHeadDim>(machine, call);
  }
#endif
}

}  // namespace mmalign
