// Four neighbouring elements of AdamW's tensors: how each format is read and written.
//
// Weights: fp32; bf16 with stochastic rounding; bf16 with the low 16 bits of an exact fp32 master.
// Moments: fp32; bf16 with stochastic rounding; 8-bit codes in blocks that share a scale.
#pragma once

#include <type_traits>

#include "adamw_element.h"
#include "block_quantization.h"
#include "common.cuh"
#include "split_master.h"

namespace mmalign {

constexpr int kFour = 4;

enum class Weights { kFp32, kRounded, kSplit };
enum class Moments { kFp32, kBf16, kCodes };

// One parameter and its state. Unused pointers are null.
struct AdamwTensor {
  void* param;
  int16_t* remainder;
  const void* grad;
  void *exp_avg, *exp_avg_sq;
  float *exp_avg_scale, *exp_avg_sq_scale;
  int64_t numel;
  int tile_begin;  // of the launch's tiles, the first of this tensor
  uint32_t place;  // in the whole list
};

template <class T>
struct alignas(sizeof(T) * kFour) Four {
  T lanes[kFour];
};

// kWhole: all four are inside and aligned, one access moves them.
template <bool kWhole, class T>
__device__ __forceinline__ Four<T> read(const void* base, int64_t at, int64_t numel) {
  const T* from = static_cast<const T*>(base) + at;
  if constexpr (kWhole) {
    return *reinterpret_cast<const Four<T>*>(from);
  } else {
    Four<T> values = {};
#pragma unroll
    for (int lane = 0; lane < kFour; ++lane)
      if (at + lane < numel) values.lanes[lane] = from[lane];
    return values;
  }
}

// Stores in assembly: each is predicated by itself, without a branch around all of them.
__device__ __forceinline__ void store_if(bool inside, void* to, const uint4& x) {
  asm volatile("{ .reg .pred p; setp.ne.b32 p, %5, 0; @p st.global.v4.b32 [%0], {%1, %2, %3, %4}; }"
               ::"l"(to), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w), "r"(static_cast<int>(inside))
               : "memory");
}
__device__ __forceinline__ void store_if(bool inside, void* to, const uint2& x) {
  asm volatile("{ .reg .pred p; setp.ne.b32 p, %3, 0; @p st.global.v2.b32 [%0], {%1, %2}; }"
               ::"l"(to), "r"(x.x), "r"(x.y), "r"(static_cast<int>(inside))
               : "memory");
}
__device__ __forceinline__ void store_if(bool inside, void* to, uint32_t x) {
  asm volatile("{ .reg .pred p; setp.ne.b32 p, %2, 0; @p st.global.b32 [%0], %1; }"
               ::"l"(to), "r"(x), "r"(static_cast<int>(inside))
               : "memory");
}

// end: numel, or 0 where nothing is stored.
template <bool kWhole, class T>
__device__ __forceinline__ void write(void* base, int64_t at, int64_t end, const Four<T>& values) {
  T* to = static_cast<T*>(base) + at;
  if constexpr (kWhole) {
    using Wide = typename std::conditional<sizeof(T) == 4, uint4, uint2>::type;
    using Bits = typename std::conditional<sizeof(T) == 1, uint32_t, Wide>::type;
    store_if(at < end, to, bits_as<Bits>(values));
  } else {
#pragma unroll
    for (int lane = 0; lane < kFour; ++lane)
      if (at + lane < end) to[lane] = values.lanes[lane];
  }
}

__device__ __forceinline__ uint32_t warp_largest(uint32_t x) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2)
    x = max(x, __shfl_xor_sync(0xffffffffu, x, step));
  return x;
}

// A moment in its storage, on the way from memory to the arithmetic and back.
template <Moments kMoments, bool kSecond>
struct Moment;

template <bool kSecond>
struct Moment<Moments::kFp32, kSecond> {
  Four<float> stored;

  template <bool kWhole>
  __device__ __forceinline__ void load(const void* base, const float*, int64_t at, int64_t numel) {
    stored = read<kWhole, float>(base, at, numel);
  }
  __device__ __forceinline__ float get(int lane) const { return stored.lanes[lane]; }
  template <bool kWhole>
  __device__ __forceinline__ void save(void* base, float*, int64_t at, int64_t end,
                                       const float (&values)[kFour], const uint32_t (&)[kFour]) {
    const Four<float> out = {{values[0], values[1], values[2], values[3]}};
    write<kWhole>(base, at, end, out);
  }
};

template <bool kSecond>
struct Moment<Moments::kBf16, kSecond> {
  Four<uint16_t> stored;

  template <bool kWhole>
  __device__ __forceinline__ void load(const void* base, const float*, int64_t at, int64_t numel) {
    stored = read<kWhole, uint16_t>(base, at, numel);
  }
  __device__ __forceinline__ float get(int lane) const { return bf16_value(stored.lanes[lane]); }
  template <bool kWhole>
  __device__ __forceinline__ void save(void* base, float*, int64_t at, int64_t end,
                                       const float (&values)[kFour],
                                       const uint32_t (&draws)[kFour]) {
    Four<uint16_t> out;
#pragma unroll
    for (int lane = 0; lane < kFour; ++lane)
      out.lanes[lane] = round_randomly(values[lane], draws[lane]);
    write<kWhole>(base, at, end, out);
  }
};

// A block of codes is what a warp holds: kQuantizedBlock = 32 lanes of four.
template <bool kSecond>
struct Moment<Moments::kCodes, kSecond> {
  static_assert(kQuantizedBlock == kWarp * kFour);
  Four<uint8_t> stored;
  float scale;

  template <bool kWhole>
  __device__ __forceinline__ void load(const void* base, const float* scales, int64_t at,
                                       int64_t numel) {
    stored = read<kWhole, uint8_t>(base, at, numel);
    scale = at < numel ? scales[at / kQuantizedBlock] : 0;
  }
  __device__ __forceinline__ float get(int lane) const {
    return kSecond ? decode_second_moment(stored.lanes[lane], scale)
                   : decode_first_moment(stored.lanes[lane], scale);
  }
  // Every lane of the warp calls it.
  template <bool kWhole>
  __device__ __forceinline__ void save(void* base, float* scales, int64_t at, int64_t end,
                                       const float (&values)[kFour],
                                       const uint32_t (&draws)[kFour]) {
    uint32_t largest = 0;
#pragma unroll
    for (int lane = 0; lane < kFour; ++lane)
      if (kWhole || at + lane < end) largest = max(largest, size_bits(values[lane]));
    using Code = typename std::conditional<kSecond, SecondMomentCode, FirstMomentCode>::type;
    const float new_scale = block_scale<Code>(warp_largest(largest));
    if (at % kQuantizedBlock == 0 && at < end) scales[at / kQuantizedBlock] = new_scale;
    const float inverse = 1 / new_scale;
    Four<uint8_t> out;
#pragma unroll
    for (int lane = 0; lane < kFour; ++lane)
      out.lanes[lane] = kSecond ? encode_second_moment(values[lane], inverse, draws[lane])
                                : encode_first_moment(values[lane], inverse, draws[lane]);
    write<kWhole>(base, at, end, out);
  }
};

// The fp32 value of a weight, and the weight of an fp32 value.
template <Weights kWeights>
struct Weight {
  Four<float> fp32;
  Four<uint16_t> bits;
  Four<int16_t> remainder;

  template <bool kWhole>
  __device__ __forceinline__ void load(const AdamwTensor& x, int64_t at) {
    if constexpr (kWeights == Weights::kFp32) fp32 = read<kWhole, float>(x.param, at, x.numel);
    else bits = read<kWhole, uint16_t>(x.param, at, x.numel);
    if constexpr (kWeights == Weights::kSplit)
      remainder = read<kWhole, int16_t>(x.remainder, at, x.numel);
  }

  __device__ __forceinline__ float get(int lane) const {
    if constexpr (kWeights == Weights::kFp32) return fp32.lanes[lane];
    else if constexpr (kWeights == Weights::kSplit)
      return join_master(bits.lanes[lane], remainder.lanes[lane]);
    else return bf16_value(bits.lanes[lane]);
  }

  __device__ __forceinline__ void set(int lane, float value, uint32_t draw) {
    if constexpr (kWeights == Weights::kFp32) {
      fp32.lanes[lane] = value;
    } else if constexpr (kWeights == Weights::kSplit) {
      const SplitMaster split = split_master(value);
      bits.lanes[lane] = split.weight;
      remainder.lanes[lane] = split.remainder;
    } else {
      bits.lanes[lane] = round_randomly(value, draw);
    }
  }

  template <bool kWhole>
  __device__ __forceinline__ void save(const AdamwTensor& x, int64_t at, int64_t end) const {
    if constexpr (kWeights == Weights::kFp32) write<kWhole>(x.param, at, end, fp32);
    else write<kWhole>(x.param, at, end, bits);
    if constexpr (kWeights == Weights::kSplit) write<kWhole>(x.remainder, at, end, remainder);
  }
};

}  // namespace mmalign
