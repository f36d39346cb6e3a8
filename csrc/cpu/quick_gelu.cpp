// Quick GELU: y = x s, s = sigmoid(1.702 x); dx = dy s (1 + 1.702 x (1 - s)).
#include <torch/csrc/stable/library.h>

#include "rows.h"
#include "tensors.h"

namespace mmalign {

namespace {

constexpr float kSlope = 1.702f;

// function(first, count) for runs of the numbers, shared among threads.
template <class Function>
void share_numbers(int64_t count, const Function& function) {
  constexpr int64_t kRun = 1 << 10;
  share_rows((count + kRun - 1) / kRun, kRun, [&](int64_t first, int64_t last) {
    function(first * kRun, std::min(count, last * kRun) - first * kRun);
  });
}

Tensor quick_gelu_fwd(const Tensor& x) {
  dense_floats(Argument("quick_gelu_fwd", "x", x));
  Tensor y = torch::stable::empty_like(x);
  share_numbers(x.numel(), [&](int64_t first, int64_t count) {
    const float* from = floats(x) + first;
    float* to = floats(y) + first;
    for_vectors(count, [&](int64_t i, auto part) {
      const Vector value = part.load(from + i);
      part.store(to + i, value * sigmoid(kSlope * value));
    });
  });
  return y;
}

Tensor quick_gelu_bwd(const Tensor& grad_y, const Tensor& x) {
  constexpr const char* kName = "quick_gelu_bwd";
  dense_floats(Argument(kName, "x", x));
  const auto sizes = x.sizes();
  dense_floats(Argument(kName, "grad_y", grad_y).shaped(sizes.data(), sizes.size(), "x"));
  Tensor grad_x = torch::stable::empty_like(x);
  share_numbers(x.numel(), [&](int64_t first, int64_t count) {
    const float *from = floats(x) + first, *grads = floats(grad_y) + first;
    float* to = floats(grad_x) + first;
    for_vectors(count, [&](int64_t i, auto part) {
      const Vector value = kSlope * part.load(from + i), s = sigmoid(value);
      part.store(to + i, part.load(grads + i) * s * (1.0f + value * (1.0f - s)));
    });
  });
  return grad_x;
}

}  // namespace

}  // namespace mmalign

STABLE_TORCH_LIBRARY_FRAGMENT(mmalign_cpu, library) {
  library.def("quick_gelu_fwd(Tensor x) -> Tensor");
  library.def("quick_gelu_bwd(Tensor grad_y, Tensor x) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(mmalign_cpu, CPU, library) {
  library.impl("quick_gelu_fwd", TORCH_BOX(&mmalign::quick_gelu_fwd));
  library.impl("quick_gelu_bwd", TORCH_BOX(&mmalign::quick_gelu_bwd));
}
