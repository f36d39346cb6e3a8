// The tiling of the projector's product: plan, shared memory, transposition.
//
// A cluster owns row blocks of 128 image rows and all their columns: tile pass * cluster + rank of
// a row block belongs to its block rank, in the order of passes. Two warpgroups own 64 rows each.
#pragma once

#include <initializer_list>

#include "matrix_layout.h"

namespace mmalign {

constexpr int kTileRows = 128;
constexpr int kTileDepth = 64;     // features in a stage: one row of 128 bytes
constexpr int kStages = 4;         // a power of two
constexpr int kMaxCluster = 8;     // what every GPU with clusters can run
constexpr int kConsumers = 2;      // warpgroups that multiply
constexpr int kWideTile = 256, kNarrowTile = 224;  // columns; 3,200 are 15 of the narrow ones
constexpr int kMaxColumns = 16384;
constexpr int kMaxMarkWords = 2048;  // of 32 packed rows each, in a block

struct ProjectorPlan {
  int tile_columns, cluster, passes;
  int num_columns() const { return tile_columns * cluster * passes; }
};

// The fewest wasted tile columns, then the wider tile; at most as many blocks as tiles.
inline ProjectorPlan projector_plan(int columns) {
  ProjectorPlan best = {};
  for (const int tile : {kWideTile, kNarrowTile}) {
    const int tiles = ceil_div(columns, tile);
    int cluster = kMaxCluster;
    while (cluster / 2 >= tiles) cluster /= 2;
    const ProjectorPlan plan = {tile, cluster, ceil_div(tiles, cluster)};
    if (!best.passes || plan.num_columns() < best.num_columns()) best = plan;
  }
  return best;
}

HOST_DEVICE int first_column(int tile_columns, int cluster, int rank, int pass) {
  return (pass * cluster + rank) * tile_columns;
}

// Bytes in a block's shared memory, from a multiple of 1024.
struct ProjectorShared {
  int tile_columns, cluster, passes, mark_words;

  HOST_DEVICE int stage_bytes() const { return (kTileRows + tile_columns) * kSwizzleBytes; }
  HOST_DEVICE int features(int stage) const { return stage * stage_bytes(); }
  HOST_DEVICE int weight(int stage) const { return features(stage) + kTileRows * kSwizzleBytes; }
  // the rows of the features that one block fetches for all of its cluster
  HOST_DEVICE int slice_rows() const { return kTileRows / cluster; }
  HOST_DEVICE int slice(int stage, int rank) const {
    return features(stage) + rank * slice_rows() * kSwizzleBytes;
  }
  // float2 [2][kConsumers][cluster][32]: sums of squares of rows r and r + 8
  HOST_DEVICE int sums() const { return features(kStages); }
  // of 16 bits each, [passes][tile_columns]
  HOST_DEVICE int bias() const { return sums() + 2 * kConsumers * cluster * 32 * 8; }
  HOST_DEVICE int norm_weight() const { return bias() + passes * tile_columns * 2; }
  // uint64 full [kStages], empty [kStages], sums [2][kConsumers], marks
  HOST_DEVICE int barriers() const { return norm_weight() + passes * tile_columns * 2; }
  HOST_DEVICE int marks() const { return barriers() + (2 * kStages + 2 * kConsumers + 2) * 8; }
  HOST_DEVICE int bytes() const { return marks() + mark_words * 4; }
};

// Operands of a warpgroup in a stage, 16 of its features; base: address of the shared memory.
HOST_DEVICE uint64_t features_operand(const ProjectorShared& layout, uint32_t base, int stage,
                                      int group, int part) {
  const int rows = group * kWarpgroupRows * kSwizzleBytes;
  return advance(matrix_descriptor(base + layout.features(stage) + rows, kPatternBytes), part * 32);
}
HOST_DEVICE uint64_t weight_operand(const ProjectorShared& layout, uint32_t base, int stage,
                                    int part) {
  return advance(matrix_descriptor(base + layout.weight(stage), kPatternBytes), part * 32);
}

// Four threads of a row hold two columns each of four groups of eight; afterwards thread q of them
// holds all eight columns of group q. Two rounds, round 1 with the neighbour q ^ 1, round 2 with
// q ^ 2; in each, twice: what a thread sends, and where it puts what comes.
HOST_DEVICE uint32_t transpose_sends(const uint32_t (&words)[4], int q, int round, int pair) {
  const int low = round == 1 ? 2 * pair : pair;
  return q & round ? words[low] : words[low | round];
}
HOST_DEVICE void transpose_takes(uint32_t (&words)[4], int q, int round, int pair, uint32_t word) {
  const int low = round == 1 ? 2 * pair : pair;
  if (q & round) words[low] = word; else words[low | round] = word;
}

// The first of a thread's eight columns of a tile, after the transposition of 32 of them.
HOST_DEVICE int vector_column(int thread, int group) { return group * 32 + thread % 4 * 8; }

// Packed rows are dealt out to the blocks in turn: row r is the r / num_blocks-th of its block.
HOST_DEVICE int64_t dealt_row(int64_t slot, int64_t block, int64_t num_blocks) {
  return slot * num_blocks + block;
}

}  // namespace mmalign
