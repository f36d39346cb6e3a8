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
#include <vector>

#include "rows.h"
#include "tensors.h"

namespace mmalign {

namespace {

constexpr int64_t kBlockRows = 64;

float mean_of(const float* x, int64_t columns) {
  return sum_over(columns, [&](int64_t i, auto part) { return part.load(x + i); }) / columns;
}

struct Statistics {
  float mean, rstd;

  Statistics(const float* x, int64_t columns, float eps) : mean(mean_of(x, columns)) {
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
  float *grad_x, *weight_partials, *bias_partials;  // partials (blocks, columns)
  int64_t rows, columns;
  float eps;

  // Of several rows: while one waits for the sum of its lanes another is read, and grad_weight and
  // grad_bias are read and written once for all of them.
  template <int kRows>
  void some_rows(int64_t first, float* grad_weight, float* grad_bias) const {
    const float *dy = grad_y + first * columns, *from = x + first * columns;
    float* dx = grad_x + first * columns;
    float centre[kRows], rstd[kRows], mean[kRows], along[kRows];
    for (int k = 0; k < kRows; ++k) centre[k] = mean_of(from + k * columns, columns);
    for (int k = 0; k < kRows; ++k) {
      Vector total{}, products{};
      const float squares = sum_over(columns, [&](int64_t i, auto part) {
        __builtin_prefetch(from + (k + kRows) * columns + i);
        __builtin_prefetch(dy + (k + kRows) * columns + i);
        const Vector centred = part.keep(part.load(from + k * columns + i) - centre[k]);
        const Vector grad_normed = part.load(weight + i) * part.load(dy + k * columns + i);
        total += grad_normed;
        products += grad_normed * centred;
        return centred * centred;
      });
      rstd[k] = 1.0f / std::sqrt(squares / columns + eps);
      mean[k] = sum(total) / columns;
      along[k] = sum(products) * rstd[k] / columns;
    }
    for_vectors(columns, [&](int64_t i, auto part) {
      const Vector scale = part.load(weight + i);
      Vector weight_sum = part.load(grad_weight + i), bias_sum = part.load(grad_bias + i);
      for (int k = 0; k < kRows; ++k) {
        const Vector grad = part.load(dy + k * columns + i);
        const Vector normed = (part.load(from + k * columns + i) - centre[k]) * rstd[k];
        part.store(dx + k * columns + i, (scale * grad - mean[k] - normed * along[k]) * rstd[k]);
        weight_sum += grad * normed;
        bias_sum += grad;
      }
      part.store(grad_weight + i, weight_sum);
      part.store(grad_bias + i, bias_sum);
    });
  }

  void block(int64_t index) const {
    constexpr int kAtOnce = 4;
    float* grad_weight = weight_partials + index * columns;
    float* grad_bias = bias_partials + index * columns;
    std::fill_n(grad_weight, columns, 0.0f);
    std::fill_n(grad_bias, columns, 0.0f);
    const int64_t end = std::min(rows, (index + 1) * kBlockRows);
    int64_t i = index * kBlockRows;
    for (; i + kAtOnce <= end; i += kAtOnce) some_rows<kAtOnce>(i, grad_weight, grad_bias);
    for (; i < end; ++i) some_rows<1>(i, grad_weight, grad_bias);
  }
};

std::tuple<Tensor, Tensor, Tensor> layer_norm_bwd(const Tensor& grad_y, const Tensor& x,
                                                  const Tensor& weight, double eps) {
  constexpr const char* kName = "layer_norm_bwd";
  dense_floats(Argument(kName, "x", x).rank(2));
  const int64_t rows = x.size(0), columns = x.size(1);
  dense_floats(Argument(kName, "grad_y", grad_y).shaped({rows, columns}, "x"));
  dense_floats(Argument(kName, "weight", weight).shaped({columns}, "x"));
  const int64_t blocks = (rows + kBlockRows - 1) / kBlockRows;
  Tensor grad_x = torch::stable::empty_like(x);
  Tensor grad_weight = torch::stable::empty_like(weight);
  Tensor grad_bias = torch::stable::empty_like(weight);
  std::vector<float> partials(2 * blocks * columns);
  float *of_weight = partials.data(), *of_bias = of_weight + blocks * columns;
  const Gradient gradient{floats(grad_y), floats(x), floats(weight),
                          floats(grad_x), of_weight, of_bias,
                          rows,           columns,   static_cast<float>(eps)};
  share_rows(blocks, kBlockRows * columns, [&](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) gradient.block(block);
  });
  add_rows(of_weight, blocks, columns, floats(grad_weight));
  add_rows(of_bias, blocks, columns, floats(grad_bias));
  return {grad_x, grad_weight, grad_bias};
}

}  // namespace

}  // namespace mmalign

STABLE_TORCH_LIBRARY_FRAGMENT(mmalign_cpu, library) {
  library.def("layer_norm_fwd(Tensor x, Tensor weight, Tensor bias, float eps) -> Tensor");
  library.def(
      "layer_norm_bwd(Tensor grad_y, Tensor x, Tensor weight, float eps)"
      " -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(mmalign_cpu, CPU, library) {
  library.impl("layer_norm_fwd", TORCH_BOX(&mmalign::layer_norm_fwd));
  library.impl("layer_norm_bwd", TORCH_BOX(&mmalign::layer_norm_bwd));
}
