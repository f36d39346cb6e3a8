// 8-bit moments: blocks of 128 neighbours share an fp32 scale (after Dettmers et al. 2022, arXiv
// 2110.02861, with codes that need no table).
//
// A code is a small floating-point number below 2 without infinities: kExponentBits of exponent,
// kMantissaBits of mantissa, the lowest exponent subnormal. The scale maps the block's largest
// number to the largest code; it is at least fp32's smallest normal number, so its reciprocal is
// finite, and a block divides once. Rounding between codes is stochastic, so the expected value is
// exact: rounded to nearest, a second moment that changes by a thousandth per step would never
// leave its code.
//
//   first moment   sign, 4 bits of exponent, 3 of mantissa: down to 2^-17 of the block's largest
//   second moment  5 bits of exponent, 3 of mantissa: down to 2^-33, the square of the above
#pragma once

#include "host_device.h"

namespace mmalign {

constexpr int kQuantizedBlock = 128;  // a warp's elements: its largest is found by shuffles

template <int kExponentBits, int kMantissaBits>
struct SmallFloat {
  static constexpr int kDropped = 23 - kMantissaBits;  // of fp32's mantissa
  static constexpr uint32_t kLargestCode = (1u << (kExponentBits + kMantissaBits)) - 1;
  static constexpr float kLargest = 2.0f - 1.0f / (1 << kMantissaBits);

  // Powers of two between the smallest normal code and fp32's smallest normal number: moved there,
  // fp32's own subnormals are the codes' subnormals, and its bits, cut, are the code.
  static constexpr int kShift = 126 - ((1 << kExponentBits) - 2);

  HOST_DEVICE static float power_of_2(int exponent) {
    return bits_as<float>(static_cast<uint32_t>(exponent + 127) << 23);
  }

  // x in [0, kLargest], or above it by a rounding error; draw: 16 random bits.
  HOST_DEVICE static uint32_t encode(float x, uint32_t draw) {
    const uint32_t bits = bits_as<uint32_t>(x * power_of_2(-kShift));
    const uint32_t code = (bits + ((draw & 0xffffu) << (kDropped - 16))) >> kDropped;
    return code < kLargestCode ? code : kLargestCode;
  }

  HOST_DEVICE static float decode(uint32_t code) {
    return bits_as<float>(code << kDropped) * power_of_2(kShift);
  }
};

using FirstMomentCode = SmallFloat<4, 3>;
using SecondMomentCode = SmallFloat<5, 3>;

// Absolute values as integers, which have the order of the numbers with NaN above all: the largest
// of a block is a NaN if there is one, and the block stays NaN.
HOST_DEVICE uint32_t size_bits(float x) { return bits_as<uint32_t>(x) & 0x7fffffffu; }

// The divisor of a block.
template <class Code>
HOST_DEVICE float block_scale(uint32_t largest_size_bits) {
  constexpr uint32_t kSmallestNormal = 1u << 23;
  const auto bits = bits_as<uint32_t>(bits_as<float>(largest_size_bits) * (1 / Code::kLargest));
  return bits_as<float>(bits > kSmallestNormal ? bits : kSmallestNormal);  // NaN stays
}

// inverse: 1 / scale
HOST_DEVICE uint8_t encode_first_moment(float m, float inverse, uint32_t draw) {
  const uint32_t sign = bits_as<uint32_t>(m) >> 31;
  const float size = bits_as<float>(size_bits(m));
  return static_cast<uint8_t>(sign << 7 | FirstMomentCode::encode(size * inverse, draw));
}

HOST_DEVICE float decode_first_moment(uint8_t code, float scale) {
  const float size = FirstMomentCode::decode(code & 0x7fu) * scale;
  return code & 0x80u ? -size : size;
}

// A second moment above zero is never rounded to zero: the step divides by its root.
HOST_DEVICE uint8_t encode_second_moment(float v, float inverse, uint32_t draw) {
  if (v == 0) return 0;
  const uint32_t code = SecondMomentCode::encode(v * inverse, draw);
  return static_cast<uint8_t>(code ? code : 1);
}

HOST_DEVICE float decode_second_moment(uint8_t code, float scale) {
  return SecondMomentCode::decode(code) * scale;
}

}  // namespace mmalign
