// RMSNorm of rows that rms_norm.cu and rms_norm_backward.cu do not hold in registers: odd numbers
// of columns, unaligned rows, very long ones, fp64. A block loops over a row twice, one element per
// thread; the second pass reads the row from L2.
#pragma once

#include "column_partials.cuh"
#include "row_tile.cuh"

namespace mmalign {

constexpr int kAnyThreads = 256;

template <class T, bool kAdds>
__global__ void __launch_bounds__(kAnyThreads)
    rms_norm_fwd_any_kernel(const T* __restrict__ x,         // (num_rows, columns)
                            const T* __restrict__ residual,  // like x, or unused
                            const T* __restrict__ weight,    // (columns,)
                            T* y, T* new_residual,
                            Compute<T>* __restrict__ rstd,      // (num_rows,)
                            int columns, Compute<T> eps) {
  __shared__ Compute<T> workspace[2 * kAnyThreads / kWarp];
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * columns;
  const T* normed = kAdds ? new_residual + begin : x + begin;
  Compute<T> squares = 0;
  for (int at = threadIdx.x; at < columns; at += kAnyThreads) {
    if (kAdds)
      new_residual[begin + at] = narrow<T>(upcast(x[begin + at]) + upcast(residual[begin + at]));
    squares += upcast(normed[at]) * upcast(normed[at]);
  }
  const Compute<T> factor = reciprocal_root(row_sum(squares, workspace, 0) / columns + eps);
  if (threadIdx.x == 0) rstd[blockIdx.x] = factor;
  for (int at = threadIdx.x; at < columns; at += kAnyThreads)
    y[begin + at] = narrow<T>(upcast(normed[at]) * factor * upcast(weight[at]));
}

// The arguments of a backward launch.
template <class T>
struct RmsNormBackward {
  const T* grad_y;         // (num_rows, columns)
  const T* grad_residual;  // like grad_y, or unused
  const T* x;
  const T* weight;         // (columns,)
  const Compute<T>* rstd;     // (num_rows,)
  T* grad_x;
  T* grad_weight;          // (columns,), or unused
  ColumnPartials<Compute<T>> partials;
  int num_rows, columns;
};

template <class T, bool kAdds, bool kNeedsWeight>
__global__ void __launch_bounds__(kAnyThreads)
    rms_norm_bwd_any_kernel(const __grid_constant__ RmsNormBackward<T> call) {
  __shared__ Compute<T> workspace[2 * kAnyThreads / kWarp];
  Compute<T>* partial = call.partials.rows + static_cast<int64_t>(blockIdx.x) * call.columns;
  int parity = 0;
  for (int64_t row = blockIdx.x; row < call.num_rows; row += gridDim.x, parity ^= 1) {
    const int64_t begin = row * call.columns;
    const Compute<T> rstd = call.rstd[row];
    Compute<T> sum = 0;
    for (int at = threadIdx.x; at < call.columns; at += kAnyThreads)
      sum += upcast(call.grad_y[begin + at]) * upcast(call.weight[at]) * upcast(call.x[begin + at]);
    const Compute<T> along = row_sum(sum, workspace, parity) * rstd / call.columns;
    for (int at = threadIdx.x; at < call.columns; at += kAnyThreads) {
      const Compute<T> grad = upcast(call.grad_y[begin + at]);
      const Compute<T> normed = upcast(call.x[begin + at]) * rstd;
      Compute<T> out = (grad * upcast(call.weight[at]) - normed * along) * rstd;
      if (kAdds) out += upcast(call.grad_residual[begin + at]);
      call.grad_x[begin + at] = narrow<T>(out);
      if (kNeedsWeight)  // always the same thread's column
        partial[at] = (row == blockIdx.x ? 0 : partial[at]) + grad * normed;
    }
  }
  if (kNeedsWeight) finish_column_sum<1>(call.partials, call.columns, call.grad_weight);
}

}  // namespace mmalign
