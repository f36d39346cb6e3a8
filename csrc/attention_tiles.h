// Tiles of the attention kernel: their places in shared memory, which keys a query attends to, the
// running softmax and the rotation. Everything is the code of one thread.
#pragma once

#include <cmath>

#include "attention_schedule.h"
#include "matrix_layout.h"

// Code of a kernel's thread, which the host also runs (host/attention_machine.h).
#ifdef __CUDACC__
#define KERNEL_CODE __device__ __forceinline__
#define UNROLL _Pragma("unroll")
#else
#define KERNEL_CODE inline
#define UNROLL
#endif

namespace mmalign {

enum class Tensors { kProjection, kRotated, kGradOut };  // that a block fetches from

constexpr int kQuerySlots = 2;   // tiles of queries: one in use, one in flight
constexpr int kMatrixWarps = 8;  // two warpgroups of 64 queries each
constexpr int kRotatingWarps = 3;
constexpr int kBoxColumns = kSwizzleBytes / 2;  // of 16-bit elements of a row per copy

// Shared memory of a block, from a multiple of 1024 bytes. A tile of 128 columns is two boxes.
template <int kHeadDim>
struct AttentionShared {
  static constexpr int kStages = 256 / kHeadDim;  // tiles of keys, and as many of values
  static constexpr int kBoxes = kHeadDim / kBoxColumns;
  static constexpr int kBoxBytes = kKeyRows * kSwizzleBytes;
  static constexpr int kTileBytes = kBoxes * kBoxBytes;

  static constexpr HOST_DEVICE int query(int slot) { return slot * kTileBytes; }
  static constexpr HOST_DEVICE int keys(int stage) { return (kQuerySlots + stage) * kTileBytes; }
  static constexpr HOST_DEVICE int values(int stage) { return keys(kStages + stage); }
  static constexpr HOST_DEVICE int work(int slot) {
    return values(kStages) + slot * static_cast<int>(sizeof(AttentionWork));
  }
  static constexpr int kBarriersAt = values(kStages) + 64;
  static constexpr int kBytes = kBarriersAt + (3 * kQuerySlots + 4 * kStages) * 8;

  // Numbers of barriers. A slot of queries: arrived, rotated, read. A stage: arrived, read.
  static constexpr HOST_DEVICE int query_full(int slot) { return slot; }
  static constexpr HOST_DEVICE int query_rotated(int slot) { return kQuerySlots + slot; }
  static constexpr HOST_DEVICE int query_empty(int slot) { return 2 * kQuerySlots + slot; }
  static constexpr HOST_DEVICE int keys_full(int stage) { return 3 * kQuerySlots + stage; }
  static constexpr HOST_DEVICE int keys_empty(int stage) { return keys_full(kStages + stage); }
  static constexpr HOST_DEVICE int values_full(int stage) { return keys_full(2 * kStages + stage); }
  static constexpr HOST_DEVICE int values_empty(int stage) {
    return keys_full(3 * kStages + stage);
  }
  static constexpr int kBarriers = 3 * kQuerySlots + 4 * kStages;

  static constexpr HOST_DEVICE int arrivals(int barrier) {
    return barrier < query_rotated(0)   ? 1
           : barrier < query_empty(0)  ? kRotatingWarps
           : barrier < keys_full(0)    ? kMatrixWarps
           : barrier < keys_empty(0)   ? 1
           : barrier < values_full(0)  ? kMatrixWarps
           : barrier < values_empty(0) ? 1
                                       : kMatrixWarps;
  }

  // The 16 bytes of columns 8 * chunk .. 8 * chunk + 7 of a tile's row.
  static HOST_DEVICE int chunk_at(int row, int chunk) {
    constexpr int kChunks = kSwizzleBytes / 16;
    return chunk / kChunks * kBoxBytes + static_cast<int>(swizzled(row, chunk % kChunks * 16));
  }
};

// A ring's stage and the parity of its barriers after `count` uses.
template <int kSize>
struct Ring {
  uint32_t count = 0;
  HOST_DEVICE int stage() const { return count % kSize; }
  HOST_DEVICE uint32_t full() const { return count / kSize % 2; }
  HOST_DEVICE uint32_t empty() const { return full() ^ 1; }  // a new barrier does not block
};

// Number of columns of a tile of keys that a query attends to, from the first.
HOST_DEVICE int visible_keys(const AttentionWork& work, bool causal, int row, int key_tile) {
  const int past_query = work.tile * kQueryRows + row + 1;
  const int end = causal && past_query < work.length ? past_query : work.length;
  return end - key_tile * kKeyRows;
}

template <int kCount>
KERNEL_CODE void hide_keys(float (&scores)[kCount], int thread, const int (&visible)[2]) {
  UNROLL
  for (int i = 0; i < kCount; ++i)
    if (accumulator_column(thread, i) >= visible[i / 2 % 2]) scores[i] = -INFINITY;
}

// The softmax of a thread's two rows so far: the largest score, and the sum of this thread's part.
struct RunningSoftmax {
  float peak[2] = {-INFINITY, -INFINITY};
  float total[2] = {0, 0};
};

template <int kCount>
KERNEL_CODE void raise_peaks(const float (&scores)[kCount], float (&peak)[2]) {
  UNROLL
  for (int i = 0; i < kCount; ++i) peak[i / 2 % 2] = fmaxf(peak[i / 2 % 2], scores[i]);
}

// scores become exp2(scale * (score - peak)); shrink: factor of the sums so far.
template <class Machine, int kCount>
KERNEL_CODE void take_powers(float (&scores)[kCount], float scale, const float (&peak)[2],
                             RunningSoftmax& softmax, float (&shrink)[2]) {
  float offset[2];
  UNROLL
  for (int half = 0; half < 2; ++half) {
    offset[half] = peak[half] * scale;
    shrink[half] = Machine::exp2(softmax.peak[half] * scale - offset[half]);
    softmax.total[half] *= shrink[half];
    softmax.peak[half] = peak[half];
  }
  UNROLL
  for (int i = 0; i < kCount; ++i) {
    scores[i] = Machine::exp2(scores[i] * scale - offset[i / 2 % 2]);
    softmax.total[i / 2 % 2] += scores[i];
  }
}

// Eight 16-bit elements.
struct alignas(16) Chunk {
  uint32_t words[4];
};

struct alignas(16) Angles {
  float values[8];
};

struct alignas(8) StatisticPair {
  float values[2];
};

// Columns i of the first half of a head are rotated together with columns i of the second.
template <class Element>
KERNEL_CODE void rotate_chunks(Chunk& first, Chunk& second, const Angles& cos, const Angles& sin) {
  UNROLL
  for (int i = 0; i < 4; ++i) {
    float x[2], y[2];
    Element::unpack(first.words[i], x);
    Element::unpack(second.words[i], y);
    const float c[2] = {cos.values[2 * i], cos.values[2 * i + 1]};
    const float s[2] = {sin.values[2 * i], sin.values[2 * i + 1]};
    first.words[i] = Element::pack(x[0] * c[0] - y[0] * s[0], x[1] * c[1] - y[1] * s[1]);
    second.words[i] = Element::pack(y[0] * c[0] + x[0] * s[0], y[1] * c[1] + x[1] * s[1]);
  }
}

}  // namespace mmalign
