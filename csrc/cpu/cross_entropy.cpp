// Cross entropy of rows of logits, which its gradient, softmax minus one at the target, overwrites:
// the largest logit, then the sum of e^(logit - largest), then the gradient, all from the cache.
#include <torch/csrc/stable/library.h>

#include <cmath>

#include "rows.h"
#include "tensors.h"

namespace mmalign {

namespace {

float largest_of(const float* row, int64_t columns) {
  Vector tops[2] = {broadcast(kMinusInfinity), broadcast(kMinusInfinity)};
  int64_t i = 0;
  for (; i + 2 * kLanes <= columns; i += 2 * kLanes) {
    tops[0] = larger(tops[0], load(row + i));
    tops[1] = larger(tops[1], load(row + i + kLanes));
  }
  float top = largest(larger(tops[0], tops[1]));
  for (; i < columns; ++i) top = std::max(top, row[i]);
  return top;
}

// The loss of one row.
float row_loss(float* logits, int64_t columns, int64_t target, bool needs_gradient) {
  const float top = largest_of(logits, columns), chosen = logits[target];
  const int64_t whole = columns / kLanes * kLanes;
  float total = sum_over(whole, [&](int64_t i, auto part) {
    const Vector power = exp_of_negative(part.load(logits + i) - top);
    if (needs_gradient) part.store(logits + i, power);
    return power;
  });
  for (int64_t i = whole; i < columns; ++i) {
    const float power = std::exp(logits[i] - top);
    if (needs_gradient) logits[i] = power;
    total += power;
  }
  if (needs_gradient) {
    const float inverse = 1.0f / total;
    for_vectors(columns, [&](int64_t i, auto part) {
      part.store(logits + i, part.load(logits + i) * inverse);
    });
    logits[target] -= 1.0f;
  }
  return std::log(total) + (top - chosen);
}

// The losses, (rows,).
Tensor cross_entropy(Tensor logits, const Tensor& target_ids, bool needs_gradient) {
  constexpr const char* kName = "cross_entropy";
  dense_floats(Argument(kName, "logits", logits).rank(2));
  const int64_t rows = logits.size(0), columns = logits.size(1);
  Argument(kName, "target_ids", target_ids).shaped({rows}, "logits");
  Argument(kName, "target_ids", target_ids).typed({ScalarType::Long}).contiguous();
  const auto* targets = static_cast<const int64_t*>(target_ids.data_ptr());
  for (int64_t row = 0; row < rows; ++row) {
    if (targets[row] < 0 || targets[row] >= columns) {
      throw std::runtime_error("cross_entropy: target_ids has " + std::to_string(targets[row]) +
                               ", expected 0 to " + std::to_string(columns - 1));
    }
  }
  Tensor losses = torch::stable::new_empty(logits, {rows});
  float* to = floats(losses);
  float* from = floats(logits);
  share_rows(rows, columns, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      to[row] = row_loss(from + row * columns, columns, targets[row], needs_gradient);
    }
  });
  return losses;
}

}  // namespace

}  // namespace mmalign

STABLE_TORCH_LIBRARY_FRAGMENT(mmalign_cpu, library) {
  library.def(
      "cross_entropy(Tensor(a!) logits, Tensor target_ids, bool needs_gradient) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(mmalign_cpu, CPU, library) {
  library.impl("cross_entropy", TORCH_BOX(&mmalign::cross_entropy));
}
