// RMSNorm of rows that rms_norm.cu and rms_norm_backward.cu do not hold in registers: odd numbers
// of columns, rows that start anywhere, very wide ones, fp64. A block walks along a row twice, one
// element a thread; the second walk finds the row in L2.
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
                            Wide<T>* __restrict__ rstd,      // (num_rows,)
                            int columns, Wide<T> eps) {
  __shared__ Wide<T> room[2 * kAnyThreads / kWarp];
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * columns;
  const T* normed = kAdds ? new_residual + begin : x + begin;
  Wide<T> squares = 0;
  for (int at = threadIdx.x; at < columns; at += kAnyThreads) {
    if (kAdds)
      new_residual[begin + at] = narrow<T>(wide(x[begin + at]) + wide(residual[begin + at]));
    squares += wide(normed[at]) * wide(normed[at]);
  }
  const Wide<T> factor = reciprocal_root(row_sum(squares, room, 0) / columns + eps);
  if (threadIdx.x == 0) rstd[blockIdx.x] = factor;
  for (int at = threadIdx.x; at < columns; at += kAnyThreads)
    y[begin + at] = narrow<T>(wide(normed[at]) * factor * wide(weight[at]));
}

// The arguments of a backward launch.
template <class T>
struct RmsNormBackward {
  const T* grad_y;         // (num_rows, columns)
  const T* grad_residual;  // like grad_y, or unused
  const T* x;
  const T* weight;         // (columns,)
  const Wide<T>* rstd;     // (num_rows,)
  T* grad_x;
  T* grad_weight;          // (columns,), or unused
  ColumnPartials<Wide<T>> partials;
  int num_rows, columns;
};

template <class T, bool kAdds, bool kNeedsWeight>
__global__ void __launch_bounds__(kAnyThreads)
    rms_norm_bwd_any_kernel(const __grid_constant__ RmsNormBackward<T> call) {
  __shared__ Wide<T> room[2 * kAnyThreads / kWarp];
  Wide<T>* partial = call.partials.rows + static_cast<int64_t>(blockIdx.x) * call.columns;
  int parity = 0;
  for (int64_t row = blockIdx.x; row < call.num_rows; row += gridDim.x, parity ^= 1) {
    const int64_t begin = row * call.columns;
    const Wide<T> rstd = call.rstd[row];
    Wide<T> sum = 0;
    for (int at = threadIdx.x; at < call.columns; at += kAnyThreads)
      sum += wide(call.grad_y[begin + at]) * wide(call.weight[at]) * wide(call.x[begin + at]);
    const Wide<T> along = row_sum(sum, room, parity) * rstd / call.columns;
    for (int at = threadIdx.x; at < call.columns; at += kAnyThreads) {
      const Wide<T> grad = wide(call.grad_y[begin + at]);
      const Wide<T> normed = wide(call.x[begin + at]) * rstd;
      Wide<T> out = (grad * wide(call.weight[at]) - normed * along) * rstd;
      if (kAdds) out += wide(call.grad_residual[begin + at]);
      call.grad_x[begin + at] = narrow<T>(out);
      if (kNeedsWeight)  // always the same thread's column
        partial[at] = (row == blockIdx.x ? 0 : partial[at]) + grad * normed;
    }
  }
  if (kNeedsWeight) finish_column_sum<1>(call.partials, call.columns, call.grad_weight);
}

}  // namespace mmalign
