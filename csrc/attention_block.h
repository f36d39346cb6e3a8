// The threads of an attention block: one loads, three warps rotate queries (attention_feed.h), two
// warpgroups multiply. `Machine` is Hopper (attention_machine.cuh) or the emulator on the host
// (host/attention_machine.h).
//
// Both warpgroups loop over the same tiles of keys, from the last, the only one with hidden keys,
// to the first. Each issues its next product with keys and its last product with values together,
// and computes the softmax of the former while the latter is in flight and the other warpgroup
// multiplies.
#pragma once

#include "attention_feed.h"
#include "attention_products.h"

namespace mmalign {

// out / total and log(total) + peak of the rows inside the sample.
template <int kHeadDim, class Machine>
KERNEL_CODE void write_rows(Machine& m, const AttentionCall& call, const AttentionWork& work,
                            const RunningSoftmax& softmax, const float (&out)[kHeadDim / 2]) {
  constexpr float kLn2 = 0.693147180559945309f;
  UNROLL
  for (int half = 0; half < 2; ++half) {
    const float total = m.quad_sum(softmax.total[half]);
    const float factor = 1.0f / total;
    const int query = work.tile * kQueryRows + m.group() * kWarpgroupRows +
                      accumulator_row(m.thread(), 2 * half);
    const bool inside = query < work.length;
    const int64_t row =
        (static_cast<int64_t>(work.first_row) + query) * call.shape.num_heads + work.head;
    if (inside && m.thread() % 4 == 0)
      call.logsumexp[row] = (softmax.peak[half] * call.scale + Machine::log2(total)) * kLn2;
    write_row<kHeadDim>(m, call.out, row * kHeadDim, inside, half, factor, out);
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
  const int queries = Shared::query(slot) + m.group() * kWarpgroupRows * kSwizzleBytes;
  float out[kHeadDim / 2] = {}, scores[kKeyRows / 2] = {}, shrink[2];
  uint32_t probabilities[kKeyRows / 16][4];
  RunningSoftmax softmax;

  m.wait(Shared::keys_full(rings.keys.stage()), rings.keys.full());
  multiply_rows<kHeadDim, Shared::kBoxBytes>(m, queries, Shared::keys(rings.keys.stage()), scores);
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
    const int keys = Shared::keys(rings.keys.stage());
    const int values = Shared::values(rings.values.stage());
    multiply_rows<kHeadDim, Shared::kBoxBytes>(m, queries, keys, scores);
    m.wait(Shared::values_full(rings.values.stage()), rings.values.full());
    if (i == 0 && rows_of_last < kKeyRows) clear_rows<Shared>(m, values, rows_of_last);
    multiply_columns<Shared::kBoxBytes>(m, probabilities, values, out);
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
    clear_rows<Shared>(m, Shared::values(rings.values.stage()), rows_of_last);
  multiply_columns<Shared::kBoxBytes>(m, probabilities, Shared::values(rings.values.stage()), out);
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
    m.wait(Shared::query_rotated(slot), rings.queries.full());
    const AttentionWork work = *m.template at<AttentionWork>(Shared::work(slot));
    if (!work.num_key_tiles) break;
    attend<kHeadDim>(m, call, work, rings);
  }
  if (m.group() == 0) m.wait_turn();  // takes what the other passed last
}

}  // namespace mmalign
