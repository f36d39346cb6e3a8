// RMSNorm backward, plus the gradient of the residual stream.
//
//   dx = rstd * (w*dy - xhat * mean(w*dy*xhat)) + grad_residual,  xhat = x * rstd
//   dweight = sum over rows of dy * xhat
//
// Persistent blocks: each owns every num_blocks-th tile of rows. A thread copies its own vectors of
// the next tiles to shared memory (cp.async) while it processes one, and reads back only what it
// copied itself, so no barrier guards them; one barrier per tile completes the row sums. dweight
// stays in registers until the block ends; column_partials.cuh finishes it in the same launch. With
// a frozen weight none of that is compiled.
//
// Bytes per row of H columns of b bytes: 3bH, with grad_residual 4bH; rstd 4. dweight: 4H per block
// and row of its tile, written once and read once.
// Not measured on a GPU yet.
#include "arguments.h"
#include "device.h"
#include "ops.h"
#include "rms_norm_any.cuh"

#include <algorithm>

namespace mmalign {
namespace {

__device__ __forceinline__ void wait_for_oldest(int stages) {
  if (stages == 3) copy_async_wait<2>();
  if (stages == 2) copy_async_wait<1>();
  if (stages == 1) copy_async_wait<0>();
}

// The dynamic shared memory: [stage][tensor][vector][thread], every slot one thread's own.
template <class T, bool kAdds>
struct Tiles {
  static constexpr int kTensors = kAdds ? 3 : 2;
  Packed* memory;

  __device__ __forceinline__ Packed* slot(int stage, int tensor, int i) const {
    const int num_threads = blockDim.x * blockDim.y;
    const int thread = threadIdx.y * blockDim.x + threadIdx.x;
    return memory + ((stage * kTensors + tensor) * kVectors + i) * num_threads + thread;
  }

  // Starts the copies of this thread's vectors of a tile; a tile past the end copies nothing, but
  // counts as a group.
  __device__ __forceinline__ void send(const RmsNormBackward<T>& call, int64_t tile,
                                       int stage) const {
    const int64_t row = tile * blockDim.y + threadIdx.y;
    const int end = row < call.num_rows ? call.columns : 0;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int at = (i * blockDim.x + threadIdx.x) * Vector<T>::kLanes;
      if (at >= end) continue;
      const int64_t element = row * call.columns + at;
      copy_async(slot(stage, 0, i), call.grad_y + element);
      copy_async(slot(stage, 1, i), call.x + element);
      if (kAdds) copy_async(slot(stage, 2, i), call.grad_residual + element);
    }
    copy_async_commit();
  }
};

// This thread's part of the row's sum of w * dy * x.
template <class T, bool kAdds>
__device__ __forceinline__ Compute<T> along_row(const Tiles<T, kAdds>& tiles, int stage,
                                             const Packed (&weights)[kVectors], int end) {
  constexpr int kLanes = Vector<T>::kLanes;
  Compute<T> sum = 0;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    if ((i * blockDim.x + threadIdx.x) * kLanes >= end) continue;
    const Vector<T> grads = unpack<T>(*tiles.slot(stage, 0, i));
    const Vector<T> values = unpack<T>(*tiles.slot(stage, 1, i));
    const Vector<T> scales = unpack<T>(weights[i]);
#pragma unroll
    for (int lane = 0; lane < kLanes; ++lane)
      sum += upcast(grads.lanes[lane]) * upcast(scales.lanes[lane]) * upcast(values.lanes[lane]);
  }
  return sum;
}

// dx of a row, and what it adds to dweight. The row is read again: shared memory has the workspace
// that registers lack.
template <class T, bool kAdds, bool kNeedsWeight>
__device__ __forceinline__ void finish_row(
    const Tiles<T, kAdds>& tiles, int stage, const Packed (&weights)[kVectors], int end,
    Compute<T> rstd, Compute<T> along, T* grad_x,
    Compute<T> (&grad_weight)[kVectors][Vector<T>::kLanes]) {
  constexpr int kLanes = Vector<T>::kLanes;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int at = (i * blockDim.x + threadIdx.x) * kLanes;
    if (at >= end) continue;
    const Vector<T> grads = unpack<T>(*tiles.slot(stage, 0, i));
    const Vector<T> values = unpack<T>(*tiles.slot(stage, 1, i));
    const Vector<T> added = kAdds ? unpack<T>(*tiles.slot(stage, 2, i)) : Vector<T>();
    const Vector<T> scales = unpack<T>(weights[i]);
    Vector<T> out;
#pragma unroll
    for (int lane = 0; lane < kLanes; ++lane) {
      const Compute<T> grad = upcast(grads.lanes[lane]), normed = upcast(values.lanes[lane]) * rstd;
      if (kNeedsWeight) grad_weight[i][lane] += grad * normed;
      Compute<T> moved = (grad * upcast(scales.lanes[lane]) - normed * along) * rstd;
      if (kAdds) moved += upcast(added.lanes[lane]);
      out.lanes[lane] = narrow<T>(moved);
    }
    store(grad_x + at, bits_as<Packed>(out));
  }
}

template <class T>
__device__ __forceinline__ void write_partial(
    float* partial, int columns, const float (&grad_weight)[kVectors][Vector<T>::kLanes]) {
  constexpr int kLanes = Vector<T>::kLanes;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int at = (i * blockDim.x + threadIdx.x) * kLanes;
    if (at >= columns) continue;
#pragma unroll
    for (int lane = 0; lane < kLanes; lane += 4) {
      const float* four = &grad_weight[i][lane];
      *reinterpret_cast<float4*>(partial + at + lane) =
          make_float4(four[0], four[1], four[2], four[3]);
    }
  }
}

template <class T, bool kAdds, bool kNeedsWeight>
__global__ void __launch_bounds__(kMaxRowThreads)
    rms_norm_bwd_kernel(const __grid_constant__ RmsNormBackward<T> call, int stages) {
  constexpr int kLanes = Vector<T>::kLanes;
  extern __shared__ Packed dynamic_memory[];
  __shared__ Compute<T> workspace[2 * kMaxRowThreads / kWarp];
  const Tiles<T, kAdds> tiles{dynamic_memory};
  const int columns = call.columns;
  const int num_tiles = (call.num_rows + blockDim.y - 1) / blockDim.y;

  for (int stage = 0; stage < stages; ++stage)
    tiles.send(call, blockIdx.x + static_cast<int64_t>(stage) * gridDim.x, stage);
  Packed weights[kVectors];
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int at = (i * blockDim.x + threadIdx.x) * kLanes;
    weights[i] = load_shared_by_all(call.weight + at, at < columns);
  }
  Compute<T> grad_weight[kVectors][kLanes] = {};
  const auto rstd_of = [&](int64_t tile) {
    const int64_t row = tile * blockDim.y + threadIdx.y;
    return row < call.num_rows ? __ldg(call.rstd + row) : Compute<T>(0);
  };
  Compute<T> next_rstd = rstd_of(blockIdx.x);
  int stage = 0, parity = 0;
  for (int64_t tile = blockIdx.x; tile < num_tiles; tile += gridDim.x, parity ^= 1) {
    const int64_t row = tile * blockDim.y + threadIdx.y;
    const int end = row < call.num_rows ? columns : 0;  // rows past the last join the barrier
    const Compute<T> rstd = next_rstd;
    next_rstd = rstd_of(tile + gridDim.x);
    wait_for_oldest(stages);
    const Compute<T> sum = row_sum(along_row(tiles, stage, weights, end), workspace, parity);
    finish_row<T, kAdds, kNeedsWeight>(tiles, stage, weights, end, rstd, sum * rstd / columns,
                                       call.grad_x + row * columns, grad_weight);
    tiles.send(call, tile + static_cast<int64_t>(stages) * gridDim.x, stage);
    stage = stage + 1 == stages ? 0 : stage + 1;
  }
  if (!kNeedsWeight) return;
  const int64_t partial_row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  write_partial<T>(call.partials.rows + partial_row * columns, columns, grad_weight);
  finish_column_sum<4>(call.partials, columns, call.grad_weight);
}

struct Backward {
  const Tensor& grad_y;
  const std::optional<Tensor>& grad_residual;
  const Tensor &x, &weight, &rstd;
  Tensor grad_x, grad_weight, counters;
};

// Workspace for the partial rows of a grid; returns the tensor that keeps it alive during the
// launch.
template <class T>
Tensor make_partials(const Backward& call, RmsNormBackward<T>& launch, int grid, int tile_rows) {
  const int64_t rows = static_cast<int64_t>(grid) * tile_rows, columns = launch.columns;
  const Tensor workspace = torch::stable::new_empty(
      call.x, {rows + num_teams(grid), columns}, compute_dtype(call.x));
  auto* memory = static_cast<Compute<T>*>(workspace.data_ptr());
  launch.partials = {memory, memory + rows * columns,
                     static_cast<unsigned*>(call.counters.data_ptr())};
  return workspace;
}

// Blocks of a persistent grid: as many as are resident at once, at most one for each tile, and
// no more than the counters of column_partials.cuh reach.
template <class Kernel>
int persistent_grid(Kernel kernel, int num_threads, size_t shared_bytes, int64_t num_tiles) {
  const int64_t resident = static_cast<int64_t>(num_multiprocessors()) *
                           blocks_per_multiprocessor(kernel, num_threads, shared_bytes);
  if (resident == 0) throw std::runtime_error("rms_norm_bwd: a block does not fit this device");
  return static_cast<int>(
      std::min({num_tiles, resident, static_cast<int64_t>(kMaxCounters - 1) * kTeam}));
}

template <class T, bool kAdds, bool kNeedsWeight>
void launch_vectors(const Backward& call, RmsNormBackward<T>& launch) {
  const auto kernel = rms_norm_bwd_kernel<T, kAdds, kNeedsWeight>;
  const dim3 block = row_block<T>(launch.columns);
  constexpr int kTensors = Tiles<T, kAdds>::kTensors;
  const int num_threads = block.x * block.y;
  const int stages = choose_stages(kTensors, num_threads,
                                   device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor),
                                   device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin));
  const size_t shared_bytes = stages_bytes(stages, kTensors, num_threads);
  allow_shared(kernel, shared_bytes);
  const int64_t num_tiles = ceil_div<int64_t>(launch.num_rows, block.y);
  const int grid = persistent_grid(kernel, num_threads, shared_bytes, num_tiles);
  std::optional<Tensor> workspace;
  if (kNeedsWeight) workspace = make_partials(call, launch, grid, block.y);
  kernel<<<grid, block, shared_bytes, current_stream(call.x)>>>(launch, stages);
}

template <class T, bool kAdds, bool kNeedsWeight>
void launch_any(const Backward& call, RmsNormBackward<T>& launch) {
  const auto kernel = rms_norm_bwd_any_kernel<T, kAdds, kNeedsWeight>;
  const int grid = persistent_grid(kernel, kAnyThreads, 0, launch.num_rows);
  std::optional<Tensor> workspace;
  if (kNeedsWeight) workspace = make_partials(call, launch, grid, 1);
  kernel<<<grid, kAnyThreads, 0, current_stream(call.x)>>>(launch);
}

template <class T, bool kAdds, bool kNeedsWeight>
void launch(const Backward& call) {
  RmsNormBackward<T> launch = {};
  launch.grad_y = static_cast<const T*>(call.grad_y.data_ptr());
  if (kAdds) launch.grad_residual = static_cast<const T*>(call.grad_residual->data_ptr());
  launch.x = static_cast<const T*>(call.x.data_ptr());
  launch.weight = static_cast<const T*>(call.weight.data_ptr());
  launch.rstd = static_cast<const Compute<T>*>(call.rstd.data_ptr());
  launch.grad_x = static_cast<T*>(call.grad_x.data_ptr());
  if (kNeedsWeight) launch.grad_weight = static_cast<T*>(call.grad_weight.data_ptr());
  launch.num_rows = static_cast<int>(call.x.size(0));
  launch.columns = static_cast<int>(call.x.size(1));
  if constexpr (holds_rows<T>) {
    if (fits_registers<T>(launch.columns) &&
        aligned_to_16(launch.grad_y, launch.grad_residual, launch.x, launch.weight, launch.grad_x))
      return launch_vectors<T, kAdds, kNeedsWeight>(call, launch);
  }
  launch_any<T, kAdds, kNeedsWeight>(call, launch);
}

template <class T>
void launch(const Backward& call, bool needs_weight) {
  if (call.grad_residual)
    needs_weight ? launch<T, true, true>(call) : launch<T, true, false>(call);
  else
    needs_weight ? launch<T, false, true>(call) : launch<T, false, false>(call);
}

void check(const Backward& call) {
  constexpr const char* kName = "rms_norm_bwd";
  const auto type = call.x.scalar_type();
  const int64_t rows = call.x.size(0), columns = call.x.dim() == 2 ? call.x.size(1) : 0;
  const std::initializer_list<int64_t> shape = {rows, columns};
  const Argument x(kName, "x", call.x), grad_y(kName, "grad_y", call.grad_y),
      weight(kName, "weight", call.weight), rstd(kName, "rstd", call.rstd),
      counters(kName, "counters", call.counters);
  x.rank(2).floating().contiguous().below_2_31("rows", rows).below_2_31("columns", columns);
  grad_y.shaped(shape, "x").typed({type}).contiguous();
  weight.shaped({columns}, "x").typed({type}).contiguous();
  rstd.shaped({rows, 1}, "x").typed({compute_dtype(call.x)}).contiguous();
  counters.shaped({kMaxCounters}, "the kernel's teams").typed({ScalarType::Int}).contiguous();
  if (call.grad_residual) {
    const Argument grad_residual(kName, "grad_residual", *call.grad_residual);
    grad_residual.shaped(shape, "x").typed({type}).contiguous();
    grad_residual.beside(x);
  }
  x.on_gpu();
  grad_y.beside(x);
  weight.beside(x);
  rstd.beside(x);
  counters.beside(x);
}

}  // namespace

std::tuple<Tensor, Tensor> rms_norm_bwd(const Tensor& grad_y,
                                        const std::optional<Tensor>& grad_residual,
                                        const Tensor& x, const Tensor& weight, const Tensor& rstd,
                                        bool needs_weight, Tensor counters) {
  Backward call{grad_y, grad_residual, x, weight, rstd, x, weight, counters};
  check(call);
  call.grad_x = torch::stable::empty_like(x);
  const bool sums = needs_weight && x.numel();
  call.grad_weight = sums ? torch::stable::new_empty(weight, {weight.numel()})
                          : torch::stable::new_zeros(weight, {needs_weight ? weight.numel() : 0});
  if (x.numel() == 0) return {call.grad_x, call.grad_weight};
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  with_float_type(x.scalar_type(),
                  [&](auto zero) { launch<decltype(zero)>(call, needs_weight); });
  check_cuda(cudaGetLastError(), "rms_norm_bwd");
  return {call.grad_x, call.grad_weight};
}

}  // namespace mmalign
