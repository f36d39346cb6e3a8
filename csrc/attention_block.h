// What the threads of an attention block do: one fetches, three warps turn queries
// (attention_feed.h), two warpgroups multiply. `Machine` is Hopper (attention_hopper.cuh) or the
// host program that stands for it (host/attention_machine.h).
//
// Both warpgroups walk through the same tiles of keys, from the last, the only one with hidden
// keys, to the first. Each issues its next product with keys and its last one with values together, and
// takes the softmax of the former while the latter is under way and the other one has its turn.
#pragma once

#include "attention_feed.h"

namespace mmalign {

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

// Softmax of a tile of scores; shrink: of what came before. What was released before it is released
// by the time of the peaks, and all of it is done before the wait for the last product with values.
template <class Machine>
KERNEL_CODE void take_scores(Machine& m, float scale, float (&scores)[kKeyRows / 2],
                             RunningSoftmax& softmax, float (&shrink)[2]) {
  float peak[2] = {softmax.peak[0], softmax.peak[1]};
  raise_peaks(scores, peak);
  UNROLL
  for (int half = 0; half < 2; ++half) peak[half] = m.quad_max(peak[half]);
  m.computed(peak);
  take_powers<Machine>(scores, scale, peak, softmax, shrink);
  m.computed(softmax.total);
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
