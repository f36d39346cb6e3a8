// The kernels of the backward pass on a Hopper GPU: preparation, then gradients.
#pragma once

#include "attention_gradient_block.h"
#include "attention_machine.cuh"

namespace mmalign {

constexpr int kHeadsOfPreparation = 8, kPrepared = 2;  // of a thread, and in flight

// What the preparation reads and writes besides a GradientCall.
template <class T>
struct Preparation {
  const T *qkv, *out, *grad_out;
  const float* logsumexp;
  const int* cu_seqlens;
  T* rotated;                                 // (num_tokens, (heads + key heads) * head_dim)
  float* statistics;                            // (2, num_heads, num_tokens)
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

// Eight pairs of columns of a head, and of what is beside a query.
struct PairsOfHead {
  Packed x[2], out[2], grad_out[2];
};

// Where a thread of the preparation is: a token, if there is one, and eight pairs of its columns.
struct PlaceOfToken {
  int64_t token;
  int chunk;
  bool inside;
};

template <class T, int kHeadDim>
__device__ __forceinline__ PairsOfHead load_pairs(const Preparation<T>& from,
                                                  const GradientCall& call,
                                                  const PlaceOfToken& place, int head,
                                                  bool is_rotated) {
  const int64_t beside = (place.token * call.shape.num_heads + head) * kHeadDim + place.chunk * 8;
  const int64_t own = place.token * call.columns() + head * kHeadDim + place.chunk * 8;
  const bool query = place.inside && head < call.shape.num_heads;
  PairsOfHead pairs;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int further = half * (kHeadDim / 2);
    pairs.x[half] = load_streaming(from.qkv + own + further, place.inside && is_rotated);
    pairs.out[half] = load_streaming(from.out + beside + further, query);
    pairs.grad_out[half] = load_streaming(from.grad_out + beside + further, query);
  }
  return pairs;
}

// The sum over a row of a head, by the threads that share it; whole warps.
template <class Element, int kThreads>
__device__ __forceinline__ float delta_of(const PairsOfHead& pairs) {
  float delta = 0;
#pragma unroll
  for (int half = 0; half < 2; ++half)
    delta += dot<Element>(bits_as<Chunk>(pairs.out[half]), bits_as<Chunk>(pairs.grad_out[half]));
#pragma unroll
  for (int with = 1; with < kThreads; with *= 2)
    delta += __shfl_xor_sync(0xffffffffu, delta, with);
  return delta;
}

template <class T>
__device__ __forceinline__ void store_statistics(const Preparation<T>& to, const GradientCall& call,
                                              int64_t token, int head, float delta) {
  const int64_t at = static_cast<int64_t>(head) * call.num_tokens + token;
  to.statistics[at] = to.logsumexp[token * call.shape.num_heads + head] * kLog2E;
  to.statistics[at + static_cast<int64_t>(call.shape.num_heads) * call.num_tokens] = delta;
}

// A thread has the same eight pairs of columns of a token's heads, and knows their angles.
template <class T, int kHeadDim>
__global__ void __launch_bounds__(kRotateThreads)
    prepare_gradient_kernel(const Preparation<T> to, const GradientCall call) {
  using Element = ElementOf<T>;
  constexpr int kChunks = kHeadDim / 16, kHalf = kHeadDim / 2;
  if (blockIdx.y == 0)
    make_tables(to, call, blockIdx.x * kRotateThreads + threadIdx.x, gridDim.x * kRotateThreads);
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kRotateThreads + threadIdx.x;
  const PlaceOfToken place = {thread / kChunks, static_cast<int>(threadIdx.x % kChunks),
                              thread / kChunks < call.num_tokens};
  const int64_t position = place.inside ? call.position_ids[place.token] : 0;
  const Angles cos = load_angles(call.cos + position * kHalf + place.chunk * 8);
  const Angles sin = load_angles(call.sin + position * kHalf + place.chunk * 8);
  const int num_rotated = call.shape.num_heads + call.shape.num_key_heads;
  const int begin = blockIdx.y * kHeadsOfPreparation;
  const int end = min(begin + kHeadsOfPreparation, num_rotated);
  T* rotated = to.rotated + place.token * num_rotated * kHeadDim + place.chunk * 8;
#pragma unroll 1
  for (int first = begin; first < end; first += kPrepared) {
    PairsOfHead pairs[kPrepared];
#pragma unroll
    for (int i = 0; i < kPrepared; ++i)
      pairs[i] = load_pairs<T, kHeadDim>(to, call, place, first + i, first + i < end);
#pragma unroll
    for (int i = 0; i < kPrepared; ++i) {
      const int head = first + i;
      const float delta = delta_of<Element, kChunks>(pairs[i]);
      if (!place.inside || head >= end) continue;
      if (place.chunk == 0 && head < call.shape.num_heads)
        store_statistics(to, call, place.token, head, delta);
      Chunk low = bits_as<Chunk>(pairs[i].x[0]), high = bits_as<Chunk>(pairs[i].x[1]);
      rotate_chunks<Element>(low, high, cos, sin);
      store_chunk(rotated + head * kHeadDim, low);
      store_chunk(rotated + head * kHeadDim + kHalf, high);
    }
  }
}

constexpr int kGradientRegisters = 232, kPassingRegisters = 40;  // of 168 each at the start

// sm_90a only: the launcher rejects other GPUs, and an image built without the suffix traps.
template <Gradient kOf, class T, int kHeadDim>
__global__ void __launch_bounds__(kAttentionThreads, 1)
    rotary_gradient_kernel(const __grid_constant__ CUtensorMap projection,
                           const __grid_constant__ CUtensorMap rotated,
                           const __grid_constant__ CUtensorMap grad_out,
                           const __grid_constant__ GradientCall call) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using Shared = GradientShared<kHeadDim>;
  static_assert(Shared::kBytes + kPatternBytes <= 227 * 1024, "more than a block can have");
  extern __shared__ char raw[];
  const auto arrivals = [](int barrier) { return Shared::arrivals(kOf, barrier); };
  const auto machine = start_block<T, Shared>(raw, arrivals, &projection, &rotated, &grad_out);
  if (machine.group() < 0) {
    give_registers<kPassingRegisters>();
    const int warp = __shfl_sync(0xffffffffu, threadIdx.x / kWarp, 0);
    if (threadIdx.x == 0)
      fetch_pairs<kOf, kHeadDim>(machine, call);
    else if (kOf == Gradient::kKeys && warp == 1)
      bring_statistics<kHeadDim>(machine, call);
  } else {
    take_registers<kGradientRegisters>();
    compute_gradients<kOf, kHeadDim>(machine, call);
  }
#else
  __trap();
#endif
}

}  // namespace mmalign
