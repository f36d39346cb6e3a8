// Tiles of the attention backward pass: their places in shared memory, and which pairs are visible.
//
// A block owns 128 queries or 128 keys, 64 for each of its two warpgroups, and streams tiles of 64
// of the other side. Both come in pairs: queries with the gradient of the output, keys with values.
#pragma once

#include "attention_tiles.h"

namespace mmalign {

enum class Gradient { kQueries, kKeys };  // what a block owns: whose gradient a kernel computes

constexpr int kGradientRows = kWarpgroupRows;  // of a tile
constexpr int kGradientSlots = 2;              // owned tiles: in use, and in flight
constexpr int kStatisticBytes = 2 * kGradientRows * 4;  // of passing queries: logsumexp, delta

// Shared memory of a block, from a multiple of 1024 bytes. A tile of 128 columns is two boxes.
template <int kHeadDim>
struct GradientShared {
  static constexpr int kStages = 384 / kHeadDim;  // pairs of passing tiles
  static constexpr int kBoxes = kHeadDim / kBoxColumns;
  static constexpr int kBoxBytes = kGradientRows * kSwizzleBytes;
  static constexpr int kTileBytes = kBoxes * kBoxBytes;

  // second: of the pair.
  static constexpr HOST_DEVICE int own(int slot, int second, int group) {
    return ((slot * 2 + second) * 2 + group) * kTileBytes;
  }
  static constexpr HOST_DEVICE int passing(int stage, int second) {
    return own(kGradientSlots, 0, 0) + (stage * 2 + second) * kTileBytes;
  }
  static constexpr HOST_DEVICE int statistics(int stage) {
    return passing(kStages, 0) + stage * kStatisticBytes;
  }
  static constexpr HOST_DEVICE int work(int slot) {
    return statistics(kStages) + slot * static_cast<int>(sizeof(AttentionWork));
  }
  static constexpr int kBarriersAt = statistics(kStages) + 64;
  static constexpr int kBarriers = 2 * kGradientSlots + 2 * kStages;
  static constexpr int kBytes = kBarriersAt + kBarriers * 8;

  // Numbers of barriers.
  static constexpr HOST_DEVICE int own_full(int slot) { return slot; }
  static constexpr HOST_DEVICE int own_empty(int slot) { return kGradientSlots + slot; }
  static constexpr HOST_DEVICE int full(int stage) { return 2 * kGradientSlots + stage; }
  static constexpr HOST_DEVICE int empty(int stage) { return full(kStages + stage); }

  // A warp brings the statistics of passing queries, so it takes part where keys are owned.
  static constexpr HOST_DEVICE int arrivals(Gradient of, int barrier) {
    const int statistics = of == Gradient::kKeys ? 1 : 0;
    return barrier < own_empty(0) ? 1
           : barrier < full(0)    ? kMatrixWarps + statistics
           : barrier < empty(0)   ? 1 + statistics
                                  : kMatrixWarps;
  }

  // The 16 bytes of columns 8 * chunk .. 8 * chunk + 7 of a tile's row.
  static HOST_DEVICE int chunk_at(int row, int chunk) {
    constexpr int kChunks = kSwizzleBytes / 16;
    return chunk / kChunks * kBoxBytes + static_cast<int>(swizzled(row, chunk % kChunks * 16));
  }
};

constexpr float kLog2E = 1.44269504088896341f;

// Of eight elements each.
template <class Element>
KERNEL_CODE float dot(const Chunk& x, const Chunk& y) {
  float sum = 0;
  UNROLL
  for (int i = 0; i < 4; ++i) {
    float a[2], b[2];
    Element::unpack(x.words[i], a);
    Element::unpack(y.words[i], b);
    sum += a[0] * b[0] + a[1] * b[1];
  }
  return sum;
}

// An item of a table whose items count heads of the owned rows; the most expensive of a sample
// first.
template <Gradient kOf>
HOST_DEVICE AttentionWork gradient_work(const ScheduledSample* table, int num_samples,
                                        const AttentionShape& shape, bool causal, int item,
                                        int& place) {
  if (kOf == Gradient::kQueries)
    return work_of_item(table, num_samples, shape, causal, item, place);
  const int group = shape.num_heads / shape.num_key_heads;  // all of them pass by
  const AttentionShape keys = {shape.num_key_heads, shape.num_key_heads, shape.head_dim * group};
  AttentionWork work = work_of_item(table, num_samples, keys, causal, item, place);
  if (causal) work.tile = ceil_div(work.length, kKeyRows) - 1 - work.tile;
  return work;
}

// Passing tiles first .. end - 1 of each of num_heads heads from first_head on.
struct PassingTiles {
  int first, end, first_head, num_heads;
};

template <Gradient kOf>
HOST_DEVICE PassingTiles passing_tiles(const AttentionWork& work, const AttentionShape& shape,
                                       bool causal) {
  const int group = shape.num_heads / shape.num_key_heads;
  const int tiles = ceil_div(work.length, kGradientRows), after = 2 * work.tile + 2;
  if (kOf == Gradient::kKeys)
    return {causal ? 2 * work.tile : 0, tiles, work.head * group, group};
  return {0, causal && after < tiles ? after : tiles, work.head / group, 1};
}

// What a warpgroup's own tile (the `own`-th of the sample) and a passing one have in common.
enum class Meeting { kNothing, kSome, kAll };

template <Gradient kOf>
HOST_DEVICE Meeting meeting(int own, int passing, int length, bool causal) {
  const int queries = kOf == Gradient::kQueries ? own : passing;
  const int keys = kOf == Gradient::kQueries ? passing : own;
  if (own * kGradientRows >= length || (causal && keys > queries)) return Meeting::kNothing;
  const bool ragged = kOf == Gradient::kQueries && (passing + 1) * kGradientRows > length;
  return ragged || (causal && keys == queries) ? Meeting::kSome : Meeting::kAll;
}

// Where a row of an own tile ends (queries) or begins (keys) to see columns of a passing tile.
// Passing queries past the sample's end need no bound: their logsumexp is infinite.
template <Gradient kOf>
HOST_DEVICE int bound_of_row(int row_of_sample, int passing, int length, bool causal) {
  if (kOf == Gradient::kKeys) return row_of_sample - passing * kGradientRows;
  const int end = causal && row_of_sample < length ? row_of_sample + 1 : length;
  return end - passing * kGradientRows;
}

// Powers of hidden pairs become zero.
template <Gradient kOf, int kCount>
KERNEL_CODE void hide_pairs(float (&powers)[kCount], int thread, const int (&bound)[2]) {
  UNROLL
  for (int i = 0; i < kCount; ++i) {
    const int column = accumulator_column(thread, i), limit = bound[i / 2 % 2];
    if (kOf == Gradient::kQueries ? column >= limit : column < limit) powers[i] = 0;
  }
}

}  // namespace mmalign
