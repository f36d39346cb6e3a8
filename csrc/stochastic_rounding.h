// fp32 to bf16 by stochastic rounding: up with the probability that makes the expected result
// exact.
#pragma once

#include "host_device.h"

namespace mmalign {

constexpr uint16_t kBf16Nan = 0x7fc0;

HOST_DEVICE bool is_nan_bits(uint32_t bits) { return (bits & 0x7fffffffu) > 0x7f800000u; }

HOST_DEVICE float bf16_value(uint16_t bits) {
  return bits_as<float>(static_cast<uint32_t>(bits) << 16);
}

// The bits of a bf16. draw: 16 random bits; they carry into the upper half with the probability
// that the lower half stands for. A NaN stays a NaN: a GPU's has all bits set and would wrap.
HOST_DEVICE uint16_t round_randomly(float x, uint32_t draw) {
  const uint32_t bits = bits_as<uint32_t>(x);
  if (is_nan_bits(bits)) return kBf16Nan;
  return static_cast<uint16_t>((bits + (draw & 0xffffu)) >> 16);
}

}  // namespace mmalign
