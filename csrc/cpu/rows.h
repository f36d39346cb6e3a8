// Rows of numbers, vector by vector, the end of a row in a part of one; and rows dealt to threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>

#include "vector.h"

namespace mmalign {

struct Whole {
  Vector load(const float* at) const { return mmalign::load(at); }
  void store(float* at, Vector x) const { mmalign::store(at, x); }
  Vector keep(Vector x) const { return x; }
};

struct Part {
  int64_t count;  // of lanes that exist; the others are read as 0
  Vector load(const float* at) const {
    Vector x{};
    std::memcpy(&x, at, count * sizeof(float));
    return x;
  }
  void store(float* at, Vector x) const { std::memcpy(at, &x, count * sizeof(float)); }
  Vector keep(Vector x) const {  // 0 in the lanes that do not exist
    return kIota < static_cast<int32_t>(count) ? x : Vector{};
  }
};

// function(column, Whole or Part) for all vectors of a row.
template <class Function>
inline void for_vectors(int64_t columns, const Function& function) {
  int64_t i = 0;
  for (; i + kLanes <= columns; i += kLanes) function(i, Whole{});
  if (i < columns) function(i, Part{columns - i});
}

// Sum of function(column, Whole or Part) over a row, whose lanes without a column must be 0.
template <class Function>
inline float sum_over(int64_t columns, const Function& function) {
  Vector sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= columns; i += 4 * kLanes) {
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) sums[k] += function(i + k * kLanes, Whole{});
  }
  for (; i + kLanes <= columns; i += kLanes) sums[0] += function(i, Whole{});
  if (i < columns) sums[1] += function(i, Part{columns - i});
  return sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// total (columns,): the sum of the rows of from (rows, columns).
inline void add_rows(const float* from, int64_t rows, int64_t columns, float* total) {
  std::fill_n(total, columns, 0.0f);
  for (int64_t row = 0; row < rows; ++row) {
    for_vectors(columns, [&](int64_t i, auto part) {
      part.store(total + i, part.load(total + i) + part.load(from + row * columns + i));
    });
  }
}

constexpr int64_t kNumbersPerThread = 1 << 14;  // fewer are not worth waking a thread

// function(first, last) for parts of 0 to count, whose items cost about `numbers` elements each.
template <class Function>
void share_rows(int64_t count, int64_t numbers, const Function& function) {
  const int64_t grain = std::max<int64_t>(1, kNumbersPerThread / std::max<int64_t>(1, numbers));
  torch::stable::parallel_for(0, count, grain, function);
}

}  // namespace mmalign
