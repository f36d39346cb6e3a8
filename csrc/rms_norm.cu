// RMSNorm forward, alone or after the residual addition.
//
//   new_residual = x + residual, rounded to the dtype of x
//   rstd = 1 / sqrt(mean(x^2) + eps);  y = x * rstd * weight     (fp32; fp64 for fp64)
//
// A row stays in the registers of its threads: read once, written once. Eight blocks of 128
// threads, with the addition six, are resident per multiprocessor, so 64 KiB or more are in flight
// while some of them sum. The weight stays in L1; rows bypass it. With the addition in 16 bits ptxas
// asks for the second half of a row only once the first has come.
//
// Bytes per row of H columns of b bytes: 2bH, with the addition 4bH; rstd 4.
// Not measured on a GPU yet.
#include "arguments.h"
#include "device.h"
#include "ops.h"
#include "rms_norm_any.cuh"
#include "row_tile.cuh"

namespace mmalign {
namespace {

template <class T, bool kAdds>
__global__ void __launch_bounds__(kMaxRowThreads)
    rms_norm_fwd_kernel(const T* __restrict__ x,            // (num_rows, columns)
                        const T* __restrict__ residual,     // like x, or unused
                        const T* __restrict__ weight,       // (columns,)
                        T* __restrict__ y, T* __restrict__ new_residual,
                        Compute<T>* __restrict__ rstd,         // (num_rows,)
                        int num_rows, int columns, Compute<T> eps) {
  constexpr int kLanes = Vector<T>::kLanes;
  __shared__ Compute<T> workspace[2 * kMaxRowThreads / kWarp];
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  const int64_t begin = row * columns;
  const int end = row < num_rows ? columns : 0;  // threads past the last row join the barrier

  Packed values[kVectors], added[kVectors], scales[kVectors];
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int at = (i * blockDim.x + threadIdx.x) * kLanes;
    values[i] = load_streaming(x + begin + at, at < end);
    if (kAdds) added[i] = load_streaming(residual + begin + at, at < end);
    scales[i] = load_shared_by_all(weight + at, at < end);
  }
  Compute<T> squares = 0;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int at = (i * blockDim.x + threadIdx.x) * kLanes;
    Vector<T> value = unpack<T>(values[i]);
    const Vector<T> other = kAdds ? unpack<T>(added[i]) : value;
#pragma unroll
    for (int lane = 0; lane < kLanes; ++lane) {
      if (kAdds)
        value.lanes[lane] = narrow<T>(upcast(value.lanes[lane]) + upcast(other.lanes[lane]));
      squares += upcast(value.lanes[lane]) * upcast(value.lanes[lane]);
    }
    values[i] = bits_as<Packed>(value);
    if (kAdds && at < end) store(new_residual + begin + at, values[i]);
  }
  const Compute<T> factor = reciprocal_root(row_sum(squares, workspace, 0) / columns + eps);
  if (threadIdx.x == 0 && row < num_rows) rstd[row] = factor;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int at = (i * blockDim.x + threadIdx.x) * kLanes;
    if (at >= end) continue;
    const Vector<T> value = unpack<T>(values[i]), scale = unpack<T>(scales[i]);
    Vector<T> out;
#pragma unroll
    for (int lane = 0; lane < kLanes; ++lane)
      out.lanes[lane] = narrow<T>(upcast(value.lanes[lane]) * factor * upcast(scale.lanes[lane]));
    store(y + begin + at, bits_as<Packed>(out));
  }
}

struct Forward {
  const Tensor &x, &weight;
  const Tensor* residual;  // or null
  Tensor y, new_residual, rstd;
  double eps;
};

template <class T, bool kAdds>
void launch(const Forward& call) {
  const auto num_rows = static_cast<int>(call.x.size(0));
  const auto columns = static_cast<int>(call.x.size(1));
  const auto* x = static_cast<const T*>(call.x.data_ptr());
  const auto* residual = kAdds ? static_cast<const T*>(call.residual->data_ptr()) : nullptr;
  const auto* weight = static_cast<const T*>(call.weight.data_ptr());
  auto* y = static_cast<T*>(call.y.data_ptr());
  auto* new_residual = kAdds ? static_cast<T*>(call.new_residual.data_ptr()) : nullptr;
  auto* rstd = static_cast<Compute<T>*>(call.rstd.data_ptr());
  const auto eps = static_cast<Compute<T>>(call.eps);
  const cudaStream_t stream = current_stream(call.x);
  if constexpr (holds_rows<T>) {
    if (fits_registers<T>(columns) && aligned_to_16(x, residual, weight, y, new_residual)) {
      const dim3 block = row_block<T>(columns);
      rms_norm_fwd_kernel<T, kAdds><<<ceil_div<unsigned>(num_rows, block.y), block, 0, stream>>>(
          x, residual, weight, y, new_residual, rstd, num_rows, columns, eps);
      return;
    }
  }
  rms_norm_fwd_any_kernel<T, kAdds><<<num_rows, kAnyThreads, 0, stream>>>(
      x, residual, weight, y, new_residual, rstd, columns, eps);
}

template <bool kAdds>
void forward(const Forward& call) {
  if (call.x.numel() == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(call.x.get_device_index());
  with_float_type(call.x.scalar_type(), [&](auto zero) { launch<decltype(zero), kAdds>(call); });
  check_cuda(cudaGetLastError(), kAdds ? "add_rms_norm_fwd" : "rms_norm_fwd");
}

void check_x_and_weight(const char* operation, const Tensor& x, const Tensor& weight) {
  const Argument first(operation, "x", x), second(operation, "weight", weight);
  first.rank(2).floating().contiguous();
  first.below_2_31("rows", x.size(0)).below_2_31("columns", x.size(1));
  second.shaped({x.size(1)}, "x").typed({x.scalar_type()}).contiguous();
}

Tensor statistics(const Tensor& x) {
  return torch::stable::new_empty(x, {x.size(0), 1}, compute_dtype(x));
}

}  // namespace

std::tuple<Tensor, Tensor> rms_norm_fwd(const Tensor& x, const Tensor& weight, double eps) {
  check_x_and_weight("rms_norm_fwd", x, weight);
  const Argument first("rms_norm_fwd", "x", x);
  first.on_gpu();
  Argument("rms_norm_fwd", "weight", weight).beside(first);
  const Forward call{x, weight, nullptr, torch::stable::empty_like(x), x, statistics(x), eps};
  forward<false>(call);
  return {call.y, call.rstd};
}

std::tuple<Tensor, Tensor, Tensor> add_rms_norm_fwd(const Tensor& x, const Tensor& residual,
                                                    const Tensor& weight, double eps) {
  constexpr const char* kName = "add_rms_norm_fwd";
  check_x_and_weight(kName, x, weight);
  const Argument first(kName, "x", x), second(kName, "residual", residual);
  second.shaped({x.size(0), x.size(1)}, "x").typed({x.scalar_type()}).contiguous();
  first.on_gpu();
  second.beside(first);
  Argument(kName, "weight", weight).beside(first);
  const Forward call{x,  weight, &residual, torch::stable::empty_like(x),
                     torch::stable::empty_like(x), statistics(x), eps};
  forward<true>(call);
  return {call.y, call.new_residual, call.rstd};
}

}  // namespace mmalign
