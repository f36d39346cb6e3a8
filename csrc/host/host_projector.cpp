// The projector's kernel on the host, thread by thread; and its plan, shared memory and maps of
// threads, where loops stand for threads.
#include <cstdio>

#include "projector_machine.h"

#include "../projector_product.cuh"

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

template <int N>
static void project(Projection<Bf16> call, const uint16_t* features, const uint16_t* weight,
                    int cluster, int clusters, uint32_t seed) {
  const HostTensor rows = {features, call.num_images, call.features, kTileRows / cluster};
  const HostTensor columns = {weight, call.columns, call.features, N};
  call.mark_words = ceil_div(ceil_div(call.num_tokens, cluster * clusters), 32);
  const ProjectorShared layout = {N, cluster, call.passes, call.mark_words};
  for (int index = 0; index < clusters; ++index) {
    HostCluster host(cluster, kThreads, layout.bytes(), index, clusters, seed + index);
    host.run([&](char* shared) { run_block<Bf16, N>(call, shared, &rows, &columns); });
  }
}

// Bits of bf16; plan (4,): columns of a tile, blocks of a cluster, passes, clusters. Returns 0, or 1
// where threads waited for each other.
EXPORT int host_project(const uint16_t* features, const uint16_t* weight, const uint16_t* bias,
                        const uint16_t* text, const int64_t* positions, const uint16_t* norm_weight,
                        int num_images, int num_features, int num_tokens, int num_columns,
                        const int* plan, float eps, uint32_t seed, uint16_t* new_hidden,
                        uint16_t* normed, float* rstd) {
  const auto values = [](auto* bits) { return reinterpret_cast<const Bf16*>(bits); };
  Projection<Bf16> call = {values(text), values(bias), values(norm_weight), positions,
                           reinterpret_cast<Bf16*>(new_hidden), reinterpret_cast<Bf16*>(normed),
                           rstd, eps, 1.0f / num_columns, true, num_images, num_tokens,
                           num_columns, num_features, plan[2], 0};
  try {
    plan[0] == kWideTile ? project<kWideTile>(call, features, weight, plan[1], plan[3], seed)
                         : project<kNarrowTile>(call, features, weight, plan[1], plan[3], seed);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "host_project: %s\n", error.what());
    return 1;
  }
  return 0;
}
