// Column sums of a matrix, finished by the launch that wrote their partial rows.
//
// Every block writes partial rows to global memory. The last block of a team to arrive sums the
// rows of its team, the last team to arrive sums those of the teams: two short chains instead of
// one block that reads everything. The last to arrive varies, the order of addition does not:
// deterministic.
//
// Counters are zero before and after a launch (atomicInc wraps), so consecutive launches on a
// stream share them.
#pragma once

#include "common.cuh"

namespace mmalign {

constexpr int kTeam = 16;           // blocks whose partial rows one block adds up
constexpr int kRowsInFlight = 16;   // loads of a thread before it adds the first
constexpr int kMaxCounters = 1024;  // one for the teams, one for each team

template <class W>
struct ColumnPartials {
  W* rows;             // (num_blocks * rows_per_block, columns)
  W* team_rows;        // (num_teams, columns)
  unsigned* counters;  // (kMaxCounters,)
};

constexpr int64_t num_teams(int64_t num_blocks) { return (num_blocks + kTeam - 1) / kTeam; }

// True in all threads of the block that arrives last of `size`. What every thread of all of them
// wrote to global memory before is then visible to it.
__device__ __forceinline__ bool last_to_arrive(unsigned* counter, unsigned size) {
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0 && threadIdx.y == 0) last = atomicInc(counter, size - 1) == size - 1;
  __syncthreads();
  if (last) __threadfence();
  return last;
}

// kLanes neighbouring sums; read from L2, because other multiprocessors wrote them.
template <class W, int kLanes>
struct alignas(sizeof(W) * kLanes) Sums {
  W lanes[kLanes];
};
__device__ __forceinline__ Sums<float, 4> load_sums(const Sums<float, 4>* at, bool inside) {
  return bits_as<Sums<float, 4>>(load_from_l2(at, inside));
}
template <class W>
__device__ __forceinline__ Sums<W, 1> load_sums(const Sums<W, 1>* at, bool inside) {
  return {inside ? __ldcg(&at->lanes[0]) : W(0)};
}

// The sum of num_rows rows, from the first to the last; `write(column, sum)` takes each.
template <int kLanes, class W, class Write>
__device__ __forceinline__ void add_rows(const W* rows, int num_rows, int columns, Write write) {
  const int num_threads = blockDim.x * blockDim.y;
  const int thread = threadIdx.y * blockDim.x + threadIdx.x;
  const int row_length = columns / kLanes;
  for (int at = thread; at < row_length; at += num_threads) {
    const auto* next = reinterpret_cast<const Sums<W, kLanes>*>(rows) + at;
    Sums<W, kLanes> sum = {};
    for (int row = 0; row < num_rows; row += kRowsInFlight, next += kRowsInFlight * row_length) {
      Sums<W, kLanes> parts[kRowsInFlight];  // zero past the last row
#pragma unroll
      for (int i = 0; i < kRowsInFlight; ++i)
        parts[i] = load_sums(next + i * row_length, row + i < num_rows);
#pragma unroll
      for (int i = 0; i < kRowsInFlight; ++i)
#pragma unroll
        for (int lane = 0; lane < kLanes; ++lane) sum.lanes[lane] += parts[i].lanes[lane];
    }
#pragma unroll
    for (int lane = 0; lane < kLanes; ++lane) write(at * kLanes + lane, sum.lanes[lane]);
  }
}

// Called by every thread of every block, after its part of partials.rows is written.
template <int kLanes, class T>
__device__ __forceinline__ void finish_column_sum(const ColumnPartials<Compute<T>>& partials,
                                                  int columns, T* __restrict__ out) {
  const int team = blockIdx.x / kTeam;
  const int team_size = min(kTeam, static_cast<int>(gridDim.x) - team * kTeam);
  if (!last_to_arrive(&partials.counters[1 + team], team_size)) return;
  const int64_t team_begin = static_cast<int64_t>(team) * kTeam * blockDim.y * columns;
  Compute<T>* team_row = partials.team_rows + static_cast<int64_t>(team) * columns;
  add_rows<kLanes>(partials.rows + team_begin, team_size * blockDim.y, columns,
                   [&](int column, Compute<T> sum) { team_row[column] = sum; });
  const int teams = static_cast<int>(num_teams(gridDim.x));
  if (!last_to_arrive(&partials.counters[0], teams)) return;
  add_rows<kLanes>(partials.team_rows, teams, columns,
                   [&](int column, Compute<T> sum) { out[column] = narrow<T>(sum); });
}

}  // namespace mmalign
