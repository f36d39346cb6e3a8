// How threads share the rows of a matrix: a row belongs to blockDim.x neighbours (whole warps),
// each of which holds up to kVectors of its vectors in registers: i * blockDim.x + threadIdx.x.
// Several narrow rows share a block (blockDim.y).
#pragma once

#include "common.cuh"

namespace mmalign {

// Types whose rows are held in registers.
template <class T>
constexpr bool holds_rows = sizeof(T) <= 4;

// Whether these rows can be, 128 bits at a time; others take the loops of rms_norm_any.cuh.
// Columns: whole vectors, at most 16384 of bf16 or 8192 of fp32.
template <class T>
bool fits_registers(int64_t columns) {
  constexpr int kLanes = Vector<T>::kLanes;
  return columns % kLanes == 0 && columns / kLanes <= kVectors * kMaxRowThreads;
}

template <class T>
dim3 row_block(int64_t columns) {
  const RowThreads threads = row_threads(columns, Vector<T>::kLanes);
  return dim3(threads.per_row, threads.rows);
}

// The sum over a row's threads, in every one of them. `workspace` holds two numbers per warp of the
// block; `parity` alternates from call to call, so one barrier per call is enough: who writes a
// half again has passed the barrier of the call between, and so has everybody who read that half.
template <class T>
__device__ __forceinline__ T row_sum(T x, T* workspace, int parity) {
  x = warp_sum(x);
  if (blockDim.x == kWarp) return x;
  const int warps_per_row = blockDim.x / kWarp;
  T* half = workspace + parity * (warps_per_row * blockDim.y);
  T* mine = half + threadIdx.y * warps_per_row;
  if (threadIdx.x % kWarp == 0) mine[threadIdx.x / kWarp] = x;
  __syncthreads();
  T sum = mine[0];
  for (int warp = 1; warp < warps_per_row; ++warp) sum += mine[warp];
  return sum;
}

}  // namespace mmalign
