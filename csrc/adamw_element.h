// AdamW of one element (Loshchilov and Hutter 2019, arXiv 1711.05101), and its random bits.
//
//   p -= learning_rate * weight_decay * p
//   m += (1 - beta1) * (g - m);  v = beta2 * v + (1 - beta2) * g^2
//   p -= learning_rate / (1 - beta1^step) * m / (sqrt(v / (1 - beta2^step)) + eps)
//
// Every product and sum is rounded separately (CMakeLists.txt disables fused multiply-add), in the
// order of triton/adamw.py: a split master is bit for bit the fp32 weight, on the host, too.
#pragma once

#include <cmath>

#include "philox.h"

namespace mmalign {

struct AdamwSettings {
  float decay;      // learning_rate * weight_decay
  float step_size;  // learning_rate / (1 - beta1^step)
  float rest1;      // 1 - beta1
  float beta2;
  float rest2;      // 1 - beta2
  float scale2;     // (1 - beta2^step)^-1/2
  float eps;
};

inline AdamwSettings adamw_settings(int64_t step, double learning_rate, double beta1, double beta2,
                                    double eps, double weight_decay) {
  const auto power = static_cast<double>(step);
  return {static_cast<float>(learning_rate * weight_decay),
          static_cast<float>(learning_rate / (1 - std::pow(beta1, power))),
          static_cast<float>(1 - beta1),
          static_cast<float>(beta2),
          static_cast<float>(1 - beta2),
          static_cast<float>(std::pow(1 - std::pow(beta2, power), -0.5)),
          static_cast<float>(eps)};
}

HOST_DEVICE void adamw_element(const AdamwSettings& s, float g, float& p, float& m, float& v) {
  m = m + s.rest1 * (g - m);
  v = s.beta2 * v + s.rest2 * g * g;
  p = p - s.decay * p;
  p = p - s.step_size * m / (sqrtf(v) * s.scale2 + s.eps);
}

// Elements that share Philox calls: word i of call c belongs to element c of run i.
constexpr int kDrawRun = 512;
constexpr int kDrawTile = 4 * kDrawRun;

enum DrawKind : uint32_t { kDrawsOfWeights = 0, kDrawsOfMoments = 1 };

// The four words of the elements `lane`, `lane + kDrawRun`, ... of a tile. place: index of the
// tensor in the list. Weights use the low half of their word; the first moment uses the low half of
// the moments' word, the second the high half.
HOST_DEVICE Words adamw_draws(uint64_t seed, int64_t tile, int lane, int64_t step, uint32_t place,
                              DrawKind kind) {
  const auto call = static_cast<uint32_t>(tile * kDrawRun + lane);
  return philox(seed, call, static_cast<uint32_t>(step), place, kind);
}

}  // namespace mmalign
