// SwiGLU: y = gate * sigmoid(gate) * up, gate and up the halves of a row; and, with s the sigmoid,
//
//   dgate = dy * up * s * (1 + gate * (1 - s)),   dup = dy * gate * s
//
// One pass: all of a row's numbers are read before they are overwritten.
#include <torch/csrc/stable/library.h>

#include "rows.h"
#include "tensors.h"

namespace mmalign {

namespace {

// The halves of a row are too short for the hardware's prefetcher, which starts anew at each. Past
// the last row nothing is read.
inline void prefetch_next_row(const float* gate, const float* up, int64_t columns) {
  __builtin_prefetch(gate + 2 * columns);
  __builtin_prefetch(up + 2 * columns);
}

Tensor swiglu_fwd(const Tensor& gate_up) {
  dense_floats(Argument("swiglu_fwd", "gate_up", gate_up).rank(2));
  const int64_t rows = gate_up.size(0), columns = gate_up.size(1) / 2;
  Tensor y = torch::stable::new_empty(gate_up, {rows, columns});
  const float* from = floats(gate_up);
  float* to = floats(y);
  share_rows(rows, 2 * columns, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      const float *gates = from + 2 * row * columns, *ups = gates + columns;
      for_vectors(columns, [&](int64_t i, auto part) {
        prefetch_next_row(gates + i, ups + i, columns);
        const Vector gate = part.load(gates + i);
        part.store(to + row * columns + i, gate * sigmoid(gate) * part.load(ups + i));
      });
    }
  });
  return y;
}

// Overwrites gate_up where grad_gate_up is the same tensor.
void swiglu_bwd(const Tensor& grad_y, const Tensor& gate_up, Tensor grad_gate_up) {
  constexpr const char* kName = "swiglu_bwd";
  dense_floats(Argument(kName, "gate_up", gate_up).rank(2));
  const int64_t rows = gate_up.size(0), columns = gate_up.size(1) / 2;
  dense_floats(Argument(kName, "grad_y", grad_y).shaped({rows, columns}, "gate_up"));
  dense_floats(Argument(kName, "grad_gate_up", grad_gate_up).shaped({rows, 2 * columns}, "gate_up"));
  const float *from = floats(gate_up), *grads = floats(grad_y);
  float* to = floats(grad_gate_up);
  share_rows(rows, 3 * columns, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      const float *gates = from + 2 * row * columns, *ups = gates + columns;
      float *grad_gates = to + 2 * row * columns, *grad_ups = grad_gates + columns;
      for_vectors(columns, [&](int64_t i, auto part) {
        prefetch_next_row(gates + i, ups + i, columns);
        const Vector gate = part.load(gates + i), up = part.load(ups + i);
        const Vector dy = part.load(grads + row * columns + i), s = sigmoid(gate);
        part.store(grad_gates + i, dy * up * s * (1.0f + gate * (1.0f - s)));
        part.store(grad_ups + i, dy * gate * s);
      });
    }
  });
}

}  // namespace

}  // namespace mmalign

STABLE_TORCH_LIBRARY_FRAGMENT(mmalign_cpu, library) {
  library.def("swiglu_fwd(Tensor gate_up) -> Tensor");
  library.def("swiglu_bwd(Tensor grad_y, Tensor gate_up, Tensor(a!) grad_gate_up) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(mmalign_cpu, CPU, library) {
  library.impl("swiglu_fwd", TORCH_BOX(&mmalign::swiglu_fwd));
  library.impl("swiglu_bwd", TORCH_BOX(&mmalign::swiglu_bwd));
}
