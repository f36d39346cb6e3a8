// What the threads of an attention block do: one fetches, three warps turn queries, two warpgroups
// multiply. `Machine` is Hopper (rotary_attention.cu) or the host program that stands for it.
//
// A query slot goes round as full (fetched, with the work it belongs to), turned, empty; a stage of
// keys or of values as full, empty. Both warpgroups walk through the same tiles of keys, from the
// last, the only one with hidden keys, to the first. Each issues its next product with keys and its
// last one with values together, and the other warpgroup's turn comes while it takes the softmax.
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

enum class Tensors { kProjection, kTurnedKeys };

// -- one thread fetches

template <int kHeadDim, class Machine>
KERNEL_CODE void fetch_tile(Machine& m, Tensors tensor, int barrier, int to, int column, int row) {
  using Shared = AttentionShared<kHeadDim>;
  m.expect(barrier, Shared::kTileBytes);
  UNROLL
  for (int box = 0; box < Shared::kBoxes; ++box)
    m.load_box(tensor, barrier, to + box * Shared::kBoxBytes, column + box * kBoxColumns, row);
}

// The next item's queries, and the work beside them; queries: slots filled so far.
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
        fetch_tile<kHeadDim>(m, Tensors::kTurnedKeys, Shared::keys_full(keys.stage()),
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

// -- three warps turn queries

template <int kHeadDim, class Machine>
KERNEL_CODE void turn_tile(Machine& m, const AttentionCall& call, const AttentionWork& work,
                           int tile, int warp) {
  using Shared = AttentionShared<kHeadDim>;
  constexpr int kChunks = kHeadDim / 16;               // of half a row
  constexpr int kRows = 32 / kChunks;                  // of a warp
  constexpr int kBatch = 2, kStep = kTurningWarps * kRows;  // angles on their way
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
      if (row + i * kStep >= kQueryRows) return;
      Chunk* first = m.template at<Chunk>(tile + Shared::chunk_at(row + i * kStep, chunk));
      Chunk* second = m.template at<Chunk>(tile + Shared::chunk_at(row + i * kStep, chunk + kChunks));
      Chunk x = *first, y = *second;
      turn_chunks<typename Machine::Element>(x, y, cos[i], sin[i]);
      *first = x;
      *second = y;
    }
  }
}

template <int kHeadDim, class Machine>
KERNEL_CODE void turn_queries(Machine& m, const AttentionCall& call, int warp) {
  using Shared = AttentionShared<kHeadDim>;
  for (Ring<kQuerySlots> queries;; ++queries.count) {
    const int slot = queries.stage();
    m.wait(Shared::query_full(slot), queries.full());
    const AttentionWork work = *m.template at<AttentionWork>(Shared::work(slot));
    if (work.num_key_tiles) turn_tile<kHeadDim>(m, call, work, Shared::query(slot), warp);
    m.writes_to_async();
    m.warp_arrive(Shared::query_turned(slot));
    if (!work.num_key_tiles) return;
  }
}

// -- two warpgroups multiply, 64 queries each

// scores = queries * keys^T, not waited for.
template <int kHeadDim, class Machine>
KERNEL_CODE void multiply_keys(Machine& m, int query, int keys, float (&scores)[kKeyRows / 2]) {
  using Shared = AttentionShared<kHeadDim>;
  const uint64_t a = matrix_descriptor(
      m.address(query + m.group() * kWarpgroupRows * kSwizzleBytes), kPatternBytes);
  const uint64_t b = matrix_descriptor(m.address(keys), kPatternBytes);
  m.fence(scores);
  UNROLL
  for (int step = 0; step < kHeadDim / 16; ++step) {
    const int bytes = step / 4 * Shared::kBoxBytes + step % 4 * 32;
    m.multiply(scores, advance(a, bytes), advance(b, bytes), step > 0);
  }
  m.commit();
}

// out += probabilities * values, not waited for.
template <int kHeadDim, class Machine>
KERNEL_CODE void multiply_values(Machine& m, uint32_t (&probabilities)[kKeyRows / 16][4],
                                 int values, float (&out)[kHeadDim / 2]) {
  const uint64_t b =
      matrix_descriptor(m.address(values), kPatternBytes, AttentionShared<kHeadDim>::kBoxBytes);
  m.fence(out, probabilities);
  UNROLL
  for (int step = 0; step < kKeyRows / 16; ++step)
    m.multiply_transposed(out, probabilities[step], advance(b, step * 16 * kSwizzleBytes));
  m.commit();
}

template <class Machine>
KERNEL_CODE void pack(const float (&scores)[kKeyRows / 2],
                      uint32_t (&probabilities)[kKeyRows / 16][4]) {
  UNROLL
  for (int i = 0; i < kKeyRows / 4; ++i)
    probabilities[i / 4][i % 4] = Machine::Element::pack(scores[2 * i], scores[2 * i + 1]);
}

// Rows of values past the sample's end are another's: 0 * NaN would be NaN. Both warpgroups write
// the same zeros, so that neither waits for the other.
template <int kHeadDim, class Machine>
KERNEL_CODE void clear_values(Machine& m, int values, int num_rows) {
  using Shared = AttentionShared<kHeadDim>;
  constexpr int kChunks = kHeadDim / 8;
  for (int i = num_rows * kChunks + m.thread(); i < kKeyRows * kChunks; i += kWarpgroup)
    *m.template at<Chunk>(values + Shared::chunk_at(i / kChunks, i % kChunks)) = {};
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

// out / total and log(total) + peak of the rows inside the sample.
template <int kHeadDim, class Machine>
KERNEL_CODE void write_rows(Machine& m, const AttentionCall& call, const AttentionWork& work,
                            const RunningSoftmax& softmax, const float (&out)[kHeadDim / 2]) {
  constexpr float kLn2 = 0.693147180559945309f;
  const int lane = m.thread() % 4;
  UNROLL
  for (int half = 0; half < 2; ++half) {
    const float total = m.quad_sum(softmax.total[half]);
    const float factor = 1.0f / total;
    const int query = work.tile * kQueryRows + m.group() * kWarpgroupRows +
                      accumulator_row(m.thread(), 2 * half);
    const bool inside = query < work.length;
    const int64_t row =
        (static_cast<int64_t>(work.first_row) + query) * call.shape.num_heads + work.head;
    if (inside && lane == 0)
      call.logsumexp[row] = (softmax.peak[half] * call.scale + Machine::log2(total)) * kLn2;
    UNROLL
    for (int group = 0; group < kHeadDim / 32; ++group) {
      Chunk chunk;
      UNROLL
      for (int j = 0; j < 4; ++j) {
        const int i = (group * 4 + j) * 4 + 2 * half;
        chunk.words[j] = Machine::Element::pack(out[i] * factor, out[i + 1] * factor);
      }
      gather_chunk(m, chunk, lane);
      if (inside) m.store_chunk(call.out, row * kHeadDim + group * 32 + lane * 8, chunk);
    }
  }
}

template <int kHeadDim>
struct MatrixRings {
  Ring<kQuerySlots> queries;
  Ring<AttentionShared<kHeadDim>::kStages> keys, values;
};

// Softmax of a tile of scores; shrink: of what came before.
template <class Machine>
KERNEL_CODE void take_scores(Machine& m, float scale, float (&scores)[kKeyRows / 2],
                             RunningSoftmax& softmax, float (&shrink)[2]) {
  float peak[2] = {softmax.peak[0], softmax.peak[1]};
  raise_peaks(scores, peak);
  UNROLL
  for (int half = 0; half < 2; ++half) peak[half] = m.quad_max(peak[half]);
  take_powers<Machine>(scores, scale, peak, softmax, shrink);
}

template <int kHeadDim, class Machine>
KERNEL_CODE void attend(Machine& m, const AttentionCall& call, const AttentionWork& work,
                        MatrixRings<kHeadDim>& rings) {
  using Shared = AttentionShared<kHeadDim>;
  const int slot = rings.queries.stage(), last = work.num_key_tiles - 1;
  float out[kHeadDim / 2] = {}, scores[kKeyRows / 2] = {}, shrink[2];
  uint32_t probabilities[kKeyRows / 16][4];
  RunningSoftmax softmax;

  m.wait(Shared::keys_full(rings.keys.stage()), rings.keys.full());
  multiply_keys<kHeadDim>(m, Shared::query(slot), Shared::keys(rings.keys.stage()), scores);
  m.template wait_products<0>(scores);
  m.warp_arrive(Shared::keys_empty(rings.keys.stage()));
  ++rings.keys.count;
  int visible[2];
  UNROLL
  for (int half = 0; half < 2; ++half) {
    const int row = m.group() * kWarpgroupRows + accumulator_row(m.thread(), 2 * half);
    visible[half] = visible_keys(work, call.causal, row, last);
  }
  hide_keys(scores, m.thread(), visible);
  take_scores(m, call.scale, scores, softmax, shrink);
  pack<Machine>(scores, probabilities);
  const int rows_of_last = work.length - last * kKeyRows;
  for (int i = 0; i < last; ++i) {
    m.wait(Shared::keys_full(rings.keys.stage()), rings.keys.full());
    m.wait_turn();
    multiply_keys<kHeadDim>(m, Shared::query(slot), Shared::keys(rings.keys.stage()), scores);
    m.wait(Shared::values_full(rings.values.stage()), rings.values.full());
    if (i == 0 && rows_of_last < kKeyRows)
      clear_values<kHeadDim>(m, Shared::values(rings.values.stage()), rows_of_last);
    multiply_values<kHeadDim>(m, probabilities, Shared::values(rings.values.stage()), out);
    m.pass_turn();
    m.template wait_products<1>(scores);
    m.warp_arrive(Shared::keys_empty(rings.keys.stage()));
    ++rings.keys.count;
    take_scores(m, call.scale, scores, softmax, shrink);
    m.template wait_products<0>(out, probabilities);
    m.warp_arrive(Shared::values_empty(rings.values.stage()));
    ++rings.values.count;
    UNROLL
    for (int j = 0; j < kHeadDim / 2; ++j) out[j] *= shrink[j / 2 % 2];
    pack<Machine>(scores, probabilities);
  }
  m.warp_arrive(Shared::query_empty(slot));
  m.wait(Shared::values_full(rings.values.stage()), rings.values.full());
  if (last == 0 && rows_of_last < kKeyRows)
    clear_values<kHeadDim>(m, Shared::values(rings.values.stage()), rows_of_last);
  multiply_values<kHeadDim>(m, probabilities, Shared::values(rings.values.stage()), out);
  m.template wait_products<0>(out, probabilities);
  m.warp_arrive(Shared::values_empty(rings.values.stage()));
  ++rings.values.count;
  write_rows<kHeadDim>(m, call, work, softmax, out);
}

template <int kHeadDim, class Machine>
KERNEL_CODE void attend_to_all(Machine& m, const AttentionCall& call) {
  using Shared = AttentionShared<kHeadDim>;
  MatrixRings<kHeadDim> rings;
  if (m.group() == 1) m.pass_turn();  // the first turn is the other's
  for (;; ++rings.queries.count) {
    const int slot = rings.queries.stage();
    m.wait(Shared::query_turned(slot), rings.queries.full());
    const AttentionWork work = *m.template at<AttentionWork>(Shared::work(slot));
    if (!work.num_key_tiles) break;
    attend<kHeadDim>(m, call, work, rings);
  }
  if (m.group() == 0) m.wait_turn();  // takes what the other passed last
}

}  // namespace mmalign
