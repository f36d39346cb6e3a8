// The projector's product: loading, multiplying, and the epilogue. csrc/host runs it, too.
#pragma once

#include "projector_rows.cuh"

namespace mmalign {

constexpr int kConsumerWarps = kConsumers * kWarpgroup / kWarp;
constexpr int kFetchWarp = kConsumerWarps, kTextWarps = 3;
constexpr int kThreads = (kConsumerWarps + 1 + kTextWarps) * kWarp;
constexpr int kConsumerRegisters = 224, kOtherRegisters = 56;  // of 168 each at the start

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// The same in every thread, read once.
struct Place {
  ProjectorShared layout;
  char* shared;
  int cluster, rank;  // blocks of the cluster, this block among them

  __device__ uint64_t* barrier(int i) const {
    return reinterpret_cast<uint64_t*>(shared + layout.barriers()) + i;
  }
  __device__ uint64_t* full(int stage) const { return barrier(stage); }
  __device__ uint64_t* empty(int stage) const { return barrier(kStages + stage); }
  __device__ uint64_t* summed(int parity, int group) const {
    return barrier(2 * kStages + parity * kConsumers + group);
  }
  __device__ uint64_t* marked() const { return barrier(2 * kStages + 2 * kConsumers); }
  __device__ unsigned* taken() const {
    return reinterpret_cast<unsigned*>(barrier(2 * kStages + 2 * kConsumers + 1));
  }
  __device__ uint32_t* marks() const {
    return reinterpret_cast<uint32_t*>(shared + layout.marks());
  }
  // Of the rows r and r + 8 of a warpgroup, by rank and r's number among such pairs.
  __device__ float2* sums(int parity, int group, int from, int pair) const {
    return reinterpret_cast<float2*>(shared + layout.sums()) +
           ((parity * kConsumers + group) * cluster + from) * 32 + pair;
  }
  template <class T>
  __device__ T* bias(int pass) const {
    return reinterpret_cast<T*>(shared + layout.bias()) + pass * layout.tile_columns;
  }
  template <class T>
  __device__ T* norm_weight(int pass) const {
    return reinterpret_cast<T*>(shared + layout.norm_weight()) + pass * layout.tile_columns;
  }
};

template <class T, int N>
__device__ __forceinline__ Place place_of_block(const Projection<T>& call, char* shared) {
  Place at;
  at.cluster = cluster_size();
  at.rank = cluster_rank();
  at.layout = {N, at.cluster, call.passes, call.mark_words};
  at.shared = shared;
  return at;
}

// Barriers, marks, and this block's part of bias and norm weight, zero outside the columns.
template <class T, int N>
__device__ __forceinline__ void prepare(const Projection<T>& call, const Place& at) {
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      barrier_init(at.full(stage), 1);
      barrier_init(at.empty(stage), at.cluster * kConsumerWarps);
    }
    for (int parity = 0; parity < 2; ++parity)
      for (int group = 0; group < kConsumers; ++group) barrier_init(at.summed(parity, group), 1);
    barrier_init(at.marked(), kTextWarps);
    *at.taken() = 0;
    barrier_init_fence();
  }
  for (int i = threadIdx.x; i < call.mark_words; i += kThreads) at.marks()[i] = 0;
  for (int i = threadIdx.x; i < call.passes * N; i += kThreads) {
    const int column = first_column(N, at.cluster, at.rank, i / N) + i % N;
    const bool inside = column < call.columns;
    at.bias<T>(0)[i] = inside ? call.bias[column] : narrow<T>(0.f);
    at.norm_weight<T>(0)[i] = inside ? call.norm_weight[column] : narrow<T>(0.f);
  }
}

// One thread: tiles of all this cluster's row blocks, one stage after the other.
template <class T, int N>
__device__ __forceinline__ void fetch(const Projection<T>& call, const Place& at,
                                      const CUtensorMap* features, const CUtensorMap* weight) {
  const int num_blocks = ceil_div(call.num_images, kTileRows);
  const auto everybody = static_cast<uint16_t>((1 << at.cluster) - 1);
  uint32_t step = 0;
  for (int block = cluster_index(); block < num_blocks; block += num_clusters())
    for (int pass = 0; pass < call.passes; ++pass)
      for (int depth = 0; depth < call.features; depth += kTileDepth, ++step) {
        const int stage = step % kStages;
        barrier_wait(at.empty(stage), step / kStages % 2 ^ 1);  // a new barrier does not block
        barrier_arrive_expect(at.full(stage), at.layout.stage_bytes());
        tensor_load_multicast(at.shared + at.layout.slice(stage, at.rank), features,
                              at.full(stage), depth,
                              block * kTileRows + at.rank * at.layout.slice_rows(), everybody);
        tensor_load(at.shared + at.layout.weight(stage), weight, at.full(stage), depth,
                    first_column(N, at.cluster, at.rank, pass));
      }
}

// A warp has read a stage: every block of the cluster hears it, because each fetches into all.
__device__ __forceinline__ void release(const Place& at, uint32_t step) {
  const int lane = threadIdx.x % kWarp;
  if (lane < at.cluster) barrier_arrive_remote(at.empty(step % kStages), lane);
}

// 64 rows of a tile. `step` counts stages since the start.
template <class T, int N>
__device__ __forceinline__ void multiply(const Projection<T>& call, const Place& at, int group,
                                         uint32_t& step, float (&total)[N / 2]) {
  const int num_steps = ceil_div(call.features, kTileDepth);
  const uint32_t base = shared_address(at.shared);
#pragma unroll
  for (int i = 0; i < N / 2; ++i) total[i] = 0;
  for (int k = 0; k < num_steps; ++k, ++step) {
    const int stage = step % kStages;
    barrier_wait(at.full(stage), step / kStages % 2);
    wgmma_fence();
#pragma unroll
    for (int part = 0; part < kTileDepth / 16; ++part)
      Wgmma<T, N>::run(total, features_operand(at.layout, base, stage, group, part),
                       weight_operand(at.layout, base, stage, part), true);
    wgmma_commit();
    if (k > 0) {
      wgmma_wait<1>();
      release(at, step - 1);
    }
  }
  wgmma_wait<0>();
  hold(total);
  release(at, step - 1);
}

// What a thread keeps of a tile: of two rows, eight columns of every 32.
template <int N>
using Held = Packed[N / 32][2];

// Bias, rounding, squares of the rounded; and eight neighbouring columns in each thread.
template <class T, int N>
__device__ __forceinline__ void finish(const T* bias, const float (&total)[N / 2], Held<N>& held,
                                       float (&squares)[2]) {
  const int thread = thread_of_warpgroup(), q = thread % 4;
#pragma unroll
  for (int group = 0; group < N / 32; ++group) {
    __syncwarp();  // keeps the compiler from loading all of the bias first, into registers we lack
    uint32_t words[2][4];
    float part[2] = {0, 0};  // a short chain of sums: a long one keeps what it waits for alive
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int i = (group * 4 + j) * 4;
      const auto* two = reinterpret_cast<const uint32_t*>(bias + accumulator_column(thread, i));
      const float2 add = unpack_two(*two, T());
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float* sum = total + i + 2 * half;
        words[half][j] = pack(sum[0] + add.x, sum[1] + add.y, T());
        const float2 rounded = unpack_two(words[half][j], T());
        part[half] += rounded.x * rounded.x + rounded.y * rounded.y;
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int round = 1 + i / 2, pair = i % 2;
        const uint32_t sent = transpose_sends(words[half], q, round, pair);
        transpose_takes(words[half], q, round, pair, __shfl_xor_sync(0xffffffffu, sent, round));
      }
      squares[half] += part[half];
      held[group][half] = {words[half][0], words[half][1], words[half][2], words[half][3]};
    }
  }
}

// f(group, half, element of the packed rows, column of the tile) for what a thread holds of a tile
// and lies inside; rows: the packed rows, or -1.
template <int N, class T, class F>
__device__ __forceinline__ void each_vector(const Projection<T>& call, const Place& at, int pass,
                                            const int (&rows)[2], F f) {
  const int first = first_column(N, at.cluster, at.rank, pass), thread = thread_of_warpgroup();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t begin = static_cast<int64_t>(rows[half]) * call.columns;
#pragma unroll
    for (int group = 0; group < N / 32; ++group) {
      const int column = vector_column(thread, group);
      if (rows[half] >= 0 && first + column < call.columns)
        f(group, half, begin + first + column, column);
    }
  }
}

// 1 / rms of a thread's two rows, from what every block of the cluster summed. The buffers and
// barriers are two, taken in turns: who sends for one row block has heard everybody's sums of the
// one before, and so everybody has read those before that.
template <class T>
__device__ __forceinline__ void share_squares(const Projection<T>& call, const Place& at, int group,
                                              uint32_t turn, float (&squares)[2],
                                              float (&factor)[2]) {
  const int thread = thread_of_warpgroup();
  const int parity = turn % 2, pair = thread / 4;
  uint64_t* barrier = at.summed(parity, group);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    squares[half] += __shfl_xor_sync(0xffffffffu, squares[half], 1);
    squares[half] += __shfl_xor_sync(0xffffffffu, squares[half], 2);
  }
  if (thread == 0) barrier_arrive_expect(barrier, at.cluster * 32 * sizeof(float2));
  for (int to = thread % 4; to < at.cluster; to += 4)
    store_remote(at.sums(parity, group, at.rank, pair), barrier, to,
                 make_float2(squares[0], squares[1]));
  barrier_wait<true>(barrier, turn / 2 % 2);
  float2 sum = make_float2(0, 0);
  for (int from = 0; from < at.cluster; ++from) {
    const float2 part = *at.sums(parity, group, from, pair);
    sum.x += part.x;
    sum.y += part.y;
  }
  factor[0] = rsqrtf(sum.x * call.per_column + call.eps);
  factor[1] = rsqrtf(sum.y * call.per_column + call.eps);
}

// A warpgroup: 64 rows of every row block of the cluster, this block's columns.
template <class T, int N>
__device__ __forceinline__ void project(const Projection<T>& call, const Place& at, int group) {
  uint32_t step = 0;
  for (uint32_t turn = 0;; ++turn) {
    const int block = cluster_index() + turn * num_clusters(), thread = thread_of_warpgroup();
    if (block >= ceil_div(call.num_images, kTileRows)) return;
    int rows[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int image =
          block * kTileRows + group * kWarpgroupRows + accumulator_row(thread, 2 * half);
      rows[half] = image < call.num_images ? packed_row(call, image) : -1;
    }
    Held<N> held;
    float squares[2] = {0, 0}, factor[2];
    for (int pass = 0; pass < call.passes; ++pass) {
      float total[N / 2];
      multiply<T, N>(call, at, group, step, total);
      finish<T, N>(at.bias<T>(pass), total, held, squares);
      each_vector<N>(call, at, pass, rows, [&](int i, int half, int64_t to, int) {
        store(call.new_hidden + to, held[i][half]);
      });
    }
    share_squares(call, at, group, turn, squares, factor);
    if (at.rank == 0 && thread_of_warpgroup() % 4 == 0)
      for (int half = 0; half < 2; ++half)
        if (rows[half] >= 0) call.rstd[rows[half]] = factor[half];
    for (int pass = call.passes - 1;; --pass) {
      each_vector<N>(call, at, pass, rows, [&](int i, int half, int64_t to, int column) {
        const Packed weight = *reinterpret_cast<Packed*>(at.norm_weight<T>(pass) + column);
        store(call.normed + to, normalized<T>(held[i][half], factor[half], weight));
      });
      if (pass == 0) break;
      for (auto& vectors : held)
        for (Packed& vector : vectors) vector = {};
      each_vector<N>(call, at, pass - 1, rows, [&](int i, int half, int64_t from, int) {
        held[i][half] = *reinterpret_cast<const Packed*>(call.new_hidden + from);
      });
    }
  }
}

// A block of the kernel; shared: from a multiple of 1024.
template <class T, int N>
__device__ __forceinline__ void run_block(const Projection<T>& call, char* shared,
                                          const CUtensorMap* features, const CUtensorMap* weight) {
  const Place at = place_of_block<T, N>(call, shared);
  prepare<T, N>(call, at);
  __syncthreads();
  cluster_sync();  // the barriers of all blocks are there before anybody sends
  const int warp = threadIdx.x / kWarp;
  if (warp < kConsumerWarps) {
    take_registers<kConsumerRegisters>();
    project<T, N>(call, at, warp / (kWarpgroup / kWarp));
    barrier_wait(at.marked(), 0);
    norm_text_rows(call, at.marks(), at.taken());
  } else {
    give_registers<kOtherRegisters>();
    if (warp > kFetchWarp) {
      mark_image_rows(call, at.marks(), threadIdx.x - (kFetchWarp + 1) * kWarp, kTextWarps * kWarp);
      __syncwarp();
      if (threadIdx.x % kWarp == 0) barrier_arrive(at.marked());
      barrier_wait(at.marked(), 0);
      norm_text_rows(call, at.marks(), at.taken());
    } else if (threadIdx.x % kWarp == 0) {
      fetch<T, N>(call, at, features, weight);
    }
  }
  __syncwarp();
  cluster_sync();  // no block leaves while others write to its shared memory
}

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

}  // namespace mmalign
