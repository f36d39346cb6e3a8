// Products of the attention kernels, 64 rows per warpgroup, and their epilogues. `Machine`:
// attention_block.h.
#pragma once

#include "attention_tiles.h"

namespace mmalign {

// sums = a * b^T, not waited for: 64 rows of a tile, and all of one, of kHeadDim columns each.
template <int kHeadDim, int kBoxBytes, class Machine, int kCount>
KERNEL_CODE void multiply_rows(Machine& m, int a, int b, float (&sums)[kCount]) {
  const uint64_t left = matrix_descriptor(m.address(a), kPatternBytes);
  const uint64_t right = matrix_descriptor(m.address(b), kPatternBytes);
  m.fence(sums);
  UNROLL
  for (int step = 0; step < kHeadDim / 16; ++step) {
    const int bytes = step / 4 * kBoxBytes + step % 4 * 32;
    m.multiply(sums, advance(left, bytes), advance(right, bytes), step > 0);
  }
  m.commit();
}

// sums += a * b, not waited for: a packed in registers, b a tile with a row for each column of a.
template <int kBoxBytes, class Machine, int kSteps, int kCount>
KERNEL_CODE void multiply_columns(Machine& m, uint32_t (&a)[kSteps][4], int b,
                                  float (&sums)[kCount]) {
  const uint64_t right = matrix_descriptor(m.address(b), kPatternBytes, kBoxBytes);
  m.fence(sums, a);
  UNROLL
  for (int step = 0; step < kSteps; ++step)
    m.multiply_transposed(sums, a[step], advance(right, step * 16 * kSwizzleBytes));
  m.commit();
}

// Accumulators as a left operand.
template <class Machine, int kCount>
KERNEL_CODE void pack(const float (&sums)[kCount], uint32_t (&packed)[kCount / 8][4]) {
  UNROLL
  for (int i = 0; i < kCount / 2; ++i)
    packed[i / 4][i % 4] = Machine::Element::pack(sums[2 * i], sums[2 * i + 1]);
}

// Rows of a tile past the sample's end are another's: 0 * NaN would be NaN. Both warpgroups write
// the same zeros, so that neither waits for the other.
template <class Shared, class Machine>
KERNEL_CODE void clear_rows(Machine& m, int tile, int num_rows) {
  constexpr int kChunks = Shared::kTileBytes / Shared::kBoxBytes * (kSwizzleBytes / 16);
  constexpr int kRows = Shared::kBoxBytes / kSwizzleBytes;
  for (int i = num_rows * kChunks + m.thread(); i < kRows * kChunks; i += kWarpgroup)
    *m.template at<Chunk>(tile + Shared::chunk_at(i / kChunks, i % kChunks)) = {};
  m.writes_to_async();
  m.group_sync();
}

// Four threads of a row come with two columns each of four chunks, and leave with a chunk each.
template <class Machine>
KERNEL_CODE void gather_chunk(Machine& m, Chunk& chunk, int lane) {
  UNROLL
  for (int with = 1; with <= 2; with *= 2) {
    const bool upper = lane & with;
    UNROLL
    for (int pair = 0; pair < 2; ++pair) {
      const int low = with == 1 ? 2 * pair : pair, high = low + with;
      const uint32_t came = m.quad_exchange(upper ? chunk.words[low] : chunk.words[high], with);
      if (upper)
        chunk.words[low] = came;
      else
        chunk.words[high] = came;
    }
  }
}

// factor * a thread's part of a row, to elements from `element` on.
template <int kHeadDim, class Machine>
KERNEL_CODE void write_row(Machine& m, void* to, int64_t element, bool inside, int half,
                           float factor, const float (&tile)[kHeadDim / 2]) {
  const int lane = m.thread() % 4;
  UNROLL
  for (int group = 0; group < kHeadDim / 32; ++group) {
    Chunk chunk;
    UNROLL
    for (int j = 0; j < 4; ++j) {
      const int i = (group * 4 + j) * 4 + 2 * half;
      chunk.words[j] = Machine::Element::pack(tile[i] * factor, tile[i + 1] * factor);
    }
    gather_chunk(m, chunk, lane);
    if (inside) m.store_chunk(to, element + group * 32 + lane * 8, chunk);
  }
}

}  // namespace mmalign
