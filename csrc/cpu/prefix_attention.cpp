// Rotary attention of segments over spans of a KV cache.
//
// A work item is one key head and up to kChunk consecutive rows: neighbouring segments that share
// all spans but their last, so that a block of shared keys is read and transposed once for all of
// them, or a part of one long segment.
#include "prefix_attention.h"

#include "online_softmax.h"
#include "work.h"

namespace mmalign {

namespace {

struct Item {
  int first_segment, num_segments, first_row, num_rows;  // first_row: in the first segment
};

class PrefixAttention {
 public:
  PrefixAttention(const Attention& call, const PrefixCache& cache) : call_(call), cache_(cache) {}

  void write_cache(int segment) const {
    const int length = call_.length(segment), dim = call_.head_dim;
    const int heads = call_.num_key_value_heads;
    for (int i = 0; i < length; ++i) {
      const int64_t token = call_.begin(segment) + i, slot = own_end(segment) - length + i;
      const float* keys = call_.qkv + token * call_.columns() + call_.num_heads * dim;
      for (int head = 0; head < heads; ++head) {
        float* to = cache_.keys + slot * row() + head * dim;
        rotate_row(call_, token, keys + head * dim, to, 1.0f, false);
      }
      std::memcpy(cache_.values + slot * row(), keys + heads * dim, row() * sizeof(float));
    }
  }

  std::vector<Item> items() const {
    std::vector<Item> items;
    for (int segment = 0; segment < call_.num_samples; ++segment) {
      const int length = call_.length(segment);
      if (!items.empty() && length + items.back().num_rows <= kChunk && joins(items.back(), segment)) {
        ++items.back().num_segments;
        items.back().num_rows += length;
        continue;
      }
      for (int row = 0; row < length; row += kChunk) {
        items.push_back({segment, 1, row, std::min(kChunk, length - row)});
      }
    }
    return items;
  }

  double cost(const Item& item) const {
    double keys = 0;
    for (int span = first_span(item); span <= last_span(item.first_segment); ++span) {
      keys += cache_.span_ends[span] - cache_.span_begins[span];
    }
    return keys * item.num_rows;
  }

  void attend(const Item& item, int key_head, float* out, Scratch& scratch) const {
    const int64_t first_token = call_.begin(item.first_segment) + item.first_row;
    const int rows = item.num_rows;
    const Queries queries = read_queries(call_, first_token, rows, key_head, scratch);
    for (int span = first_span(item); span < last_span(item.first_segment); ++span) {
      const int begin = cache_.span_begins[span], end = cache_.span_ends[span];
      add_span(queries, key_head, rows, 0, rows, begin, end, end - begin, 0);
    }
    for (int i = 0, row = 0; i < item.num_segments; ++i) {
      const int segment = item.first_segment + i, span = last_span(segment);
      const int length = call_.length(segment), begin = cache_.span_begins[span];
      const int count = item.num_segments == 1 ? rows : length;
      const int before = cache_.span_ends[span] - length - begin;  // keys ahead of the own ones
      const int seen_first = before + 1 + (i == 0 ? item.first_row : 0);
      add_span(queries, key_head, rows, row, count, begin, begin + seen_first + count - 1,
               seen_first, 1);
      row += count;
    }
    write_out(call_, queries, first_token, rows, key_head, out, nullptr);
  }

 private:
  int64_t row() const { return static_cast<int64_t>(call_.num_key_value_heads) * call_.head_dim; }
  int first_span(const Item& item) const { return cache_.cu_spans[item.first_segment]; }
  int last_span(int segment) const { return cache_.cu_spans[segment + 1] - 1; }
  int64_t own_end(int segment) const { return cache_.span_ends[last_span(segment)]; }

  // Whether a segment follows the item's first one in all spans but the last.
  bool joins(const Item& item, int segment) const {
    const int a = cache_.cu_spans[item.first_segment], b = cache_.cu_spans[segment];
    const int count = last_span(segment) - b;
    if (item.first_row || last_span(item.first_segment) - a != count) return false;
    return std::equal(cache_.span_begins + a, cache_.span_begins + a + count,
                      cache_.span_begins + b) &&
           std::equal(cache_.span_ends + a, cache_.span_ends + a + count, cache_.span_ends + b);
  }

  // Adds cache rows begin to end - 1 to `count` rows from `row` of an item of `rows`: the first of
  // them sees `seen_first`, each further one `step` more.
  void add_span(const Queries& queries, int key_head, int rows, int row, int count, int begin,
                int end, int seen_first, int step) const {
    const int dim = call_.head_dim;
    for (int key = begin; key < end; key += kBlock) {
      const int keys = std::min(kBlock, end - key);
      const int64_t at = key * this->row() + key_head * dim;
      copy_rows({cache_.keys + at, this->row()}, keys, dim, queries.keys);
      transpose_block(queries.keys, keys, call_.vectors(), queries.transposed_keys);
      copy_rows({cache_.values + at, this->row()}, keys, dim, queries.values);
      for (int head = 0; head < call_.group(); ++head) {
        for (int block = 0; block < count; block += kBlock) {
          const int seen = seen_first + step * block - (key - begin);
          add_keys(call_, queries, queries.values, static_cast<int64_t>(head) * rows + row + block,
                   std::min(kBlock, count - block),
                   [&](int i) { return std::min(keys, seen + step * i); });
        }
      }
    }
  }

  const Attention& call_;
  const PrefixCache& cache_;
};

}  // namespace

void prefix_attention(const Attention& call, const PrefixCache& cache, float* out) {
  const PrefixAttention attention(call, cache);
  std::vector<double> costs;
  for (int segment = 0; segment < call.num_samples; ++segment) costs.push_back(call.length(segment));
  share_work(costs, [&](int segment) { attention.write_cache(segment); });
  const std::vector<Item> items = attention.items();
  costs.clear();
  for (const Item& item : items) {
    costs.insert(costs.end(), call.num_key_value_heads, attention.cost(item));
  }
  share_work(costs, [&](int index) {
    thread_local Scratch scratch;
    const int heads = call.num_key_value_heads;
    attention.attend(items[index / heads], index % heads, out, scratch);
  });
}

}  // namespace mmalign
