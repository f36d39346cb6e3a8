// Products of small matrices in registers: c = a b, or c += a b, b read in whole vectors.
#pragma once

#include <algorithm>

#include "vector.h"

namespace mmalign {

// A matrix of row stride `stride`.
struct Matrix {
  float* at;
  int64_t stride;

  float* row(int64_t index) const { return at + index * stride; }
  Matrix from(int64_t index) const { return {row(index), stride}; }
};

namespace detail {

// Sums of kRows rows and kVectors vectors of columns stay in registers over the whole depth.
template <bool kTransposed, int kRows, int kVectors>
void tile(const float* a, int64_t a_stride, const float* b, int64_t b_stride, float* c,
          int64_t c_stride, int depth, bool accumulate) {
  Vector sums[kRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      sums[r][v] = accumulate ? load(c + r * c_stride + v * kLanes) : Vector{};
    }
  }
  for (int k = 0; k < depth; ++k) {
    Vector columns[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) columns[v] = load(b + k * b_stride + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Vector x = broadcast(kTransposed ? a[k * a_stride + r] : a[r * a_stride + k]);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sums[r][v] += x * columns[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) store(c + r * c_stride + v * kLanes, sums[r][v]);
  }
}

using Tile = void (*)(const float*, int64_t, const float*, int64_t, float*, int64_t, int, bool);

template <bool kTransposed, int... kIndex>
Tile choose_tile(int rows, int vectors, std::integer_sequence<int, kIndex...>) {
  static constexpr Tile kTiles[] = {
      tile<kTransposed, kIndex / kVectorsPerTile + 1, kIndex % kVectorsPerTile + 1>...};
  return kTiles[(rows - 1) * kVectorsPerTile + vectors - 1];
}

}  // namespace detail

// c (rows, vectors * kLanes) = or += a (rows, depth) b (depth, vectors * kLanes). kTransposed: a is
// (depth, rows).
template <bool kTransposed>
void product(Matrix a, Matrix b, Matrix c, int rows, int vectors, int depth, bool accumulate) {
  using Shapes = std::make_integer_sequence<int, kRowsPerTile * kVectorsPerTile>;
  for (int v = 0; v < vectors; v += kVectorsPerTile) {
    const int num_vectors = std::min(kVectorsPerTile, vectors - v);
    for (int r = 0; r < rows; r += kRowsPerTile) {
      const int num_rows = std::min(kRowsPerTile, rows - r);
      detail::choose_tile<kTransposed>(num_rows, num_vectors, Shapes{})(
          kTransposed ? a.at + r : a.row(r), a.stride, b.at + v * kLanes, b.stride,
          c.row(r) + v * kLanes, c.stride, depth, accumulate);
    }
  }
}

// function(first row, number of rows) for rows that one tile computes together.
template <class Function>
void for_row_groups(int rows, const Function& function) {
  for (int i = 0; i < rows; i += kRowsPerTile) function(i, std::min(kRowsPerTile, rows - i));
}

}  // namespace mmalign
