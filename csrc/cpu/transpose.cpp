// A transposed copy, in squares of whole vectors that stay in registers: PyTorch's takes several
// times as long, and oneDNN needs one for the gradient of a weight (reference/linear.py).
#include <torch/csrc/stable/library.h>

#include "rows.h"
#include "tensors.h"

namespace mmalign {

namespace {

constexpr int64_t kTile = 64;  // rows whose squares of one column of vectors are written together

// to (columns, rows) gets rows first to last of from (rows, columns).
void transpose_rows(const float* from, int64_t rows, int64_t columns, int64_t first, int64_t last,
                    float* to) {
  int64_t column = 0;
  for (; column + kLanes <= columns; column += kLanes) {
    int64_t row = first;
    for (; row + kLanes <= last; row += kLanes) {
      Vector square[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) square[i] = load(from + (row + i) * columns + column);
      transpose(square);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) store(to + (column + i) * rows + row, square[i]);
    }
    for (; row < last; ++row) {
      for (int i = 0; i < kLanes; ++i) {
        to[(column + i) * rows + row] = from[row * columns + column + i];
      }
    }
  }
  for (; column < columns; ++column) {
    for (int64_t row = first; row < last; ++row) {
      to[column * rows + row] = from[row * columns + column];
    }
  }
}

// (rows, columns) -> (columns, rows), contiguous.
Tensor transpose_copy(const Tensor& x) {
  dense_floats(Argument("transpose", "x", x).rank(2));
  const int64_t rows = x.size(0), columns = x.size(1);
  Tensor y = torch::stable::new_empty(x, {columns, rows});
  share_rows((rows + kTile - 1) / kTile, kTile * columns, [&](int64_t first, int64_t last) {
    for (int64_t tile = first; tile < last; ++tile) {
      const int64_t end = std::min(rows, (tile + 1) * kTile);
      transpose_rows(floats(x), rows, columns, tile * kTile, end, floats(y));
    }
  });
  return y;
}

}  // namespace

}  // namespace mmalign

STABLE_TORCH_LIBRARY_FRAGMENT(mmalign_cpu, library) {
  library.def("transpose(Tensor x) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(mmalign_cpu, CPU, library) {
  library.impl("transpose", TORCH_BOX(&mmalign::transpose_copy));
}
