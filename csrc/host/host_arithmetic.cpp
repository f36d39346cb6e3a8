// The headers that kernels and host share, behind C functions on arrays: the tests compare them
// with NumPy. Loops here stand for the threads of a kernel.
#include <algorithm>
#include <vector>

#include "../adamw_element.h"
#include "../block_quantization.h"
#include "../packed_rows.h"
#include "../row_threads.h"
#include "../split_master.h"
#include "../tile_scheduler.h"

using namespace mmalign;

#define EXPORT extern "C" __attribute__((visibility("default")))

// counters (num, 4), words (num, 4)
EXPORT void host_philox(uint64_t key, const uint32_t* counters, int64_t num, uint32_t* words) {
  for (int64_t i = 0; i < num; ++i) {
    const uint32_t* c = counters + 4 * i;
    const Words drawn = philox(key, c[0], c[1], c[2], c[3]);
    std::copy(drawn.word, drawn.word + 4, words + 4 * i);
  }
}

EXPORT void host_round_randomly(const float* x, const uint32_t* draws, int64_t num,
                                uint16_t* rounded) {
  for (int64_t i = 0; i < num; ++i) rounded[i] = round_randomly(x[i], draws[i]);
}

EXPORT void host_split_master(const float* masters, int64_t num, uint16_t* weights,
                              int16_t* remainders) {
  for (int64_t i = 0; i < num; ++i) {
    const SplitMaster split = split_master(masters[i]);
    weights[i] = split.weight;
    remainders[i] = split.remainder;
  }
}

EXPORT void host_join_master(const uint16_t* weights, const int16_t* remainders, int64_t num,
                             float* masters) {
  for (int64_t i = 0; i < num; ++i) masters[i] = join_master(weights[i], remainders[i]);
}

// Codes, and the values that they decode to.
template <class Code, class Encode, class Decode>
static void quantize(const float* x, const uint32_t* draws, int64_t num, Encode encode,
                     Decode decode, uint8_t* codes, float* scales, float* decoded) {
  for (int64_t begin = 0; begin < num; begin += kQuantizedBlock) {
    const int64_t end = std::min<int64_t>(begin + kQuantizedBlock, num);
    uint32_t largest = 0;
    for (int64_t i = begin; i < end; ++i) largest = std::max(largest, size_bits(x[i]));
    const float scale = scales[begin / kQuantizedBlock] = block_scale<Code>(largest);
    for (int64_t i = begin; i < end; ++i) {
      codes[i] = encode(x[i], 1 / scale, draws[i]);
      decoded[i] = decode(codes[i], scale);
    }
  }
}

EXPORT void host_quantize_first(const float* x, const uint32_t* draws, int64_t num, uint8_t* codes,
                                float* scales, float* decoded) {
  quantize<FirstMomentCode>(x, draws, num, encode_first_moment, decode_first_moment, codes, scales,
                            decoded);
}

EXPORT void host_quantize_second(const float* x, const uint32_t* draws, int64_t num,
                                 uint8_t* codes, float* scales, float* decoded) {
  quantize<SecondMomentCode>(x, draws, num, encode_second_moment, decode_second_moment, codes,
                             scales, decoded);
}

// One tensor, fp32 moments and gradients, as adamw.cu goes about it. Exactly one of masters (fp32),
// (weights, remainders) and weights alone, with stochastic rounding, is there.
EXPORT void host_adamw(float* masters, uint16_t* weights, int16_t* remainders, const float* grads,
                       float* exp_avgs, float* exp_avg_sqs, int64_t num, float grad_scale,
                       int64_t step, double learning_rate, double beta1, double beta2, double eps,
                       double weight_decay, uint64_t seed, uint32_t place) {
  const AdamwSettings settings =
      adamw_settings(step, learning_rate, beta1, beta2, eps, weight_decay);
  for (int64_t i = 0; i < num; ++i) {
    float p = masters      ? masters[i]
              : remainders ? join_master(weights[i], remainders[i])
                           : bf16_value(weights[i]);
    adamw_element(settings, grads[i] * grad_scale, p, exp_avgs[i], exp_avg_sqs[i]);
    if (masters) {
      masters[i] = p;
    } else if (remainders) {
      const SplitMaster split = split_master(p);
      weights[i] = split.weight;
      remainders[i] = split.remainder;
    } else {
      const int64_t tile = i / kDrawTile, lane = i % kDrawRun, run = i % kDrawTile / kDrawRun;
      const Words drawn =
          adamw_draws(seed, tile, static_cast<int>(lane), step, place, kDrawsOfWeights);
      weights[i] = round_randomly(p, drawn.word[run]);
    }
  }
}

// tiles (num_tiles, 2): sample and index, from expensive to cheap. Returns num_tiles; tiles may be
// null.
EXPORT int host_order_tiles(const int* cu_seqlens, int num_samples, int tile_rows, int causal,
                            int num_threads, int* tiles) {
  const PackedSamples samples{cu_seqlens, num_samples, tile_rows, causal != 0};
  if (!tiles) return samples.num_tiles();
  std::vector<Tile> table(samples.num_tiles());
  for (int thread = 0; thread < num_threads; ++thread)
    order_tiles(samples, thread, num_threads, table.data());
  for (size_t i = 0; i < table.size(); ++i) {
    tiles[2 * i] = table[i].sample;
    tiles[2 * i + 1] = table[i].index;
  }
  return samples.num_tiles();
}

// workers (num_items,): who takes each item
EXPORT void host_assign_items(int64_t num_items, int num_workers, int* workers) {
  for (int worker = 0; worker < num_workers; ++worker)
    for (int turn = 0;; ++turn) {
      const int64_t item = item_of_turn(worker, num_workers, turn);
      if (item >= num_items) break;
      workers[item] = worker;
    }
}

// Of every packed row its image row or -1, and of every row of text its packed row.
EXPORT void host_packed_rows(const int64_t* positions, int64_t num_positions, int64_t num_rows,
                             int64_t* image_rows, int64_t* text_rows) {
  for (int64_t row = 0; row < num_rows; ++row)
    image_rows[row] = image_row_at(positions, num_positions, row);
  for (int64_t text = 0; text < num_rows - num_positions; ++text)
    text_rows[text] = packed_row_of_text(positions, num_positions, text);
}

// Threads of a block of rms_norm_bwd, its dynamic shared memory, and whether the launch opts in;
// `tensors` are read with `lanes` columns per vector.
EXPORT void host_rms_norm_backward(int64_t columns, int lanes, int tensors, int per_multiprocessor,
                                   int per_block, int* launch) {
  const int threads = row_threads(columns, lanes).total();
  const int stages = choose_stages(tensors, threads, per_multiprocessor, per_block);
  const size_t bytes = stages_bytes(stages, tensors, threads);
  launch[0] = threads;
  launch[1] = static_cast<int>(bytes);
  launch[2] = opts_in(bytes);
}
