// RMSNorm: y = x * rstd * weight, rstd = 1 / sqrt(mean(x^2) + eps), alone or after an addition; and
//
//   dx = rstd * (weight * dy - x * rstd^2 * mean(weight * dy * x)) + the residual's gradient
//   dweight = sum over rows of dy * x * rstd
//
// A row is read twice, the second time from the cache. dweight is summed over blocks of rows, the
// same ones for any number of threads.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <optional>
#include <tuple>

#include "rows.h"
#include "tensors.h"

namespace mmalign {

namespace {

constexpr int64_t kBlockRows = 64;

void check(const char* operation, const char* name, const Tensor& tensor,
           std::initializer_list<int64_t> shape, const char* beside) {
  dense_floats(Argument(operation, name, tensor).shaped(shape, beside));
}

float norm_row(const float* x, const float* weight, int64_t columns, float mean_square, float eps,
               float* y) {
  const float rstd = 1.0f / std::sqrt(mean_square + eps);
  for_vectors(columns, [&](int64_t i, auto part) {
    part.store(y + i, part.load(x + i) * rstd * part.load(weight + i));
  });
  return rstd;
}

std::tuple<Tensor, Tensor> rms_norm_fwd(const Tensor& x, const Tensor& weight, double eps) {
  dense_floats(Argument("rms_norm_fwd", "x", x).rank(2));
  const int64_t rows = x.size(0), columns = x.size(1);
  check("rms_norm_fwd", "weight", weight, {columns}, "x");
  Tensor y = torch::stable::empty_like(x), rstd = torch::stable::new_empty(x, {rows, 1});
  const float *input = floats(x), *scale = floats(weight);
  float *output = floats(y), *statistics = floats(rstd);
  share_rows(rows, columns, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      const float* from = input + row * columns;
      const float squares = sum_over(columns, [&](int64_t i, auto part) {
        const Vector value = part.load(from + i);
        return value * value;
      });
      statistics[row] = norm_row(from, scale, columns, squares / columns, static_cast<float>(eps),
                                 output + row * columns);
    }
  });
  return {y, rstd};
}

std::tuple<Tensor, Tensor, Tensor> add_rms_norm_fwd(const Tensor& x, const Tensor& residual,
                                                    const Tensor& weight, double eps) {
  constexpr const char* kName = "add_rms_norm_fwd";
  dense_floats(Argument(kName, "x", x).rank(2));
  const int64_t rows = x.size(0), columns = x.size(1);
  check(kName, "residual", residual, {rows, columns}, "x");
  check(kName, "weight", weight, {columns}, "x");
  Tensor y = torch::stable::empty_like(x), added = torch::stable::empty_like(x);
  Tensor rstd = torch::stable::new_empty(x, {rows, 1});
  const float *first_term = floats(x), *second_term = floats(residual), *scale = floats(weight);
  float *output = floats(y), *new_residual = floats(added), *statistics = floats(rstd);
  share_rows(rows, columns, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      const int64_t at = row * columns;
      const float squares = sum_over(columns, [&](int64_t i, auto part) {
        const Vector value = part.load(first_term + at + i) + part.load(second_term + at + i);
        part.store(new_residual + at + i, value);
        return value * value;
      });
      statistics[row] = norm_row(new_residual + at, scale, columns, squares / columns,
                                 static_cast<float>(eps), output + at);
    }
  });
  return {y, added, rstd};
}

struct Gradient {
  const float *grad_y, *grad_residual;  // grad_residual: or null
  const float *x, *weight, *rstd;
  float *grad_x, *partials;  // partials (blocks, columns): of dweight, or null
  int64_t rows, columns;

  void row(int64_t row, float* partial) const {
    const float *dy = grad_y + row * columns, *from = x + row * columns;
    const float* bypass = grad_residual ? grad_residual + row * columns : nullptr;
    float* dx = grad_x + row * columns;
    const float scale = rstd[row];
    const float along = sum_over(columns, [&](int64_t i, auto part) {
      return part.load(weight + i) * part.load(dy + i) * part.load(from + i);
    });
    const float shrink = along / columns * scale * scale;
    for_vectors(columns, [&](int64_t i, auto part) {
      const Vector value = part.load(from + i), grad = part.load(dy + i);
      Vector total = (part.load(weight + i) * grad - value * shrink) * scale;
      if (bypass) total += part.load(bypass + i);
      part.store(dx + i, total);
      if (partial) part.store(partial + i, part.load(partial + i) + grad * (value * scale));
    });
  }

  void block(int64_t index) const {
    float* partial = partials ? partials + index * columns : nullptr;
    if (partial) std::fill_n(partial, columns, 0.0f);
    const int64_t end = std::min(rows, (index + 1) * kBlockRows);
    for (int64_t i = index * kBlockRows; i < end; ++i) row(i, partial);
  }
};

std::tuple<Tensor, Tensor> rms_norm_bwd(const Tensor& grad_y,
                                        const std::optional<Tensor>& grad_residual,
                                        const Tensor& x, const Tensor& weight, const Tensor& rstd,
                                        bool needs_weight) {
  constexpr const char* kName = "rms_norm_bwd";
  dense_floats(Argument(kName, "x", x).rank(2));
  const int64_t rows = x.size(0), columns = x.size(1);
  check(kName, "grad_y", grad_y, {rows, columns}, "x");
  if (grad_residual) check(kName, "grad_residual", *grad_residual, {rows, columns}, "x");
  check(kName, "weight", weight, {columns}, "x");
  check(kName, "rstd", rstd, {rows, 1}, "x");
  const int64_t blocks = (rows + kBlockRows - 1) / kBlockRows;
  Tensor grad_x = torch::stable::empty_like(x);
  Tensor grad_weight = torch::stable::new_empty(x, {needs_weight ? columns : 0});
  Tensor partials = torch::stable::new_empty(x, {needs_weight ? blocks : 0, columns});
  const Gradient gradient{floats(grad_y), grad_residual ? floats(*grad_residual) : nullptr,
                          floats(x),      floats(weight),
                          floats(rstd),   floats(grad_x),
                          needs_weight ? floats(partials) : nullptr, rows, columns};
  share_rows(blocks, kBlockRows * columns, [&](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) gradient.block(block);
  });
  if (needs_weight) add_rows(gradient.partials, blocks, columns, floats(grad_weight));
  return {grad_x, grad_weight};
}

}  // namespace

}  // namespace mmalign

STABLE_TORCH_LIBRARY_FRAGMENT(mmalign_cpu, library) {
  library.def("rms_norm_fwd(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)");
  library.def(
      "add_rms_norm_fwd(Tensor x, Tensor residual, Tensor weight, float eps)"
      " -> (Tensor, Tensor, Tensor)");
  library.def(
      "rms_norm_bwd(Tensor grad_y, Tensor? grad_residual, Tensor x, Tensor weight, Tensor rstd,"
      " bool needs_weight) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(mmalign_cpu, CPU, library) {
  library.impl("rms_norm_fwd", TORCH_BOX(&mmalign::rms_norm_fwd));
  library.impl("add_rms_norm_fwd", TORCH_BOX(&mmalign::add_rms_norm_fwd));
  library.impl("rms_norm_bwd", TORCH_BOX(&mmalign::rms_norm_bwd));
}
