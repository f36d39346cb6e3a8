// Which queries a worker of the persistent attention kernel processes next.
//
// An item is a tile of queries of one head of one sample. Items are ordered by sample, the longest
// first, so that the last items are short; within a sample, heads whose keys and values fit into
// the L2 cache together are neighbours, then tiles with the most keys come first, then the heads of
// a tile. Workers draw items from one counter.
//
// Why not all tiles from expensive to cheap: the tiles of one sample would be far apart, and with
// 8,192 tokens of 32 heads of 128 columns keys and values are 128 MiB, so every tile would read
// them from memory again: 2.5 times for samples of 512 tokens, where memory limits the kernel.
//
// The table is computed on the device from cu_seqlens, one thread per sample, without
// synchronising.
#pragma once

#include "host_device.h"

namespace mmalign {

constexpr int kQueryRows = 128;  // of a tile
constexpr int kKeyRows = 128;
constexpr int64_t kCachedBytes = 24 << 20;  // of keys and values, in an L2 cache of 50 MB

struct AttentionShape {
  int num_heads, num_key_heads, head_dim;
};

// An entry of the table, in the order of samples; an extra one at the end has the number of items.
struct alignas(16) ScheduledSample {
  int first_item, first_row, length, num_tiles;
};

// What an item is. num_key_tiles = 0: nothing is left.
struct AttentionWork {
  int first_row;  // of the sample
  int length;     // of the sample
  int tile, head, num_key_tiles;
};

// Items are no more than this; all that the host knows without synchronising.
inline int64_t most_items(int64_t num_tokens, int64_t num_samples, int64_t num_heads) {
  return (num_tokens / kQueryRows + num_samples) * num_heads;
}

// Writes a sample's entry; the last in the order also writes the end.
HOST_DEVICE void schedule_sample(const int* cu_seqlens, int num_samples, int sample, int num_heads,
                                 ScheduledSample* table) {
  const int length = cu_seqlens[sample + 1] - cu_seqlens[sample];
  const int num_tiles = ceil_div(length, kQueryRows);
  int place = 0, tiles_before = 0;
  for (int other = 0; other < num_samples; ++other) {
    const int theirs = cu_seqlens[other + 1] - cu_seqlens[other];
    if (theirs > length || (theirs == length && other < sample)) {
      ++place;
      tiles_before += ceil_div(theirs, kQueryRows);
    }
  }
  table[place] = {tiles_before * num_heads, cu_seqlens[sample], length, num_tiles};
  if (place == num_samples - 1)
    table[num_samples] = {(tiles_before + num_tiles) * num_heads, 0, 0, 0};
}

// Query heads that process a sample together.
HOST_DEVICE int heads_together(const AttentionShape& shape, int length) {
  const int64_t bytes = static_cast<int64_t>(4) * shape.head_dim * length;  // of a key head
  const int64_t fit = kCachedBytes / bytes;
  const int key_heads =
      fit < 1 ? 1 : fit < shape.num_key_heads ? static_cast<int>(fit) : shape.num_key_heads;
  return key_heads * (shape.num_heads / shape.num_key_heads);
}

// The work of an item. place: 0 at first, advances with a worker's items.
HOST_DEVICE AttentionWork work_of_item(const ScheduledSample* table, int num_samples,
                                       const AttentionShape& shape, bool causal, int item,
                                       int& place) {
  while (place < num_samples && item >= table[place + 1].first_item) ++place;
  if (place == num_samples) return {0, 0, 0, 0, 0};
  const ScheduledSample sample = table[place];
  const int together = heads_together(shape, sample.length);
  int rest = item - sample.first_item;
  const int first_head = rest / (sample.num_tiles * together) * together;
  rest -= first_head * sample.num_tiles;
  const int left = shape.num_heads - first_head;
  const int heads = together < left ? together : left;
  const int tile = sample.num_tiles - 1 - rest / heads;
  const int num_key_tiles = causal ? tile + 1 : ceil_div(sample.length, kKeyRows);
  return {sample.first_row, sample.length, tile, first_head + rest % heads, num_key_tiles};
}

}  // namespace mmalign
