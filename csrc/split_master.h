// An exact fp32 number as a bf16 weight and the low 16 bits: read as integers, weight * 2^16 +
// remainder is the fp32 number (kernels/mmalign_kernels/adamw.py, split_master).
#pragma once

#include "stochastic_rounding.h"

namespace mmalign {

struct SplitMaster {
  uint16_t weight;    // the bits of a bf16: the nearest, ties away from zero
  int16_t remainder;  // the low half of the fp32 number
};

// Exact for every number; a NaN becomes the quiet one, so that the weight alone is one, too.
HOST_DEVICE SplitMaster split_master(float master) {
  const uint32_t bits = bits_as<uint32_t>(master);
  if (is_nan_bits(bits)) return {kBf16Nan, 0};
  return {static_cast<uint16_t>((bits + 0x8000u) >> 16), static_cast<int16_t>(bits & 0xffffu)};
}

HOST_DEVICE float join_master(uint16_t weight, int16_t remainder) {
  const uint32_t upper = static_cast<uint32_t>(weight) << 16;
  return bits_as<float>(upper + static_cast<uint32_t>(static_cast<int32_t>(remainder)));
}

}  // namespace mmalign
