// Rotary attention, backward. A work item is one key head of one sample, with all query heads that
// share it, so that every gradient has one owner and the sums one order.
//
// Per tile of queries and keys, P = 2^(scores - logsumexp) and dS = P (dO v^T - delta) are computed
// again (Dao 2023, arXiv 2307.08691); then dV += P^T dO, dK += dS^T q, dQ += dS k. delta is the sum
// of dO * O over a row.
#include "attention_samples.h"
#include "rotary_attention.h"
#include "work.h"

namespace mmalign {

namespace {

struct Gradients {
  const float *grad_out, *out, *logsumexp;
  float* grad_qkv;
};

// Rows of all query heads of a group, one head after the other; blocks of keys.
struct Tiles {
  Matrix queries, grad_out, grad_queries;                       // (group * length, dim)
  float *logsumexp, *delta;                                     // (group * length,)
  Matrix keys, values, transposed_keys, transposed_values;      // (kBlock, dim), (dim, kBlock)
  Matrix grad_keys, grad_values;                                // (kBlock, dim)
  Matrix probabilities, grad_scores;                            // (kBlock, kBlock)
};

Tiles take_tiles(int64_t rows, int dim, Scratch& scratch) {
  const size_t blocks = 6 * static_cast<size_t>(kBlock) * dim + 2 * kBlock * kBlock;
  scratch.reserve(blocks + static_cast<size_t>(rows) * (3 * dim + 2) + 13 * 16);
  Tiles tiles;
  for (Matrix* matrix : {&tiles.keys, &tiles.values, &tiles.grad_keys, &tiles.grad_values}) {
    *matrix = scratch.take(kBlock, dim);
  }
  for (Matrix* matrix : {&tiles.transposed_keys, &tiles.transposed_values}) {
    *matrix = scratch.take(dim, kBlock);
  }
  for (Matrix* matrix : {&tiles.probabilities, &tiles.grad_scores}) {
    *matrix = scratch.take(kBlock, kBlock);
  }
  for (Matrix* matrix : {&tiles.queries, &tiles.grad_out, &tiles.grad_queries}) {
    *matrix = scratch.take(rows, dim);
  }
  tiles.logsumexp = scratch.take(1, rows).at;
  tiles.delta = scratch.take(1, rows).at;
  return tiles;
}

void read_queries(const Attention& call, const Gradients& gradients, const Tiles& tiles,
                  int sample, int key_head) {
  const int length = call.length(sample), dim = call.head_dim;
  for (int head = 0; head < call.group(); ++head) {
    const int query_head = key_head * call.group() + head;
    const int64_t begin = call.begin(sample), first = static_cast<int64_t>(head) * length;
    gather_rotated(call, begin, query_head * dim, length, call.scale() * kLog2E,
                   tiles.queries.from(first));
    for (int i = 0; i < length; ++i) {
      const int64_t at = (begin + i) * call.num_heads + query_head;
      const float *grad = gradients.grad_out + at * dim, *out = gradients.out + at * dim;
      if (i + kRowsAhead < length) {
        prefetch_row(grad + kRowsAhead * call.num_heads * dim, dim);
        prefetch_row(out + kRowsAhead * call.num_heads * dim, dim);
      }
      float* to = tiles.grad_out.row(first + i);
      std::memcpy(to, grad, dim * sizeof(float));
      std::fill(to + dim, to + tiles.grad_out.stride, 0.0f);
      tiles.delta[first + i] = dot(grad, out, dim);
      tiles.logsumexp[first + i] = gradients.logsumexp[at] * kLog2E;
    }
  }
}

// Scores and gradients of probabilities in, P and dS out; zero where a key cannot be seen.
inline void score_gradients_row(float* scores, float* grads, int visible, int vectors,
                                int block_vectors, float logsumexp, float delta) {
  for (int v = 0; v < vectors; ++v) {
    Vector p = exp2_of_negative(load(scores + v * kLanes) - logsumexp);
    if (visible < (v + 1) * kLanes) p = kIota + v * kLanes < visible ? p : Vector{};
    store(scores + v * kLanes, p);
    store(grads + v * kLanes, p * (load(grads + v * kLanes) - delta));
  }
  for (int v = vectors; v < block_vectors; ++v) {
    store(scores + v * kLanes, Vector{});
    store(grads + v * kLanes, Vector{});
  }
}

void add_queries(const Attention& call, const Tiles& tiles, int64_t row, int rows, int query,
                 int first_key, int num_keys) {
  const auto seen_by = [&](int i) {
    return std::max(0, visible_keys(call.causal, query + i, first_key, num_keys));
  };
  const int dim = call.head_dim, dim_vectors = call.vectors();
  const int seen_by_any = seen_by(rows - 1), block_vectors = ceil_div(seen_by_any, kLanes);
  for_row_groups(rows, [&](int i, int count) {
    const int vectors = ceil_div(seen_by(i + count - 1), kLanes);
    product<false>(tiles.queries.from(row + i), tiles.transposed_keys, tiles.probabilities.from(i),
                   count, vectors, dim, false);
    product<false>(tiles.grad_out.from(row + i), tiles.transposed_values,
                   tiles.grad_scores.from(i), count, vectors, dim, false);
    for (int j = i; j < i + count; ++j) {
      score_gradients_row(tiles.probabilities.row(j), tiles.grad_scores.row(j), seen_by(j), vectors,
                          block_vectors, tiles.logsumexp[row + j], tiles.delta[row + j]);
    }
  });
  for_row_groups(seen_by_any, [&](int key, int count) {
    const int first = call.causal ? std::max(0, first_key + key - query) : 0;  // that sees the key
    const auto columns = [&](Matrix tile) { return Matrix{tile.row(first) + key, tile.stride}; };
    product<true>(columns(tiles.probabilities), tiles.grad_out.from(row + first),
                  tiles.grad_values.from(key), count, dim_vectors, rows - first, true);
    product<true>(columns(tiles.grad_scores), tiles.queries.from(row + first),
                  tiles.grad_keys.from(key), count, dim_vectors, rows - first, true);
  });
  for_row_groups(rows, [&](int i, int count) {
    product<false>(tiles.grad_scores.from(i), tiles.keys, tiles.grad_queries.from(row + i), count,
                   dim_vectors, seen_by(i + count - 1), true);
  });
}

void write_keys(const Attention& call, const Tiles& tiles, int64_t token, int column, int keys,
                float* grad_qkv) {
  const int value_column = column + call.num_key_value_heads * call.head_dim;
  for (int i = 0; i < keys; ++i) {
    float* to = grad_qkv + (token + i) * call.columns();
    // queries were scaled by log2(e) for the scores
    rotate_row(call, token + i, tiles.grad_keys.row(i), to + column, kLn2, true);
    std::memcpy(to + value_column, tiles.grad_values.row(i), call.head_dim * sizeof(float));
  }
}

void attend_backward(const Attention& call, const Gradients& gradients, int sample, int key_head,
                     Scratch& scratch) {
  const int length = call.length(sample), dim = call.head_dim, group = call.group();
  const int64_t begin = call.begin(sample), rows = static_cast<int64_t>(group) * length;
  const Tiles tiles = take_tiles(rows, call.padded_dim(), scratch);
  read_queries(call, gradients, tiles, sample, key_head);
  std::fill_n(tiles.grad_queries.at, rows * tiles.grad_queries.stride, 0.0f);
  const int key_column = (call.num_heads + key_head) * dim;
  const int value_column = key_column + call.num_key_value_heads * dim;
  for (int key = 0; key < length; key += kBlock) {
    const int keys = std::min(kBlock, length - key);
    gather_rotated(call, begin + key, key_column, keys, 1.0f, tiles.keys);
    copy_rows(call.rows(begin + key, value_column), keys, call.head_dim, tiles.values);
    transpose_block(tiles.keys, keys, call.vectors(), tiles.transposed_keys);
    transpose_block(tiles.values, keys, call.vectors(), tiles.transposed_values);
    std::fill_n(tiles.grad_keys.at, keys * tiles.grad_keys.stride, 0.0f);
    std::fill_n(tiles.grad_values.at, keys * tiles.grad_values.stride, 0.0f);
    for (int head = 0; head < group; ++head) {
      for (int query = call.causal ? key : 0; query < length; query += kBlock) {
        add_queries(call, tiles, static_cast<int64_t>(head) * length + query,
                    std::min(kBlock, length - query), query, key, keys);
      }
    }
    write_keys(call, tiles, begin + key, key_column, keys, gradients.grad_qkv);
  }
  for (int head = 0; head < group; ++head) {
    for (int i = 0; i < length; ++i) {
      float* to = gradients.grad_qkv + (begin + i) * call.columns();
      to += (key_head * group + head) * dim;
      const float* grad = tiles.grad_queries.row(static_cast<int64_t>(head) * length + i);
      rotate_row(call, begin + i, grad, to, call.scale(), true);
    }
  }
}

}  // namespace

void rotary_attention_backward(const Attention& call, const float* grad_out, const float* out,
                               const float* logsumexp, float* grad_qkv) {
  const Gradients gradients{grad_out, out, logsumexp, grad_qkv};
  std::vector<double> costs;
  for (int sample = 0; sample < call.num_samples; ++sample) {
    const double length = call.length(sample);
    costs.insert(costs.end(), call.num_key_value_heads, length * length);
  }
  share_work(costs, [&](int index) {
    thread_local Scratch scratch;
    const int heads = call.num_key_value_heads;
    attend_backward(call, gradients, index / heads, index % heads, scratch);
  });
}

}  // namespace mmalign
