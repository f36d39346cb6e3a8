// Queries of one work item, and the softmax over the blocks of keys that are added to them: online
// (Milakov and Gimelshein 2018, arXiv 1805.02867), in base 2.
#pragma once

#include "attention_samples.h"

namespace mmalign {

// Rows: those of the first query head, then those of the next that shares the key head.
struct Queries {
  Matrix rotated, out;     // (rows, dim), rotated: times log2(e) / sqrt(head_dim)
  Matrix scores;           // (kBlock, kBlock)
  Matrix keys;             // (kBlock, dim)
  Matrix transposed_keys;  // (dim, kBlock)
  Matrix values;           // (kBlock, dim)
  float* maxima;           // (rows,)
  float* sums;
};

inline Queries take_queries(int64_t rows, int dim, Scratch& scratch) {
  const size_t blocks = 3 * static_cast<size_t>(kBlock) * dim + kBlock * kBlock;
  scratch.reserve(blocks + static_cast<size_t>(rows) * (2 * dim + 2) + 8 * 16);
  Queries queries;
  queries.keys = scratch.take(kBlock, dim);
  queries.transposed_keys = scratch.take(dim, kBlock);
  queries.values = scratch.take(kBlock, dim);
  queries.scores = scratch.take(kBlock, kBlock);
  queries.rotated = scratch.take(rows, dim);
  queries.out = scratch.take(rows, dim);
  queries.maxima = scratch.take(1, rows).at;
  queries.sums = scratch.take(1, rows).at;
  return queries;
}

// `rows` consecutive tokens, for all query heads that share a key head.
inline Queries read_queries(const Attention& call, int64_t first_token, int rows, int key_head,
                            Scratch& scratch) {
  const int64_t all_rows = static_cast<int64_t>(call.group()) * rows;
  const Queries queries = take_queries(all_rows, call.padded_dim(), scratch);
  for (int head = 0; head < call.group(); ++head) {
    const int column = (key_head * call.group() + head) * call.head_dim;
    gather_rotated(call, first_token, column, rows, call.scale() * kLog2E,
                   queries.rotated.from(static_cast<int64_t>(head) * rows));
  }
  std::fill_n(queries.out.at, all_rows * queries.out.stride, 0.0f);
  std::fill_n(queries.maxima, all_rows, kMinusInfinity);
  std::fill_n(queries.sums, all_rows, 0.0f);
  return queries;
}

// Turns a row of scores into 2^(score - maximum), and rescales what earlier blocks have added.
inline void softmax_row(float* scores, int visible, int vectors, float& maximum, float& sum_row,
                        float* out, int out_vectors) {
  Vector row[kBlockVectors];
  Vector top = broadcast(maximum);
  for (int v = 0; v < vectors; ++v) {
    row[v] = load(scores + v * kLanes);
    if (visible < (v + 1) * kLanes) {
      row[v] = kIota + v * kLanes < visible ? row[v] : broadcast(kMinusInfinity);
    }
    top = larger(top, row[v]);
  }
  const float now = largest(top);
  Vector total{};
  for (int v = 0; v < vectors; ++v) {
    row[v] = exp2_of_negative(row[v] - now);
    total += row[v];
    store(scores + v * kLanes, row[v]);
  }
  if (maximum == kMinusInfinity) {
    maximum = now;
  } else if (now > maximum) {
    const float shrink = std::exp2(maximum - now);
    sum_row *= shrink;
    for (int v = 0; v < out_vectors; ++v) {
      store(out + v * kLanes, load(out + v * kLanes) * shrink);
    }
    maximum = now;
  }
  sum_row += sum(total);
}

// Adds the block of keys in transposed_keys, with these values, to `rows` queries from `row` on;
// query i sees the first seen_by(i) of them, never fewer than the query before.
template <class SeenBy>
void add_keys(const Attention& call, const Queries& queries, Matrix values, int64_t row, int rows,
              const SeenBy& seen_by) {
  for_row_groups(rows, [&](int i, int count) {
    const int seen = seen_by(i + count - 1);
    if (seen <= 0) return;
    product<false>(queries.rotated.from(row + i), queries.transposed_keys, queries.scores.from(i),
                   count, ceil_div(seen, kLanes), call.head_dim, false);
    for (int j = i; j < i + count; ++j) {
      softmax_row(queries.scores.row(j), std::max(0, seen_by(j)), ceil_div(seen, kLanes),
                  queries.maxima[row + j], queries.sums[row + j], queries.out.row(row + j),
                  call.vectors());
    }
  });
  for_row_groups(rows, [&](int i, int count) {
    const int seen = seen_by(i + count - 1);
    if (seen <= 0) return;
    product<false>(queries.scores.from(i), values, queries.out.from(row + i), count,
                   call.vectors(), seen, true);
  });
}

// out (total_tokens, heads * head_dim); logsumexp (total_tokens, heads) or null.
inline void write_out(const Attention& call, const Queries& queries, int64_t first_token, int rows,
                      int key_head, float* out, float* logsumexp) {
  for (int head = 0; head < call.group(); ++head) {
    const int query_head = key_head * call.group() + head;
    for (int i = 0; i < rows; ++i) {
      const int64_t row = static_cast<int64_t>(head) * rows + i;
      const int64_t at = (first_token + i) * call.num_heads + query_head;
      const float inverse = 1.0f / queries.sums[row];
      const float* from = queries.out.row(row);
      float* to = out + at * call.head_dim;
#pragma GCC ivdep
      for (int j = 0; j < call.head_dim; ++j) to[j] = from[j] * inverse;
      if (logsumexp) logsumexp[at] = kLn2 * queries.maxima[row] + std::log(queries.sums[row]);
    }
  }
}

}  // namespace mmalign
