// The threads of a block in the backward pass (formulas: rotary_attention_backward.cu). One thread
// loads; where keys are owned, one warp loads the statistics of the streamed queries; two
// warpgroups multiply. `Machine` is Hopper (attention_machine.cuh) or the emulator on the host.
//
// A block owns rows and streams columns, so both kernels are one: scores of the first tensors of
// each pair, slopes of the second, and the gradient of the first accumulates slopes * (the streamed
// first). Where keys are owned, values also accumulate powers * (the gradient of the output).
#pragma once

#include "attention_gradient_tiles.h"
#include "attention_products.h"

namespace mmalign {

// The same for all threads of all blocks.
struct GradientCall {
  const ScheduledSample* table;  // (num_samples + 1,), items of heads of the owned rows
  const float* cos;              // (max_positions, head_dim / 2)
  const float* sin;
  const int* position_ids;  // (num_tokens,)
  const float* statistics;     // (2, num_heads, num_tokens): logsumexp * log2(e), delta
  void* grad;               // like the projection
  int* counter;             // of items, zero at first
  AttentionShape shape;
  int num_tokens, num_samples;
  float scale;  // log2(e) / sqrt(head_dim)
  float root;   // 1 / sqrt(head_dim)
  bool causal;

  HOST_DEVICE int64_t columns() const {
    return static_cast<int64_t>(shape.num_heads + 2 * shape.num_key_heads) * shape.head_dim;
  }
  HOST_DEVICE const float* logsumexp(int head, int row) const {
    return statistics + static_cast<int64_t>(head) * num_tokens + row;
  }
  HOST_DEVICE const float* delta(int head, int row) const {
    return logsumexp(shape.num_heads + head, row);
  }
};

// -- one thread loads

// 64 rows of the queries or keys of a head, and of their companions.
template <int kHeadDim, class Machine>
KERNEL_CODE void fetch_pair(Machine& m, const GradientCall& call, bool queries, int head,
                            int barrier, int first, int second, int row) {
  using Shared = GradientShared<kHeadDim>;
  const int rotated = (queries ? 0 : call.shape.num_heads) + head;
  const int beside = queries ? head : rotated + call.shape.num_key_heads;
  const Tensors tensor = queries ? Tensors::kGradOut : Tensors::kProjection;
  UNROLL
  for (int box = 0; box < Shared::kBoxes; ++box) {
    const int column = box * kBoxColumns, to = box * Shared::kBoxBytes;
    m.load_box(Tensors::kRotated, barrier, first + to, rotated * kHeadDim + column, row);
    m.load_box(tensor, barrier, second + to, beside * kHeadDim + column, row);
  }
}

template <Gradient kOf, int kHeadDim, class Machine>
KERNEL_CODE void fetch_pairs(Machine& m, const GradientCall& call) {
  using Shared = GradientShared<kHeadDim>;
  constexpr bool kQueries = kOf == Gradient::kQueries;
  Ring<Shared::kStages> passing;
  int place = 0;
  for (Ring<kGradientSlots> owned;; ++owned.count) {
    const int slot = owned.stage();
    const AttentionWork work =
        gradient_work<kOf>(call.table, call.num_samples, call.shape, call.causal,
                           m.take_item(call.counter), place);
    m.wait(Shared::own_empty(slot), owned.empty());
    *m.template at<AttentionWork>(Shared::work(slot)) = work;
    if (!work.num_key_tiles) {
      m.arrive(Shared::own_full(slot));
      return;
    }
    m.expect(Shared::own_full(slot), 4 * Shared::kTileBytes);
    for (int group = 0; group < 2; ++group)
      fetch_pair<kHeadDim>(m, call, kQueries, work.head, Shared::own_full(slot),
                           Shared::own(slot, 0, group), Shared::own(slot, 1, group),
                           work.first_row + work.tile * kQueryRows + group * kGradientRows);
    const PassingTiles tiles = passing_tiles<kOf>(work, call.shape, call.causal);
    for (int head = 0; head < tiles.num_heads; ++head)
      for (int tile = tiles.first; tile < tiles.end; ++tile, ++passing.count) {
        const int stage = passing.stage();
        m.wait(Shared::empty(stage), passing.empty());
        m.expect(Shared::full(stage), 2 * Shared::kTileBytes);
        fetch_pair<kHeadDim>(m, call, !kQueries, tiles.first_head + head, Shared::full(stage),
                             Shared::passing(stage, 0), Shared::passing(stage, 1),
                             work.first_row + tile * kGradientRows);
      }
  }
}

// -- one warp brings statistics of passing queries

// logsumexp = infinity past the sample's end: powers are zero there.
template <int kHeadDim, class Machine>
KERNEL_CODE void bring_statistics(Machine& m, const GradientCall& call) {
  using Shared = GradientShared<kHeadDim>;
  Ring<Shared::kStages> passing;
  for (Ring<kGradientSlots> owned;; ++owned.count) {
    const int slot = owned.stage();
    m.wait(Shared::own_full(slot), owned.full());
    const AttentionWork work = *m.template at<AttentionWork>(Shared::work(slot));
    m.warp_arrive(Shared::own_empty(slot));
    if (!work.num_key_tiles) return;
    const PassingTiles tiles = passing_tiles<Gradient::kKeys>(work, call.shape, call.causal);
    for (int head = tiles.first_head; head < tiles.first_head + tiles.num_heads; ++head)
      for (int tile = tiles.first; tile < tiles.end; ++tile, ++passing.count) {
        const int stage = passing.stage();
        m.wait(Shared::empty(stage), passing.empty());
        float* to = m.template at<float>(Shared::statistics(stage));
        UNROLL
        for (int i = m.lane(); i < kGradientRows; i += 32) {
          const int query = tile * kGradientRows + i, row = work.first_row + query;
          const bool inside = query < work.length;
          to[i] = inside ? m.load_statistic(call.logsumexp(head, row)) : INFINITY;
          to[kGradientRows + i] = inside ? m.load_statistic(call.delta(head, row)) : 0.0f;
        }
        m.warp_arrive(Shared::full(stage));
      }
  }
}

// -- two warpgroups multiply

// Statistics of a thread's rows (where queries are owned) and of its columns (where they pass by).
struct RowStatistics {
  float logsumexp[2], delta[2];
};

// scores become exp2(scale * score - logsumexp): powers, the probabilities.
template <Gradient kOf, class Machine>
KERNEL_CODE void take_probabilities(Machine& m, const RowStatistics& rows, int statistics,
                                    float scale,
                                    float (&scores)[kGradientRows / 2]) {
  UNROLL
  for (int i = 0; i < kGradientRows / 2; i += 4) {
    StatisticPair columns = {};
    if (kOf == Gradient::kKeys)
      columns = *m.template at<StatisticPair>(statistics + accumulator_column(m.thread(), i) * 4);
    UNROLL
    for (int j = 0; j < 4; ++j) {
      const float less = kOf == Gradient::kKeys ? columns.values[j % 2] : rows.logsumexp[j / 2];
      scores[i + j] = Machine::exp2(scores[i + j] * scale - less);
    }
  }
}

// slopes of probabilities become slopes of scores, packed as a left operand.
template <Gradient kOf, class Machine>
KERNEL_CODE void take_slopes(Machine& m, const RowStatistics& rows, int statistics,
                             const float (&powers)[kGradientRows / 2],
                             const float (&slopes)[kGradientRows / 2],
                             uint32_t (&packed)[kGradientRows / 16][4]) {
  UNROLL
  for (int i = 0; i < kGradientRows / 2; i += 4) {
    StatisticPair columns = {};
    if (kOf == Gradient::kKeys)
      columns = *m.template at<StatisticPair>(statistics + (kGradientRows +
                                                      accumulator_column(m.thread(), i)) * 4);
    float x[4];
    UNROLL
    for (int j = 0; j < 4; ++j) {
      const float delta = kOf == Gradient::kKeys ? columns.values[j % 2] : rows.delta[j / 2];
      x[j] = powers[i + j] * (slopes[i + j] - delta);
    }
    packed[i / 8][i / 4 % 2 * 2] = Machine::Element::pack(x[0], x[1]);
    packed[i / 8][i / 4 % 2 * 2 + 1] = Machine::Element::pack(x[2], x[3]);
  }
}

template <int kHeadDim>
struct OwnGradients {
  float first[kHeadDim / 2] = {}, values[kHeadDim / 2] = {};
};

// A pair of tiles passes by; the next may arrive in its place afterwards.
template <Gradient kOf, int kHeadDim, class Machine>
KERNEL_CODE void take_in(Machine& m, const GradientCall& call, const RowStatistics& rows, int slot,
                         int stage, bool some, const int (&bound)[2],
                         OwnGradients<kHeadDim>& grads) {
  using Shared = GradientShared<kHeadDim>;
  const int first = Shared::passing(stage, 0), second = Shared::passing(stage, 1);
  float scores[kGradientRows / 2], slopes[kGradientRows / 2];
  uint32_t powers[kGradientRows / 16][4], packed[kGradientRows / 16][4];
  multiply_rows<kHeadDim, Shared::kBoxBytes>(m, Shared::own(slot, 0, m.group()), first, scores);
  multiply_rows<kHeadDim, Shared::kBoxBytes>(m, Shared::own(slot, 1, m.group()), second, slopes);
  m.template wait_products<1>(scores);
  take_probabilities<kOf>(m, rows, Shared::statistics(stage), call.scale, scores);
  if (some) hide_pairs<kOf>(scores, m.thread(), bound);
  if constexpr (kOf == Gradient::kKeys) {
    pack<Machine>(scores, powers);
    multiply_columns<Shared::kBoxBytes>(m, powers, second, grads.values);
    m.template wait_products<1>(slopes);
  } else {
    m.template wait_products<0>(slopes);
  }
  take_slopes<kOf>(m, rows, Shared::statistics(stage), scores, slopes, packed);
  multiply_columns<Shared::kBoxBytes>(m, packed, first, grads.first);
  if constexpr (kOf == Gradient::kKeys)
    m.template wait_products<0>(grads.first, grads.values, powers, packed);
  else
    m.template wait_products<0>(grads.first, packed);
}

// The transposed rotation, in place; columns i and i + kHeadDim / 2 are the same thread's.
template <int kHeadDim, class Machine>
KERNEL_CODE void rotate_inverse(Machine& m, const GradientCall& call, int row, bool inside,
                                int half,
                           float (&grad)[kHeadDim / 2]) {
  const int position = inside ? m.load_index(call.position_ids + row) : 0;
  UNROLL
  for (int i = 2 * half; i < kHeadDim / 4; i += 4) {
    const int64_t angle =
        static_cast<int64_t>(position) * (kHeadDim / 2) + accumulator_column(m.thread(), i);
    const StatisticPair cos = m.load_pair(call.cos + angle), sin = m.load_pair(call.sin + angle);
    UNROLL
    for (int j = 0; j < 2; ++j) {
      const float x = grad[i + j], y = grad[i + j + kHeadDim / 4];
      grad[i + j] = x * cos.values[j] + y * sin.values[j];
      grad[i + j + kHeadDim / 4] = y * cos.values[j] - x * sin.values[j];
    }
  }
}

template <Gradient kOf, int kHeadDim, class Machine>
KERNEL_CODE void write_gradients(Machine& m, const GradientCall& call, const AttentionWork& work,
                                 OwnGradients<kHeadDim>& grads) {
  constexpr bool kKeys = kOf == Gradient::kKeys;
  const int head = kKeys ? call.shape.num_heads + work.head : work.head;
  UNROLL
  for (int half = 0; half < 2; ++half) {
    const int row_of_sample = work.tile * kQueryRows + m.group() * kGradientRows +
                              accumulator_row(m.thread(), 2 * half);
    const bool inside = row_of_sample < work.length;
    const int row = work.first_row + row_of_sample;
    const int64_t element = row * call.columns() + head * kHeadDim;
    rotate_inverse<kHeadDim>(m, call, row, inside, half, grads.first);
    write_row<kHeadDim>(m, call.grad, element, inside, half, call.root, grads.first);
    if constexpr (kKeys)
      write_row<kHeadDim>(m, call.grad, element + call.shape.num_key_heads * kHeadDim, inside, half,
                          1.0f, grads.values);
  }
}

// All that passes by an own tile.
template <Gradient kOf, int kHeadDim, class Machine>
KERNEL_CODE void own_rows(Machine& m, const GradientCall& call, const AttentionWork& work, int slot,
                          Ring<GradientShared<kHeadDim>::kStages>& passing) {
  using Shared = GradientShared<kHeadDim>;
  const int own = 2 * work.tile + m.group();
  OwnGradients<kHeadDim> grads;
  int own_row[2];
  RowStatistics rows = {};
  UNROLL
  for (int half = 0; half < 2; ++half) {
    own_row[half] = own * kGradientRows + accumulator_row(m.thread(), 2 * half);
    if (kOf == Gradient::kKeys) continue;
    const bool inside = own_row[half] < work.length;
    const int row = work.first_row + own_row[half];
    rows.logsumexp[half] = inside ? m.load_statistic(call.logsumexp(work.head, row)) : INFINITY;
    rows.delta[half] = inside ? m.load_statistic(call.delta(work.head, row)) : 0.0f;
  }
  const PassingTiles tiles = passing_tiles<kOf>(work, call.shape, call.causal);
  for (int head = 0; head < tiles.num_heads; ++head)
    for (int tile = tiles.first; tile < tiles.end; ++tile, ++passing.count) {
      const int stage = passing.stage(), rows_left = work.length - tile * kGradientRows;
      const Meeting met = meeting<kOf>(own, tile, work.length, call.causal);
      m.wait(Shared::full(stage), passing.full());
      if (met != Meeting::kNothing) {
        for (int second = 0; second < 2 && rows_left < kGradientRows; ++second)
          clear_rows<Shared>(m, Shared::passing(stage, second), rows_left);
        int bound[2];
        for (int half = 0; half < 2; ++half)
          bound[half] = bound_of_row<kOf>(own_row[half], tile, work.length, call.causal);
        take_in<kOf>(m, call, rows, slot, stage, met == Meeting::kSome, bound, grads);
      }
      m.warp_arrive(Shared::empty(stage));
    }
  m.warp_arrive(Shared::own_empty(slot));
  write_gradients<kOf>(m, call, work, grads);
}

template <Gradient kOf, int kHeadDim, class Machine>
KERNEL_CODE void compute_gradients(Machine& m, const GradientCall& call) {
  using Shared = GradientShared<kHeadDim>;
  Ring<Shared::kStages> passing;
  for (Ring<kGradientSlots> owned;; ++owned.count) {
    const int slot = owned.stage();
    m.wait(Shared::own_full(slot), owned.full());
    const AttentionWork work = *m.template at<AttentionWork>(Shared::work(slot));
    if (!work.num_key_tiles) return;
    own_rows<kOf, kHeadDim>(m, call, work, slot, passing);
  }
}

}  // namespace mmalign
