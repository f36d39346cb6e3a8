// What forward and backward rotary attention share: heads of a sample as dense tiles, and work.
#pragma once

#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#include "tile_product.h"

namespace mmalign {

constexpr int kBlock = 144;  // queries or keys of a tile: a multiple of rows and lanes of products
constexpr int kBlockVectors = kBlock / kLanes;

constexpr int kChunk = 4 * kBlock;  // queries of a work item
constexpr int kRowsAhead = 8;

inline int ceil_div(int64_t a, int b) { return static_cast<int>((a + b - 1) / b); }

// The packed projection: q, then k, then v, each heads by head_dim.
struct Attention {
  const float* qkv;            // (total_tokens, (heads + 2 * key_value_heads) * head_dim)
  const float* cos;            // (max_positions, head_dim / 2); null: no rotation
  const float* sin;
  const int32_t* position_ids;  // (total_tokens,)
  const int32_t* cu_seqlens;    // (num_samples + 1,)
  int num_samples, num_heads, num_key_value_heads, head_dim;
  bool causal;

  int columns() const { return (num_heads + 2 * num_key_value_heads) * head_dim; }
  int group() const { return num_heads / num_key_value_heads; }
  int vectors() const { return ceil_div(head_dim, kLanes); }
  int padded_dim() const { return vectors() * kLanes; }
  // Rows of the projection from a token on, beginning at a column.
  Matrix rows(int64_t token, int column) const {
    return {const_cast<float*>(qkv) + token * columns() + column, columns()};
  }
  float scale() const { return 1.0f / std::sqrt(static_cast<float>(head_dim)); }
  int64_t begin(int sample) const { return cu_seqlens[sample]; }
  int length(int sample) const { return cu_seqlens[sample + 1] - cu_seqlens[sample]; }
};

// Memory of one thread, 64-byte aligned and kept between calls.
class Scratch {
 public:
  // Room for `count` floats, beginning anew.
  void reserve(size_t count) {
    if (count + 16 > size_) {
      memory_ = std::make_unique<float[]>(count + 16);
      size_ = count + 16;
    }
    const auto address = reinterpret_cast<uintptr_t>(memory_.get());
    next_ = reinterpret_cast<float*>((address + 63) / 64 * 64);
  }
  Matrix take(int64_t rows, int64_t stride) {
    const Matrix matrix{next_, stride};
    next_ += (rows * stride + 15) / 16 * 16;
    return matrix;
  }

 private:
  std::unique_ptr<float[]> memory_;
  size_t size_ = 0;
  float* next_ = nullptr;
};

// Rows of one head lie a whole projection apart, where the hardware's prefetcher does not follow.
inline void prefetch_row(const float* row, int count) {
  for (int i = 0; i < count; i += 16) __builtin_prefetch(row + i);
}

// to = scale * (x rotated by its position); inverse: by its negative. Columns i and i + half of a
// head are rotated together.
inline void rotate_row(const Attention& call, int64_t token, const float* x, float* to, float scale,
                       bool inverse) {
  const int half = call.head_dim / 2;
  if (call.cos == nullptr) {
    for (int i = 0; i < call.head_dim; ++i) to[i] = scale * x[i];
    return;
  }
  const int64_t at = static_cast<int64_t>(call.position_ids[token]) * half;
  const float *cos = call.cos + at, *sin = call.sin + at;
  const float sign = inverse ? -scale : scale;
#pragma GCC ivdep
  for (int i = 0; i < half; ++i) {
    const float first = x[i], second = x[i + half], c = scale * cos[i], s = sign * sin[i];
    to[i] = first * c - second * s;
    to[i + half] = second * c + first * s;
  }
}

// Rows of one head, rotated and padded with zeros to whole vectors.
inline void gather_rotated(const Attention& call, int64_t token, int column, int rows, float scale,
                           Matrix to) {
  for (int row = 0; row < rows; ++row) {
    const float* x = call.qkv + (token + row) * call.columns() + column;
    if (row + kRowsAhead < rows) prefetch_row(x + kRowsAhead * call.columns(), call.head_dim);
    rotate_row(call, token + row, x, to.row(row), scale, false);
    std::fill(to.row(row) + call.head_dim, to.row(row) + to.stride, 0.0f);
  }
}

// Rows padded with zeros to whole vectors.
inline void copy_rows(Matrix from, int rows, int columns, Matrix to) {
  for (int row = 0; row < rows; ++row) {
    if (row + kRowsAhead < rows) prefetch_row(from.row(row + kRowsAhead), columns);
    std::memcpy(to.row(row), from.row(row), columns * sizeof(float));
    std::fill(to.row(row) + columns, to.row(row) + to.stride, 0.0f);
  }
}

// to (columns, kBlock) = from (rows, columns) transposed; both padded to whole vectors.
inline void transpose_block(Matrix from, int rows, int vectors, Matrix to) {
  for (int r = 0; r < rows; r += kLanes) {
    for (int v = 0; v < vectors; ++v) {
      Vector square[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        square[i] = r + i < rows ? load(from.row(r + i) + v * kLanes) : Vector{};
      }
      transpose(square);
      for (int i = 0; i < kLanes; ++i) store(to.row(v * kLanes + i) + r, square[i]);
    }
  }
}

// How many of a block's keys a query sees.
inline int visible_keys(bool causal, int query, int first_key, int num_keys) {
  return causal ? std::min(num_keys, query - first_key + 1) : num_keys;
}

}  // namespace mmalign
