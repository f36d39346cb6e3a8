// Rotary attention, forward: softmax(q k^T / sqrt(head_dim)) v within each packed sample.
//
// A work item is one key head of one sample and up to kChunk of its queries, for all query heads
// that share the key head. Per block of keys: k is rotated as it is read and transposed once, and
// the scores of a block of queries stay in the cache.
#include "online_softmax.h"
#include "rotary_attention.h"
#include "work.h"

namespace mmalign {

namespace {

struct Item {
  int sample, key_head, first_query, num_queries;
};

void attend(const Attention& call, const Item& item, float* out, float* logsumexp,
            Scratch& scratch) {
  const int group = call.group(), rows = item.num_queries;
  const int64_t begin = call.begin(item.sample), first_token = begin + item.first_query;
  const Queries queries = read_queries(call, first_token, rows, item.key_head, scratch);
  const int num_keys = call.causal ? item.first_query + rows : call.length(item.sample);
  const int key_column = (call.num_heads + item.key_head) * call.head_dim;
  const int value_column = key_column + call.num_key_value_heads * call.head_dim;
  for (int key = 0; key < num_keys; key += kBlock) {
    const int keys = std::min(kBlock, num_keys - key);
    gather_rotated(call, begin + key, key_column, keys, 1.0f, queries.keys);
    transpose_block(queries.keys, keys, call.vectors(), queries.transposed_keys);
    copy_rows(call.rows(begin + key, value_column), keys, call.head_dim, queries.values);
    for (int head = 0; head < group; ++head) {
      for (int block = 0; block < rows; block += kBlock) {
        const int query = item.first_query + block;
        add_keys(call, queries, queries.values, head * rows + block, std::min(kBlock, rows - block),
                 [&](int i) { return visible_keys(call.causal, query + i, key, keys); });
      }
    }
  }
  write_out(call, queries, first_token, rows, item.key_head, out, logsumexp);
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
