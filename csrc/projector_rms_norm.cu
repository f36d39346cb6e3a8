// Projector and first RMSNorm in one launch, for Hopper.
//
//   new_hidden[position of i] = image_features[i] @ weight^T + bias; other rows as they come in
//   normed = new_hidden * rstd * norm_weight, rstd = 1 / sqrt(mean(new_hidden^2) + eps)
//
// fp32 sums; new_hidden is rounded to its type first, and its mean is that of the rounded values.
//
// A cluster of up to eight blocks owns 128 image rows and all their columns, so the row statistics
// meet over its shared memory and the rows never come back from memory for them. Each block owns
// passes x 256 of the columns (4,096: two passes; 3,200: two passes of 224), one warp of it fetches
// tiles by TMA (every block an eighth of the rows' features, for all of the cluster), two warpgroups
// multiply 64 x 256 each, add the bias, round, write the residual rows and sum the squares. After
// the last pass each sends its 64 sums to all blocks of the cluster, scales what it holds in
// registers and what it wrote before (itself, so it may read it: from L2), and goes on with the next
// 128 rows, whose tiles are on their way by then. The three warps beside the one that fetches norm
// the text rows meanwhile; the others help when their image rows are done.
//
// T rows of H, M of them images' of D features, bf16. FLOPs: 2MDH. Bytes from and to memory: reads
// 2MD + 2DH + 2(T - M)H, writes 4TH. M = 6912, T = 8192, D = 1024, H = 4096: 58 GFLOP, 0.09 ms at
// 650 TFLOP/s; 168 MB, 0.056 ms at 3 TB/s, most of it inside the former. From L2 come besides, for
// each 128 rows, the weight once and half of their residual rows: 480 MB, as much as a product
// alone in tiles of 128 x 256 takes.
//
// Cost that remains: 54 row blocks on at most 16 clusters are four rounds, the last one 3/8 full;
// and a warpgroup does not multiply while it writes.
//
// Beats: unmeasured, so Triton's two launches stay the default. Expected: 1.3 times the speed of
// cuBLAS's product, scatter and norm (0.09 + 0.04 + 0.05 ms) and of the Triton operation.
#include "arguments.h"
#include "device.h"
#include "ops.h"
#include "projector_rows.cuh"
#include "tensor_map.h"

#include <algorithm>

namespace mmalign {
namespace {

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
    for (int i = 0; i < 2 * kConsumers; ++i) barrier_init(at.summed(i / kConsumers, i % kConsumers), 1);
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
  const int rows = kTileRows / at.cluster;  // of the features that this block fetches for all
  const auto everybody = static_cast<uint16_t>((1 << at.cluster) - 1);
  uint32_t step = 0;
  for (int block = cluster_index(); block < num_blocks; block += num_clusters())
    for (int pass = 0; pass < call.passes; ++pass)
      for (int depth = 0; depth < call.features; depth += kTileDepth, ++step) {
        const int stage = step % kStages;
        barrier_wait(at.empty(stage), step / kStages % 2 ^ 1);  // a new barrier lets pass
        barrier_arrive_expect(at.full(stage), at.layout.stage_bytes());
        char* to = at.shared + at.layout.features(stage) + at.rank * rows * kSwizzleBytes;
        tensor_load_multicast(to, features, at.full(stage), depth, block * kTileRows + at.rank * rows,
                              everybody);
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
    const uint64_t a = matrix_descriptor(
        base + at.layout.features(stage) + group * kWarpgroupRows * kSwizzleBytes, kPatternBytes);
    const uint64_t b = matrix_descriptor(base + at.layout.weight(stage), kPatternBytes);
    barrier_wait(at.full(stage), step / kStages % 2);
    wgmma_fence();
#pragma unroll
    for (int part = 0; part < kTileDepth / 16; ++part)
      Wgmma<T, N>::run(total, advance(a, part * 32), advance(b, part * 32), true);
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

// Asked anew where it is needed: what follows from it would else be kept in registers through the
// product.
__device__ __forceinline__ int thread_of_warpgroup() {
  unsigned thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return static_cast<int>(thread % kWarpgroup);
}

// Two neighbours, rounded and packed, and back.
__device__ __forceinline__ uint32_t pack(float x, float y, __half) {
  return bits_as<uint32_t>(__floats2half2_rn(x, y));
}
__device__ __forceinline__ uint32_t pack(float x, float y, __nv_bfloat16) {
  return bits_as<uint32_t>(__floats2bfloat162_rn(x, y));
}
__device__ __forceinline__ float2 unpack_two(uint32_t two, __half) {
  return __half22float2(bits_as<__half2>(two));
}
__device__ __forceinline__ float2 unpack_two(uint32_t two, __nv_bfloat16) {
  return make_float2(__uint_as_float(two << 16), __uint_as_float(two & 0xffff0000u));
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
      const int image = block * kTileRows + group * kWarpgroupRows + accumulator_row(thread, 2 * half);
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

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

// Empty on other architectures: the launcher refuses their cards.
template <class T, int N>
__global__ void __launch_bounds__(kThreads, 1)
    projector_kernel(const __grid_constant__ CUtensorMap features,  // (num_images, features)
                     const __grid_constant__ CUtensorMap weight,    // (columns, features)
                     const __grid_constant__ Projection<T> call) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ char raw[];
  char* shared = raw + (kPatternBytes - shared_address(raw) % kPatternBytes) % kPatternBytes;
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
      fetch<T, N>(call, at, &features, &weight);
    }
  }
  __syncwarp();
  cluster_sync();  // no block leaves while others write to its shared memory
#endif
}

struct Forward {
  const Tensor &image_features, &weight, &bias, &hidden_states, &image_positions, &norm_weight;
  double eps;
  Tensor new_hidden, normed, rstd;
};

template <class T>
Projection<T> projection(const Forward& call, const ProjectorPlan& plan) {
  Projection<T> p = {};
  p.text = static_cast<const T*>(call.hidden_states.data_ptr());
  p.bias = static_cast<const T*>(call.bias.data_ptr());
  p.norm_weight = static_cast<const T*>(call.norm_weight.data_ptr());
  p.positions = call.image_positions.data_ptr();
  p.new_hidden = static_cast<T*>(call.new_hidden.data_ptr());
  p.normed = static_cast<T*>(call.normed.data_ptr());
  p.rstd = static_cast<float*>(call.rstd.data_ptr());
  p.eps = static_cast<float>(call.eps);
  p.positions_are_wide = call.image_positions.scalar_type() == ScalarType::Long;
  p.num_images = static_cast<int>(call.image_features.size(0));
  p.num_tokens = static_cast<int>(call.hidden_states.size(0));
  p.columns = static_cast<int>(call.hidden_states.size(1));
  p.features = static_cast<int>(call.image_features.size(1));
  p.per_column = 1.f / static_cast<float>(p.columns);
  p.passes = plan.passes;
  return p;
}

constexpr const char* kName = "project_image_features_fwd";

[[noreturn]] void refuse(const std::string& why) {
  throw std::runtime_error(std::string(kName) + ": " + why);
}

// Rows of a matrix as stages take them: kTileDepth columns of num_rows rows.
CUtensorMap rows_map(const Tensor& matrix, int num_rows) {
  const auto rows = static_cast<cuuint64_t>(matrix.size(0));
  const auto columns = static_cast<cuuint64_t>(matrix.size(1));
  if (rows == 0) return {};  // never used
  return tensor_map<2>(matrix.scalar_type(), matrix.data_ptr(), {columns, rows}, {columns * 2},
                       {kTileDepth, static_cast<cuuint32_t>(num_rows)});
}

template <class T, int N>
void launch(const Forward& call, const ProjectorPlan& plan) {
  const auto kernel = projector_kernel<T, N>;
  Projection<T> p = projection<T>(call, plan);
  ProjectorShared layout = {N, plan.cluster, plan.passes, kMaxMarkWords};
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned>(plan.cluster), 1, 1};
  cudaLaunchConfig_t config = {};
  config.blockDim = dim3(kThreads);
  config.gridDim = dim3(plan.cluster);
  config.stream = current_stream(call.hidden_states);
  config.attrs = &cluster;
  config.numAttrs = 1;
  config.dynamicSmemBytes = layout.bytes() + kPatternBytes;
  allow_shared(kernel, config.dynamicSmemBytes);
  int resident = 0;
  check_cuda(cudaOccupancyMaxActiveClusters(&resident, kernel, &config), "clusters");
  if (resident == 0)
    refuse("this card has no room for a cluster of " + std::to_string(plan.cluster) +
           " blocks. Use the triton backend");
  const int wanted = std::max(ceil_div(p.num_images, kTileRows),
                              ceil_div(p.num_tokens, plan.cluster * kThreads / kWarp));
  config.gridDim = dim3(std::min(resident, wanted) * plan.cluster);
  p.mark_words = ceil_div(ceil_div<int64_t>(p.num_tokens, config.gridDim.x), int64_t{32});
  if (p.mark_words > kMaxMarkWords)
    refuse("hidden_states has " + std::to_string(p.num_tokens) + " rows, this card takes " +
           std::to_string(int64_t{kMaxMarkWords} * 32 * config.gridDim.x));
  check_cuda(cudaLaunchKernelEx(&config, kernel, rows_map(call.image_features, kTileRows / plan.cluster),
                                rows_map(call.weight, N), p),
             kName);
}

void check_rows_of_vectors(const char* name, const Tensor& x, int64_t most) {
  const int64_t columns = x.size(1);
  if (columns == 0 || columns % 8 || columns > most)
    refuse(std::string(name) + " has " + std::to_string(columns) +
           " columns, the kernel takes multiples of 8 up to " + std::to_string(most));
}

// Everything about one tensor: its shape follows from image_features and hidden_states.
void check_arguments(const Forward& call) {
  const Tensor &features = call.image_features, &hidden = call.hidden_states;
  const Argument first(kName, "image_features", features);
  const Argument second(kName, "hidden_states", hidden);
  first.rank(2).typed({ScalarType::BFloat16, ScalarType::Half}).contiguous().aligned(16);
  second.rank(2).typed({features.scalar_type()}).contiguous().aligned(16);
  first.below_2_31("rows", features.size(0)).below_2_31("columns", features.size(1));
  second.below_2_31("rows", hidden.size(0));
  check_rows_of_vectors("image_features", features, int64_t{1} << 30);
  check_rows_of_vectors("hidden_states", hidden, kMaxColumns);
  const int64_t columns = hidden.size(1);
  const auto check = [&](const char* name, const Tensor& x, std::vector<int64_t> shape) {
    Argument(kName, name, x)
        .shaped(shape, "image_features and hidden_states")
        .typed({features.scalar_type()})
        .contiguous()
        .aligned(16);
  };
  check("weight", call.weight, {columns, features.size(1)});
  check("bias", call.bias, {columns});
  check("norm_weight", call.norm_weight, {columns});
  const Argument positions(kName, "image_positions", call.image_positions);
  positions.shaped({features.size(0)}, "image_features");
  positions.typed({ScalarType::Long, ScalarType::Int}).contiguous();
  first.on_gpu();
  second.beside(first);
  positions.beside(first);
  Argument(kName, "weight", call.weight).beside(first);
  Argument(kName, "bias", call.bias).beside(first);
  Argument(kName, "norm_weight", call.norm_weight).beside(first);
}

void check_card() {
  const int major = device_attribute(cudaDevAttrComputeCapabilityMajor);
  const int minor = device_attribute(cudaDevAttrComputeCapabilityMinor);
  if (major != 9)
    refuse("needs a Hopper card (compute capability 9.0), this one has " + std::to_string(major) +
           "." + std::to_string(minor) + ". Use the triton backend");
}

template <class T>
void forward(const Forward& call) {
  const ProjectorPlan plan = projector_plan(static_cast<int>(call.hidden_states.size(1)));
  plan.tile_columns == kWideTile ? launch<T, kWideTile>(call, plan)
                                 : launch<T, kNarrowTile>(call, plan);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> project_image_features_fwd(
    const Tensor& image_features, const Tensor& weight, const Tensor& bias,
    const Tensor& hidden_states, const Tensor& image_positions, const Tensor& norm_weight,
    double eps) {
  Forward call{image_features,  weight, bias, hidden_states, image_positions,
               norm_weight, eps,    hidden_states, hidden_states, hidden_states};
  check_arguments(call);
  call.new_hidden = torch::stable::empty_like(hidden_states);
  call.normed = torch::stable::empty_like(hidden_states);
  call.rstd = torch::stable::new_empty(hidden_states, {hidden_states.size(0), 1}, ScalarType::Float);
  if (hidden_states.size(0) > 0) {
    const torch::stable::accelerator::DeviceGuard guard(hidden_states.get_device_index());
    check_card();
    if (image_features.scalar_type() == ScalarType::Half) forward<__half>(call);
    else forward<__nv_bfloat16>(call);
  }
  return {call.new_hidden, call.normed, call.rstd};
}

}  // namespace mmalign
