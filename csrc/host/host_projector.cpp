// The projector's plan, shared memory and maps of threads, for the tests. Loops stand for threads.
#include "../projector_tiles.h"

using namespace mmalign;

#define EXPORT extern "C" __attribute__((visibility("default")))

// plan: columns of a tile, blocks of the cluster, passes
EXPORT void host_projector_plan(int columns, int* plan) {
  const ProjectorPlan found = projector_plan(columns);
  plan[0] = found.tile_columns, plan[1] = found.cluster, plan[2] = found.passes;
}

EXPORT int host_projector_first_column(int tile_columns, int cluster, int rank, int pass) {
  return first_column(tile_columns, cluster, rank, pass);
}

// Begin of each region, and the end: stages, sums, bias, norm weight, barriers, marks.
EXPORT void host_projector_regions(int tile_columns, int cluster, int passes, int mark_words,
                                   int* regions) {
  const ProjectorShared layout = {tile_columns, cluster, passes, mark_words};
  const int found[] = {0,
                       layout.sums(),
                       layout.bias(),
                       layout.norm_weight(),
                       layout.barriers(),
                       layout.marks(),
                       layout.bytes()};
  for (int i = 0; i < 7; ++i) regions[i] = found[i];
}

// places: where a stage's weight lies, then each block's slice of the features; descriptors (2, 4):
// of a warpgroup's features and of the weight, for 16 features each.
EXPORT void host_projector_stage(int tile_columns, int cluster, int stage, int group, uint32_t base,
                                 int* places, uint64_t* descriptors) {
  const ProjectorShared layout = {tile_columns, cluster, 1, 0};
  places[0] = layout.weight(stage);
  for (int rank = 0; rank < cluster; ++rank) places[1 + rank] = layout.slice(stage, rank);
  for (int part = 0; part < 4; ++part) {
    descriptors[part] = features_operand(layout, base, stage, group, part);
    descriptors[4 + part] = weight_operand(layout, base, stage, part);
  }
}

// words (128, tile_columns / 4): two neighbouring columns each, as the threads of a warpgroup hold
// their accumulators once they are rounded; rows (64, tile_columns / 2): as they are stored.
EXPORT void host_projector_rows(const uint32_t* words, int tile_columns, uint32_t* rows) {
  const int held = tile_columns / 4;
  for (int first = 0; first < kWarpgroup; first += 4)  // four threads of a row
    for (int group = 0; group < tile_columns / 32; ++group)
      for (int half = 0; half < 2; ++half) {
        uint32_t quad[4][4], sent[4];
        for (int q = 0; q < 4; ++q)
          for (int j = 0; j < 4; ++j)
            quad[q][j] = words[(first + q) * held + ((group * 4 + j) * 4 + 2 * half) / 2];
        for (int i = 0; i < 4; ++i) {
          const int round = 1 + i / 2, pair = i % 2;
          for (int q = 0; q < 4; ++q) sent[q] = transpose_sends(quad[q], q, round, pair);
          for (int q = 0; q < 4; ++q) transpose_takes(quad[q], q, round, pair, sent[q ^ round]);
        }
        for (int q = 0; q < 4; ++q) {
          const int row = accumulator_row(first + q, 2 * half);
          const int column = vector_column(first + q, group);
          for (int j = 0; j < 4; ++j) rows[(row * tile_columns + column) / 2 + j] = quad[q][j];
        }
      }
}

// Row and column of a thread's accumulators (128, num, 2).
EXPORT void host_accumulators(int num, int* places) {
  for (int thread = 0; thread < kWarpgroup; ++thread)
    for (int i = 0; i < num; ++i) {
      *places++ = accumulator_row(thread, i);
      *places++ = accumulator_column(thread, i);
    }
}

EXPORT int64_t host_dealt_row(int64_t slot, int64_t block, int64_t num_blocks) {
  return dealt_row(slot, block, num_blocks);
}
