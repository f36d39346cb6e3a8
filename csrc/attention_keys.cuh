// A copy of the keys of all samples, rotated by their positions, and the table of work.
#pragma once

#include "attention_feed.h"
#include "common.cuh"

namespace mmalign {

template <class T>
struct ElementOf;
template <>
struct ElementOf<__half> {
  static __device__ __forceinline__ void unpack(uint32_t word, float (&x)[2]) {
    const float2 both = __half22float2(bits_as<__half2>(word));
    x[0] = both.x, x[1] = both.y;
  }
  static __device__ __forceinline__ uint32_t pack(float low, float high) {
    return bits_as<uint32_t>(__floats2half2_rn(low, high));
  }
};
template <>
struct ElementOf<__nv_bfloat16> {
  static __device__ __forceinline__ void unpack(uint32_t word, float (&x)[2]) {
    x[0] = __uint_as_float(word << 16), x[1] = __uint_as_float(word & 0xffff0000u);
  }
  static __device__ __forceinline__ uint32_t pack(float low, float high) {
    return bits_as<uint32_t>(__floats2bfloat162_rn(low, high));
  }
};

constexpr int kRotateThreads = 256;
constexpr int kHeadsPerThread = 8, kBatch = 4;  // key heads of a thread, and of these in flight

__device__ __forceinline__ Angles load_angles(const float* at) {
  struct Both {
    Packed low, high;
  };
  return bits_as<Angles>(Both{load_shared_by_all(at, true), load_shared_by_all(at + 4, true)});
}

// In assembly: in a branch of its own the compiler may pull the words apart.
template <class T>
__device__ __forceinline__ void store_chunk(T* to, const Chunk& chunk) {
  const uint32_t(&words)[4] = chunk.words;
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(words[0]), "r"(words[1]),
               "r"(words[2]), "r"(words[3])
               : "memory");
}

// A thread rotates the same eight pairs of columns of a token's heads, and knows their angles.
template <class T, int kHeadDim>
__global__ void __launch_bounds__(kRotateThreads)
    rotate_keys_kernel(const T* __restrict__ qkv,  // (num_tokens, all heads * head_dim)
                     T* __restrict__ rotated,     // (num_tokens, num_key_heads * head_dim)
                     const int* __restrict__ cu_seqlens, ScheduledSample* __restrict__ table,
                     const AttentionCall call) {
  constexpr int kChunks = kHeadDim / 16, kTokens = kRotateThreads / kChunks;
  if (blockIdx.y == 0) {
    const int thread = blockIdx.x * kRotateThreads + threadIdx.x;
    if (thread == 0) *call.counter = 0;
    for (int64_t i = thread; i < call.num_samples; i += gridDim.x * kRotateThreads)
      schedule_sample(cu_seqlens, call.num_samples, i, call.shape.num_heads, table);
  }
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kTokens + threadIdx.x / kChunks;
  if (token >= call.num_tokens) return;
  const int chunk = threadIdx.x % kChunks * 8;
  const int64_t angle =
      static_cast<int64_t>(call.position_ids[token]) * (kHeadDim / 2) + chunk;
  const Angles cos = load_angles(call.cos + angle), sin = load_angles(call.sin + angle);
  const AttentionShape shape = call.shape;
  const T* from =
      qkv + (token * (shape.num_heads + 2 * shape.num_key_heads) + shape.num_heads) * kHeadDim +
      chunk;
  T* to = rotated + token * shape.num_key_heads * kHeadDim + chunk;
  const int first = blockIdx.y * kHeadsPerThread;
#pragma unroll
  for (int head = first; head < first + kHeadsPerThread; head += kBatch) {
    Packed halves[kBatch][2];
#pragma unroll
    for (int i = 0; i < kBatch; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        halves[i][half] = load_streaming(from + (head + i) * kHeadDim + half * (kHeadDim / 2),
                                         head + i < shape.num_key_heads);
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (head + i >= shape.num_key_heads) return;
      Chunk x = bits_as<Chunk>(halves[i][0]), y = bits_as<Chunk>(halves[i][1]);
      rotate_chunks<ElementOf<T>>(x, y, cos, sin);
      store_chunk(to + (head + i) * kHeadDim, x);
      store_chunk(to + (head + i) * kHeadDim + kHeadDim / 2, y);
    }
  }
}

}  // namespace mmalign
