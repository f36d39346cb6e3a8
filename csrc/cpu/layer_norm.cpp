// LayerNorm: y = normed * weight + bias, with normed = (x - mean) * rstd along a row and
// rstd = 1 / sqrt(variance + eps); and, with g = weight * dy,
//
//   dx = rstd * (g - mean(g) - normed * mean(g * normed))
//   dweight = sum over rows of dy * normed,   dbias = sum over rows of dy
//
// The gradient computes a row's statistics again, for which the row is in the cache. Sums over rows
// are added up by blocks, the same ones for any number of threads.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <tuple>

#include "rows.h"
#include "tensors.h"

namespace mmalign {

namespace {

constexpr int64_t kBlockRows = 64;

struct Statistics {
  float mean, rstd;

  Statistics(const float* x, int64_t columns, float eps) {
    mean = sum_over(columns, [&](int64_t i, auto part) { return part.load(x + i); }) / columns;
    const float squares = sum_over(columns, [&](int64_t i, auto part) {
      const Vector centred = part.keep(part.load(x + i) - mean);
      return centred * centred;
    });
    rstd = 1.0f / std::sqrt(squares / columns + eps);
  }
};

Tensor layer_norm_fwd(const Tensor& x, const Tensor& weight, const Tensor& bias, double eps) {
  constexpr const char* kName = "layer_norm_fwd";
  dense_floats(Argument(kName, "x", x).rank(2));
  const int64_t rows = x.size(0), columns = x.size(1);
  dense_floats(Argument(kName, "weight", weight).shaped({columns}, "x"));
  dense_floats(Argument(kName, "bias", bias).shaped({columns}, "x"));
  Tensor y = torch::stable::empty_like(x);
  const float *input = floats(x), *scale = floats(weight), *shift = floats(bias);
  float* output = floats(y);
  share_rows(rows, columns, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      const float* from = input + row * columns;
      float* to = output + row * columns;
      const Statistics of(from, columns, static_cast<float>(eps));
      for_vectors(columns, [&](int64_t i, auto part) {
        const Vector normed = (part.load(from + i) - of.mean) * of.rstd;
        part.store(to + i, normed * part.load(scale + i) + part.load(shift + i));
      });
    }
  });
  return y;
}

struct Gradient {
  const float *grad_y, *x, *weight;
  float *grad_x, *partials;  // partials (blocks, 2, columns): of dweight and dbias
  int64_t rows, columns;
  float eps;

  void row(int64_t row, float* grad_weight, float* grad_bias) const {
    const float *dy = grad_y + row * columns, *from = x + row * columns;
    float* dx = grad_x + row * columns;
    const Statistics of(from, columns, eps);
    Vector total{};
    const float along = sum_over(columns, [&](int64_t i, auto part) {
      const Vector grad_normed = part.load(weight + i) * part.load(dy + i);
      total += grad_normed;
      return grad_normed * ((part.load(from + i) - of.mean) * of.rstd);
    }) / columns;
    const float mean = sum(total) / columns;
    for_vectors(columns, [&](int64_t i, auto part) {
      const Vector normed = (part.load(from + i) - of.mean) * of.rstd, grad = part.load(dy + i);
      part.store(dx + i, (part.load(weight + i) * grad - mean - normed * along) * of.rstd);
      part.store(grad_weight + i, part.load(grad_weight + i) + grad * normed);
      part.store(grad_bias + i, part.load(grad_bias + i) + grad);
    });
  }

  void block(int64_t index) const {
    float* sums = partials + index * 2 * columns;
    std::fill_n(sums, 2 * columns, 0.0f);
    const int64_t end = std::min(rows, (index + 1) * kBlockRows);
    for (int64_t i = index * kBlockRows; i < end; ++i) row(i, sums, sums + columns);
  }
};

// dx, and (2, columns): dweight and dbias.
std::tuple<Tensor, Tensor> layer_norm_bwd(const Tensor& grad_y, const Tensor& x,
                                          const Tensor& weight, double eps) {
  constexpr const char* kName = "layer_norm_bwd";
  dense_floats(Argument(kName, "x", x).rank(2));
  const int64_t rows = x.size(0), columns = x.size(1);
  dense_floats(Argument(kName, "grad_y", grad_y).shaped({rows, columns}, "x"));
  dense_floats(Argument(kName, "weight", weight).shaped({columns}, "x"));
  const int64_t blocks = (rows + kBlockRows - 1) / kBlockRows;
  Tensor grad_x = torch::stable::empty_like(x);
  Tensor sums = torch::stable::new_empty(x, {2, columns});
  Tensor partials = torch::stable::new_empty(x, {blocks, 2, columns});
  const Gradient gradient{floats(grad_y),   floats(x), floats(weight), floats(grad_x),
                          floats(partials), rows,      columns,        static_cast<float>(eps)};
  share_rows(blocks, kBlockRows * columns, [&](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) gradient.block(block);
  });
  add_rows(gradient.partials, blocks, 2 * columns, floats(sums));
  return {grad_x, sums};
}

}  // namespace

}  // namespace mmalign

STABLE_TORCH_LIBRARY_FRAGMENT(mmalign_cpu, library) {
  library.def("layer_norm_fwd(Tensor x, Tensor weight, Tensor bias, float eps) -> Tensor");
  library.def(
      "layer_norm_bwd(Tensor grad_y, Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(mmalign_cpu, CPU, library) {
  library.impl("layer_norm_fwd", TORCH_BOX(&mmalign::layer_norm_fwd));
  library.impl("layer_norm_bwd", TORCH_BOX(&mmalign::layer_norm_bwd));
}
