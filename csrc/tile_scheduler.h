// Work of a persistent attention kernel on packed samples: which tile of which sample comes next.
//
// Sample s has the rows cu_seqlens[s] .. cu_seqlens[s + 1]; a tile is tile_rows of them. With a
// causal mask tile i of a sample reads i + 1 tiles of keys, without one it reads all of them. Tiles
// are ordered from the most to the least expensive and assigned to workers in a snake order, so the
// loads of all workers differ by at most one tile. Every function needs only cu_seqlens, and
// threads fill the table without communication or synchronisation with the host.
#pragma once

#include "host_device.h"

namespace mmalign {

struct Tile {
  int sample;
  int index;  // of the tile in its sample
};

struct PackedSamples {
  const int* cu_seqlens;  // (num_samples + 1,)
  int num_samples;
  int tile_rows;
  bool causal;

  HOST_DEVICE int num_tiles(int sample) const {
    return ceil_div(cu_seqlens[sample + 1] - cu_seqlens[sample], tile_rows);
  }

  HOST_DEVICE int num_tiles() const {
    int sum = 0;
    for (int sample = 0; sample < num_samples; ++sample) sum += num_tiles(sample);
    return sum;
  }

  // Tiles of keys that a tile reads.
  HOST_DEVICE int cost(const Tile& tile) const {
    return causal ? tile.index + 1 : num_tiles(tile.sample);
  }

  // Upper bound of the number of tiles, known to the host without synchronising.
  static int most_tiles(int num_samples, int num_tokens, int tile_rows) {
    return num_tokens / tile_rows + num_samples;
  }

  // The tile-th tile, sample after sample. tile < num_tiles()
  HOST_DEVICE Tile in_packed_order(int tile) const {
    int sample = 0;
    for (; tile >= num_tiles(sample); ++sample) tile -= num_tiles(sample);
    return {sample, tile};
  }

  // Its place from expensive to cheap; ties in packed order.
  HOST_DEVICE int place(const Tile& tile) const {
    const int own = num_tiles(tile.sample);
    int before = causal ? 0 : tile.index;
    for (int sample = 0; sample < num_samples; ++sample) {
      const int count = num_tiles(sample);
      if (causal) {  // later tiles of every sample; of earlier samples this tile's row, too
        const int first = tile.index + (sample < tile.sample ? 0 : 1);
        before += count > first ? count - first : 0;
      } else if (count > own || (count == own && sample < tile.sample)) {
        before += count;
      }
    }
    return before;
  }
};

// Fills table (num_tiles,) from expensive to cheap; each of num_threads threads calls it once.
HOST_DEVICE void order_tiles(const PackedSamples& samples, int thread, int num_threads,
                             Tile* table) {
  const int num_tiles = samples.num_tiles();
  for (int i = thread; i < num_tiles; i += num_threads) {
    const Tile tile = samples.in_packed_order(i);
    table[samples.place(tile)] = tile;
  }
}

// The item of a worker in round `turn`; after the last item: none, as in all later rounds. Items
// are (tile, head) with the heads of a tile next to each other.
HOST_DEVICE int64_t item_of_turn(int worker, int num_workers, int turn) {
  const int along = turn % 2 ? num_workers - 1 - worker : worker;
  return static_cast<int64_t>(turn) * num_workers + along;
}

}  // namespace mmalign
