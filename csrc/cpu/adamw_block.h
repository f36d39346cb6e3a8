// AdamW of a block of elements (kernels/mmalign_kernels/adamw.py has the formula), and how state in
// bf16 and in 8-bit codes is read and written. The loops are plain: the compiler vectorises them.
//
// The arithmetic is that of PyTorch's fused kernel as its builds for x86 compute it, bit for bit.
// Which product is fused with a sum is written here (CMakeLists.txt disables contraction); in the
// elements that are left over from whole vectors it is another one, as there.
#pragma once

#include <algorithm>
#include <cmath>
#include <optional>
#include <type_traits>

#include "../block_quantization.h"
#include "../split_master.h"
#include "../stochastic_rounding.h"

namespace mmalign {

constexpr int kTheirLanes = 8;  // of PyTorch's kernel, with AVX-512, too

struct AdamwSettings {
  float keep;       // 1 - learning_rate * weight_decay
  float step_size;  // learning_rate / (1 - beta1^step)
  float rest1;      // 1 - beta1
  float rest2;      // 1 - beta2
  float beta2;
  float root2;  // (1 - beta2^step)^1/2
  float eps;
  std::optional<float> divisor;  // of the gradients
};

inline AdamwSettings adamw_settings(int64_t step, double learning_rate, double beta1, double beta2,
                                    double eps, double weight_decay) {
  const auto power = static_cast<double>(step);
  return {static_cast<float>(1 - learning_rate * weight_decay),
          static_cast<float>(learning_rate / (1 - std::pow(beta1, power))),
          static_cast<float>(1 - beta1),
          static_cast<float>(1 - beta2),
          static_cast<float>(beta2),
          static_cast<float>(std::sqrt(1 - std::pow(beta2, power))),
          static_cast<float>(eps),
          std::nullopt};
}

struct AdamwBlock {
  float* p;
  const float* g;
  float *m, *v;
};

template <bool kScaled, bool kLeftOver>
void update_elements(const AdamwSettings& s, const AdamwBlock& block, int64_t first, int64_t last) {
  float* __restrict p = block.p;
  float* __restrict m = block.m;
  float* __restrict v = block.v;
  const float* __restrict g = block.g;
  const float divisor = s.divisor.value_or(1.0f), keep = s.keep, step_size = s.step_size;
  const float rest2 = s.rest2, beta2 = s.beta2, root2 = s.root2, eps = s.eps;
  const bool from_m = s.rest1 < 0.5f;  // as torch.lerp: from the nearer end
  const float rest1 = from_m ? s.rest1 : s.rest1 - 1;
  for (int64_t i = first; i < last; ++i) {
    const float grad = kScaled ? g[i] / divisor : g[i];
    m[i] = std::fma(rest1, grad - m[i], from_m ? m[i] : grad);
    v[i] = kLeftOver ? std::fma(v[i], beta2, rest2 * grad * grad)
                     : std::fma(rest2 * grad, grad, v[i] * beta2);
    p[i] = p[i] * keep - step_size * m[i] / (std::sqrt(v[i]) / root2 + eps);
  }
}

// The first `whole` elements of `count` are whole vectors.
inline void update_block(const AdamwSettings& settings, const AdamwBlock& block, int64_t whole,
                         int64_t count) {
  if (settings.divisor) {
    update_elements<true, false>(settings, block, 0, whole);
    update_elements<true, true>(settings, block, whole, count);
  } else {
    update_elements<false, false>(settings, block, 0, whole);
    update_elements<false, true>(settings, block, whole, count);
  }
}

// ---- state in bf16 ----

inline void widen_block(const uint16_t* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = bf16_value(from[i]);
}

inline void join_block(const uint16_t* weights, const int16_t* remainders, int64_t count,
                       float* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = join_master(weights[i], remainders[i]);
}

inline void split_block(const float* from, int64_t count, uint16_t* weights, int16_t* remainders) {
  for (int64_t i = 0; i < count; ++i) {
    const SplitMaster split = split_master(from[i]);
    weights[i] = split.weight;
    remainders[i] = split.remainder;
  }
}

// ---- stochastic rounding ----

// 16 random bits for every element: two rounds of multiply and shift, constants by Wellons' search
// (nullprogram.com/blog/2018/07/31).
struct Draws {
  uint32_t key, begin;
  uint32_t operator()(int64_t i) const {
    uint32_t x = (begin + static_cast<uint32_t>(i)) ^ key;
    x = (x ^ (x >> 16)) * 0x7FEB352Du;
    x = ((x ^ (x >> 15)) + key) * 0x846CA68Bu;
    return (x ^ (x >> 16)) >> 16;
  }
};

inline void round_block(const float* from, int64_t count, const Draws& draws, uint16_t* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = round_randomly(from[i], draws(i));
}

template <bool kFirst>
void decode_block(const uint8_t* codes, const float* scales, int64_t count, float* to) {
  for (int64_t begin = 0; begin < count; begin += kQuantizedBlock) {
    const int64_t end = std::min(count, begin + kQuantizedBlock);
    const float scale = scales[begin / kQuantizedBlock];
    for (int64_t i = begin; i < end; ++i) {
      to[i] = kFirst ? decode_first_moment(codes[i], scale) : decode_second_moment(codes[i], scale);
    }
  }
}

template <bool kFirst>
void encode_block(const float* from, int64_t count, const Draws& draws, uint8_t* codes,
                  float* scales) {
  using Code = std::conditional_t<kFirst, FirstMomentCode, SecondMomentCode>;
  for (int64_t begin = 0; begin < count; begin += kQuantizedBlock) {
    const int64_t end = std::min(count, begin + kQuantizedBlock);
    uint32_t largest = 0;
    for (int64_t i = begin; i < end; ++i) largest = std::max(largest, size_bits(from[i]));
    const float scale = block_scale<Code>(largest), inverse = 1 / scale;
    scales[begin / kQuantizedBlock] = scale;
    for (int64_t i = begin; i < end; ++i) {
      codes[i] = kFirst ? encode_first_moment(from[i], inverse, draws(i))
                        : encode_second_moment(from[i], inverse, draws(i));
    }
  }
}

}  // namespace mmalign
