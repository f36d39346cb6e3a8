// Rows of the packed sequence in the projector's kernel: arguments, positions of image rows, and
// the norm of text rows, one warp each.
#pragma once

#ifdef __CUDACC__  // or host/projector_machine.h
#include "hopper.cuh"
#endif
#include "projector_tiles.h"

namespace mmalign {

template <class T>
struct Projection {
  const T* text;         // (num_tokens, columns), hidden states as they come in
  const T* bias;         // (columns,)
  const T* norm_weight;  // (columns,)
  const void* positions;  // (num_images,) int64 or int32: packed rows of image rows
  T* new_hidden;         // (num_tokens, columns)
  T* normed;             // (num_tokens, columns)
  float* rstd;           // (num_tokens,)
  float eps, per_column;  // per_column: 1 / columns
  bool positions_are_wide;
  int num_images, num_tokens, columns, features, passes, mark_words;
};

// Eight values of a row, normalised.
template <class T>
__device__ __forceinline__ Packed normalized(const Packed& values, float factor,
                                             const Packed& weights) {
  const Vector<T> value = unpack<T>(values), weight = unpack<T>(weights);
  Vector<T> out;
#pragma unroll
  for (int i = 0; i < Vector<T>::kLanes; ++i)
    out.lanes[i] = narrow<T>(upcast(value.lanes[i]) * factor * upcast(weight.lanes[i]));
  return bits_as<Packed>(out);
}

// The packed row of an image row. One that lies outside the sequence ends the launch; an assert would
// say where, but is a call, and beside calls ptxas serialises the products of wgmma (C7510).
template <class T>
__device__ __forceinline__ int packed_row(const Projection<T>& call, int image) {
  const int64_t row = call.positions_are_wide
                          ? __ldg(static_cast<const int64_t*>(call.positions) + image)
                          : __ldg(static_cast<const int*>(call.positions) + image);
  if (row < 0 || row >= call.num_tokens) __trap();
  return static_cast<int>(row);
}

// Sets the bit of every image row among the rows dealt to this block; by num_threads threads. The
// positions need not rise, so each block reads them all, from L2.
template <class T>
__device__ __forceinline__ void mark_image_rows(const Projection<T>& call, uint32_t* marks,
                                                int thread, int num_threads) {
#pragma unroll 4
  for (int image = thread; image < call.num_images; image += num_threads) {
    const unsigned row = packed_row(call, image);
    const unsigned slot = row / gridDim.x;
    if (row - slot * gridDim.x == blockIdx.x) atomicOr(&marks[slot / 32], 1u << slot % 32);
  }
}

// rms_norm of one row by a warp, which copies it, too. A row is read twice, the second time from
// L1 or L2, so its length is any.
template <class T>
__device__ __forceinline__ void norm_text_row(const Projection<T>& call, int64_t row) {
  constexpr int kLanes = Vector<T>::kLanes, kStep = kWarp * kLanes, kBatch = 8;
  const int lane = threadIdx.x % kWarp * kLanes;
  const int64_t begin = row * call.columns;
  float squares = 0;
  for (int first = lane; first < call.columns; first += kBatch * kStep) {
    Packed values[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int at = first + i * kStep;
      values[i] = load_shared_by_all(call.text + begin + at, at < call.columns);
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const Vector<T> value = unpack<T>(values[i]);
#pragma unroll
      for (int j = 0; j < kLanes; ++j) squares += upcast(value.lanes[j]) * upcast(value.lanes[j]);
      const int at = first + i * kStep;
      if (at < call.columns) store(call.new_hidden + begin + at, values[i]);
    }
  }
  const float factor = rsqrtf(warp_sum(squares) * call.per_column + call.eps);
  if (threadIdx.x % kWarp == 0) call.rstd[row] = factor;
  for (int first = lane; first < call.columns; first += kBatch / 2 * kStep) {
    Packed values[kBatch / 2], weights[kBatch / 2];
#pragma unroll
    for (int i = 0; i < kBatch / 2; ++i) {
      const int at = first + i * kStep;
      values[i] = load_shared_by_all(call.text + begin + at, at < call.columns);
      weights[i] = load_shared_by_all(call.norm_weight + at, at < call.columns);
    }
#pragma unroll
    for (int i = 0; i < kBatch / 2; ++i) {
      const int at = first + i * kStep;
      if (at < call.columns)
        store(call.normed + begin + at, normalized<T>(values[i], factor, weights[i]));
    }
  }
}

// The text rows dealt to this block, by any warps that come; `taken` counts the rows.
template <class T>
__device__ __forceinline__ void norm_text_rows(const Projection<T>& call, const uint32_t* marks,
                                               unsigned* taken) {
  while (true) {
    unsigned slot = 0;
    if (threadIdx.x % kWarp == 0) slot = atomicAdd(taken, 1u);
    slot = __shfl_sync(0xffffffffu, slot, 0);
    const int64_t row = dealt_row(slot, blockIdx.x, gridDim.x);
    if (row >= call.num_tokens) return;
    if (!(marks[slot / 32] >> slot % 32 & 1)) norm_text_row(call, row);
  }
}

}  // namespace mmalign
