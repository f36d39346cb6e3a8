// What AdamW keeps in bf16: the exact fp32 master, split into a bf16 weight and an int16 remainder
// (as integers, weight * 2^16 + remainder), or a number alone, rounded stochastically. A NaN
// becomes the quiet NaN of bf16. The loops are plain: the compiler vectorises them.
#include <torch/csrc/stable/library.h>

#include <cstdint>

#include "rows.h"
#include "tensors.h"

namespace mmalign {

namespace {

constexpr uint32_t kNaN = 0x7FC0;

bool is_nan(uint32_t bits) { return (bits & 0x7FFFFFFF) > 0x7F800000; }

// The upper half of the bits of an fp32 number plus `carried`, which is below 2^16.
uint16_t upper_half(uint32_t bits, uint32_t carried) {
  return static_cast<uint16_t>(is_nan(bits) ? kNaN : (bits + carried) >> 16);
}

// 32 random bits for a counter: two rounds of multiply and shift, constants by Wellons' search
// (nullprogram.com/blog/2018/07/31).
uint32_t random_bits(uint32_t counter, uint32_t key) {
  uint32_t x = counter ^ key;
  x = (x ^ (x >> 16)) * 0x7FEB352Du;
  x = ((x ^ (x >> 15)) + key) * 0x846CA68Bu;
  return x ^ (x >> 16);
}

const Argument& dense(const Argument& argument, ScalarType type) {
  return argument.typed({type}).contiguous();
}

template <class T>
T* elements(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

Tensor join_master(const Tensor& weight, const Tensor& remainder) {
  constexpr const char* kName = "join_master";
  const int64_t numel = weight.numel();
  dense(Argument(kName, "weight", weight).rank(1), ScalarType::BFloat16);
  dense(Argument(kName, "remainder", remainder).shaped({numel}, "weight"), ScalarType::Short);
  Tensor master = torch::stable::new_empty(weight, {numel}, ScalarType::Float);
  const auto* high = elements<uint16_t>(weight);
  const auto* low = elements<int16_t>(remainder);
  auto* bits = elements<uint32_t>(master);
  share_rows(numel, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      bits[i] = (static_cast<uint32_t>(high[i]) << 16) + static_cast<uint32_t>(low[i]);
    }
  });
  return master;
}

void split_master(const Tensor& master, Tensor weight, Tensor remainder) {
  constexpr const char* kName = "split_master";
  const int64_t numel = master.numel();
  dense_floats(Argument(kName, "master", master).rank(1));
  dense(Argument(kName, "weight", weight).shaped({numel}, "master"), ScalarType::BFloat16);
  dense(Argument(kName, "remainder", remainder).shaped({numel}, "master"), ScalarType::Short);
  const auto* bits = elements<uint32_t>(master);
  auto* high = elements<uint16_t>(weight);
  auto* low = elements<int16_t>(remainder);
  share_rows(numel, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      high[i] = upper_half(bits[i], 0x8000);
      low[i] = static_cast<int16_t>(is_nan(bits[i]) ? 0 : bits[i]);
    }
  });
}

// key: another one for every call, or the same numbers are rounded up.
void round_stochastically(const Tensor& x, Tensor rounded, int64_t key) {
  constexpr const char* kName = "round_stochastically";
  const int64_t numel = x.numel();
  dense_floats(Argument(kName, "x", x).rank(1));
  dense(Argument(kName, "rounded", rounded).shaped({numel}, "x"), ScalarType::BFloat16);
  const auto* bits = elements<uint32_t>(x);
  auto* high = elements<uint16_t>(rounded);
  share_rows(numel, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const uint32_t drawn = random_bits(static_cast<uint32_t>(i), static_cast<uint32_t>(key));
      high[i] = upper_half(bits[i], drawn >> 16);
    }
  });
}

}  // namespace

}  // namespace mmalign

STABLE_TORCH_LIBRARY_FRAGMENT(mmalign_cpu, library) {
  library.def("join_master(Tensor weight, Tensor remainder) -> Tensor");
  library.def("split_master(Tensor master, Tensor(a!) weight, Tensor(b!) remainder) -> ()");
  library.def("round_stochastically(Tensor x, Tensor(a!) rounded, int key) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(mmalign_cpu, CPU, library) {
  library.impl("join_master", TORCH_BOX(&mmalign::join_master));
  library.impl("split_master", TORCH_BOX(&mmalign::split_master));
  library.impl("round_stochastically", TORCH_BOX(&mmalign::round_stochastically));
}
