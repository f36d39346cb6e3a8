// Rotary attention, forward: softmax(q k^T / sqrt(head_dim)) v within each packed sample.
//
// A work item is one key head of one sample and up to kChunk of its queries, for all query heads
// that share the key head. Per block of keys: k is rotated as it is read and transposed once, the
// scores of a block of queries stay in the L1 cache, and the softmax is online (Milakov and
// Gimelshein 2018, arXiv 1805.02867), in base 2.
#include "attention_samples.h"
#include "rotary_attention.h"
#include "work.h"

namespace mmalign {

namespace {

constexpr int kChunk = 8 * kBlock;

struct Item {
  int sample, key_head, first_query, num_queries;
};

struct Tiles {
  Matrix keys, transposed_keys, values;  // (kBlock, dim), (dim, kBlock), (kBlock, dim)
  Matrix queries, out;                   // (group * kChunk, dim)
  Matrix scores;                         // (kBlock, kBlock)
  float* maxima;                         // (group * kChunk,)
  float* sums;
};

Tiles take_tiles(const Attention& call, int rows, Scratch& scratch) {
  const int dim = call.padded_dim();
  const size_t blocks = 3 * static_cast<size_t>(kBlock) * dim + kBlock * kBlock;
  scratch.reserve(blocks + static_cast<size_t>(rows) * (2 * dim + 2) + 8 * 16);
  Tiles tiles;
  tiles.keys = scratch.take(kBlock, dim);
  tiles.transposed_keys = scratch.take(dim, kBlock);
  tiles.values = scratch.take(kBlock, dim);
  tiles.scores = scratch.take(kBlock, kBlock);
  tiles.queries = scratch.take(rows, dim);
  tiles.out = scratch.take(rows, dim);
  tiles.maxima = scratch.take(1, rows).at;
  tiles.sums = scratch.take(1, rows).at;
  return tiles;
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

// Adds one block of keys to `rows` queries from `row` of a chunk.
void add_keys(const Attention& call, const Tiles& tiles, int row, int rows, int query,
              int first_key, int num_keys) {
  const auto seen_by = [&](int i) { return visible_keys(call.causal, query + i, first_key, num_keys); };
  for_row_groups(rows, [&](int i, int count) {
    const int seen = seen_by(i + count - 1);
    if (seen <= 0) return;
    product<false>(tiles.queries.from(row + i), tiles.transposed_keys, tiles.scores.from(i), count,
                   ceil_div(seen, kLanes), call.head_dim, false);
    for (int j = i; j < i + count; ++j) {
      softmax_row(tiles.scores.row(j), std::max(0, seen_by(j)), ceil_div(seen, kLanes),
                  tiles.maxima[row + j], tiles.sums[row + j], tiles.out.row(row + j),
                  call.vectors());
    }
  });
  for_row_groups(rows, [&](int i, int count) {
    const int seen = seen_by(i + count - 1);
    if (seen <= 0) return;
    product<false>(tiles.scores.from(i), tiles.values, tiles.out.from(row + i), count,
                   call.vectors(), seen, true);
  });
}

void attend(const Attention& call, const Item& item, float* out, float* logsumexp,
            Scratch& scratch) {
  const int group = call.group(), dim = call.head_dim, rows = item.num_queries;
  const int64_t begin = call.begin(item.sample), first_token = begin + item.first_query;
  const Tiles tiles = take_tiles(call, group * rows, scratch);
  for (int head = 0; head < group; ++head) {
    const int column = (item.key_head * group + head) * dim;
    const Matrix to{tiles.queries.row(head * rows), tiles.queries.stride};
    gather_rows(call, first_token, column, rows, true, call.scale() * kLog2E, to);
  }
  std::fill_n(tiles.out.at, static_cast<size_t>(group) * rows * tiles.out.stride, 0.0f);
  std::fill_n(tiles.maxima, group * rows, kMinusInfinity);
  std::fill_n(tiles.sums, group * rows, 0.0f);
  const int length = call.length(item.sample);
  const int num_keys = call.causal ? item.first_query + rows : length;
  const int key_column = (call.num_heads + item.key_head) * dim;
  const int value_column = key_column + call.num_key_value_heads * dim;
  for (int key = 0; key < num_keys; key += kBlock) {
    const int keys = std::min(kBlock, num_keys - key);
    gather_rows(call, begin + key, key_column, keys, true, 1.0f, tiles.keys);
    transpose_block(tiles.keys, keys, call.vectors(), tiles.transposed_keys);
    gather_rows(call, begin + key, value_column, keys, false, 1.0f, tiles.values);
    for (int head = 0; head < group; ++head) {
      for (int block = 0; block < rows; block += kBlock) {
        add_keys(call, tiles, head * rows + block, std::min(kBlock, rows - block),
                 item.first_query + block, key, keys);
      }
    }
  }
  for (int head = 0; head < group; ++head) {
    const int query_head = item.key_head * group + head;
    for (int i = 0; i < rows; ++i) {
      const int row = head * rows + i;
      const int64_t at = (first_token + i) * call.num_heads + query_head;
      const float inverse = 1.0f / tiles.sums[row];
      for (int j = 0; j < dim; ++j) out[at * dim + j] = tiles.out.row(row)[j] * inverse;
      logsumexp[at] = kLn2 * tiles.maxima[row] + std::log(tiles.sums[row]);
    }
  }
}

}  // namespace

void rotary_attention_forward(const Attention& call, float* out, float* logsumexp) {
  std::vector<Item> items;
  std::vector<double> costs;
  for (int sample = 0; sample < call.num_samples; ++sample) {
    const int length = call.length(sample);
    for (int query = 0; query < length; query += kChunk) {
      const int rows = std::min(kChunk, length - query);
      for (int head = 0; head < call.num_key_value_heads; ++head) {
        items.push_back({sample, head, query, rows});
        costs.push_back(static_cast<double>(rows) * (call.causal ? query + rows : length));
      }
    }
  }
  share_work(costs, [&](int index) {
    thread_local Scratch scratch;
    attend(call, items[index], out, logsumexp, scratch);
  });
}

}  // namespace mmalign
