// Philox 4x32-10: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
// Counter in, four random words out: stateless, so any element's bits can be drawn anywhere.
#pragma once

#include "host_device.h"

namespace mmalign {

struct Words {
  uint32_t word[4];
};

HOST_DEVICE uint32_t high_product(uint32_t x, uint32_t y) {
  return static_cast<uint32_t>(static_cast<uint64_t>(x) * y >> 32);
}

HOST_DEVICE Words philox(uint64_t key, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  constexpr uint32_t kMultiplier0 = 0xD2511F53u, kMultiplier1 = 0xCD9E8D57u;
  constexpr uint32_t kWeyl0 = 0x9E3779B9u, kWeyl1 = 0xBB67AE85u;
#ifdef __CUDA_ARCH__
#pragma unroll
#endif
  for (int round = 0; round < 10; ++round) {
    const uint32_t high0 = high_product(kMultiplier0, c0), low0 = kMultiplier0 * c0;
    const uint32_t high1 = high_product(kMultiplier1, c2), low1 = kMultiplier1 * c2;
    c0 = high1 ^ c1 ^ k0;
    c1 = low1;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 += kWeyl0;
    k1 += kWeyl1;
  }
  return {{c0, c1, c2, c3}};
}

}  // namespace mmalign
