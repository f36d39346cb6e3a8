// The first warpgroup of an attention block: one thread loads, three warps rotate queries.
//
// The states of a query slot are full (loaded, with its work item), rotated, empty; those of a
// stage of keys or of values full, empty. `Machine`: attention_block.h.
#pragma once

#include "attention_tiles.h"

namespace mmalign {

// The same for all threads of all blocks.
struct AttentionCall {
  const ScheduledSample* table;  // (num_samples + 1,)
  const float* cos;              // (max_positions, head_dim / 2)
  const float* sin;
  const int* position_ids;  // (num_tokens,)
  void* out;                // (num_tokens, num_heads * head_dim)
  float* logsumexp;         // (num_tokens, num_heads)
  int* counter;             // of items, zero at first
  AttentionShape shape;
  int num_tokens, num_samples;
  float scale;  // log2(e) / sqrt(head_dim)
  bool causal;

  HOST_DEVICE int key_head(int head) const {
    return head / (shape.num_heads / shape.num_key_heads);
  }
};

// -- one thread loads

template <int kHeadDim, class Machine>
KERNEL_CODE void fetch_tile(Machine& m, Tensors tensor, int barrier, int to, int column, int row) {
  using Shared = AttentionShared<kHeadDim>;
  m.expect(barrier, Shared::kTileBytes);
  UNROLL
  for (int box = 0; box < Shared::kBoxes; ++box)
    m.load_box(tensor, barrier, to + box * Shared::kBoxBytes, column + box * kBoxColumns, row);
}

// The next item's queries, and their work item; queries: slots filled so far.
template <int kHeadDim, class Machine>
KERNEL_CODE AttentionWork fetch_query(Machine& m, const AttentionCall& call, int& place,
                                      Ring<kQuerySlots>& queries) {
  using Shared = AttentionShared<kHeadDim>;
  const int slot = queries.stage();
  const AttentionWork work = work_of_item(call.table, call.num_samples, call.shape, call.causal,
                                          m.take_item(call.counter), place);
  m.wait(Shared::query_empty(slot), queries.empty());
  *m.template at<AttentionWork>(Shared::work(slot)) = work;
  if (work.num_key_tiles)
    fetch_tile<kHeadDim>(m, Tensors::kProjection, Shared::query_full(slot), Shared::query(slot),
                         work.head * kHeadDim, work.first_row + work.tile * kQueryRows);
  else
    m.arrive(Shared::query_full(slot));
  ++queries.count;
  return work;
}

template <int kHeadDim, class Machine>
KERNEL_CODE void fetch(Machine& m, const AttentionCall& call) {
  using Shared = AttentionShared<kHeadDim>;
  Ring<kQuerySlots> queries;
  Ring<Shared::kStages> keys, values;
  int place = 0;
  AttentionWork work = fetch_query<kHeadDim>(m, call, place, queries);
  while (work.num_key_tiles) {
    const int key_head = call.key_head(work.head);
    const int value_column =
        (call.shape.num_heads + call.shape.num_key_heads + key_head) * kHeadDim;
    AttentionWork next = {};
    for (int i = 0; i <= work.num_key_tiles; ++i) {  // keys i, then values i - 1
      const int row = work.first_row + (work.num_key_tiles - 1 - i) * kKeyRows;
      if (i < work.num_key_tiles) {
        m.wait(Shared::keys_empty(keys.stage()), keys.empty());
        fetch_tile<kHeadDim>(m, Tensors::kRotated, Shared::keys_full(keys.stage()),
                             Shared::keys(keys.stage()), key_head * kHeadDim, row);
        ++keys.count;
      }
      if (i > 0) {
        m.wait(Shared::values_empty(values.stage()), values.empty());
        fetch_tile<kHeadDim>(m, Tensors::kProjection, Shared::values_full(values.stage()),
                             Shared::values(values.stage()), value_column, row + kKeyRows);
        ++values.count;
      }
      // By now the queries before these are read, or soon will be: their slot is the next one's.
      if (i == 1) next = fetch_query<kHeadDim>(m, call, place, queries);
    }
    work = next;
  }
}

// -- three warps rotate queries

template <int kHeadDim, class Machine>
KERNEL_CODE void rotate_tile(Machine& m, const AttentionCall& call, const AttentionWork& work,
                           int tile, int warp) {
  using Shared = AttentionShared<kHeadDim>;
  constexpr int kChunks = kHeadDim / 16;               // of half a row
  constexpr int kRows = 32 / kChunks;                  // of a warp
  constexpr int kBatch = 4, kStep = kRotatingWarps * kRows;  // rows whose angles are in flight
  const int chunk = m.lane() % kChunks;
  const int first_token = work.first_row + work.tile * kQueryRows;
  for (int row = warp * kRows + m.lane() / kChunks; row < kQueryRows; row += kBatch * kStep) {
    Angles cos[kBatch], sin[kBatch];
    UNROLL
    for (int i = 0; i < kBatch; ++i) {
      const int token = first_token + row + i * kStep;
      const int position = token < call.num_tokens ? m.load_index(call.position_ids + token) : 0;
      const int64_t angle = static_cast<int64_t>(position) * (kHeadDim / 2) + chunk * 8;
      cos[i] = m.load_angles(call.cos + angle);
      sin[i] = m.load_angles(call.sin + angle);
    }
    UNROLL
    for (int i = 0; i < kBatch; ++i) {
      const int at = row + i * kStep;
      // Not a return: behind one the compiler would wait to load the angles of later rows.
      if (at >= kQueryRows) continue;
      Chunk* first = m.template at<Chunk>(tile + Shared::chunk_at(at, chunk));
      Chunk* second = m.template at<Chunk>(tile + Shared::chunk_at(at, chunk + kChunks));
      Chunk x = *first, y = *second;
      rotate_chunks<typename Machine::Element>(x, y, cos[i], sin[i]);
      *first = x;
      *second = y;
    }
  }
}

template <int kHeadDim, class Machine>
KERNEL_CODE void rotate_queries(Machine& m, const AttentionCall& call, int warp) {
  using Shared = AttentionShared<kHeadDim>;
  for (Ring<kQuerySlots> queries;; ++queries.count) {
    const int slot = queries.stage();
    m.wait(Shared::query_full(slot), queries.full());
    const AttentionWork work = *m.template at<AttentionWork>(Shared::work(slot));
    if (work.num_key_tiles) rotate_tile<kHeadDim>(m, call, work, Shared::query(slot), warp);
    m.writes_to_async();
    m.warp_arrive(Shared::query_rotated(slot));
    if (!work.num_key_tiles) return;
  }
}

}  // namespace mmalign
