// AdamW: one pass over a list of parameters and their state, in place. adamw_element.h has the
// formula and the source of the random bits, the same as in triton/adamw.py.
//
// Tables of 40 tensors are passed as kernel arguments, so a launch copies nothing to the device; a
// 7B model takes eight launches instead of one per tensor (291). A block owns 2048 neighbours of
// one tensor, a thread four runs of four, all of whose loads are in flight before the first is
// used. Moments may be fp32, bf16 or 8-bit codes; grad_scale is read on the device, and if it is 0
// or NaN nothing changes.
//
// Bytes per element, gradient in the weight's dtype, fp32 moments: fp32 28, bf16 with split master
// 26, bf16 with stochastic rounding 22; bf16 moments 8 less, codes 12 less (plus 0.13 for scales).
// Not measured on a GPU yet.
#include "adamw_elements.cuh"
#include "arguments.h"
#include "device.h"
#include "ops.h"

namespace mmalign {
namespace {

constexpr int kThreads = kDrawRun / kFour;
constexpr int kRuns = kDrawTile / kDrawRun;
constexpr int kMinBlocks = 3;  // on a multiprocessor: 96 KiB of fp32 state in flight
constexpr int kTableSize = 40;  // with the settings below the 4 KiB that every driver takes

struct AdamwTable {
  AdamwTensor tensors[kTableSize];
  int num_tensors;
};

struct AdamwLaunch {
  AdamwSettings settings;
  const float* grad_scale;  // (), or null
  int64_t step;
  uint64_t seed;
};

static_assert(sizeof(AdamwTable) + sizeof(AdamwLaunch) <= 4096);

// The last tensor that begins at or before the tile.
__device__ __forceinline__ int find_tensor(const AdamwTable& table, int tile) {
  int low = 0, high = table.num_tensors - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (table.tensors[middle].tile_begin <= tile) low = middle; else high = middle - 1;
  }
  return low;
}

template <bool kWhole, Weights kWeights, class Grad, Moments kMoments>
__device__ __forceinline__ void update_tile(const AdamwTensor& x, const AdamwLaunch& launch,
                                            int64_t tile) {
  const int lane_begin = threadIdx.x * kFour;
  const int64_t begin = tile * kDrawTile + lane_begin;
  Weight<kWeights> weights[kRuns];
  Four<Grad> grads[kRuns];
  Moment<kMoments, false> firsts[kRuns];
  Moment<kMoments, true> seconds[kRuns];
#pragma unroll
  for (int run = 0; run < kRuns; ++run) {
    const int64_t at = begin + run * kDrawRun;
    grads[run] = read<kWhole, Grad>(x.grad, at, x.numel);
    firsts[run].template load<kWhole>(x.exp_avg, x.exp_avg_scale, at, x.numel);
    seconds[run].template load<kWhole>(x.exp_avg_sq, x.exp_avg_sq_scale, at, x.numel);
    weights[run].template load<kWhole>(x, at);
  }
  Words weight_draws[kFour] = {}, moment_draws[kFour] = {};
#pragma unroll
  for (int lane = 0; lane < kFour; ++lane) {
    if (kWeights == Weights::kRounded)
      weight_draws[lane] = adamw_draws(launch.seed, tile, lane_begin + lane, launch.step, x.place,
                                       kDrawsOfWeights);
    if (kMoments != Moments::kFp32)
      moment_draws[lane] = adamw_draws(launch.seed, tile, lane_begin + lane, launch.step, x.place,
                                       kDrawsOfMoments);
  }
  const float grad_scale = launch.grad_scale ? __ldg(launch.grad_scale) : 1.0f;
  // 0 or NaN: nothing is stored. Not a return: the compiler would move all loads behind it.
  const int64_t end = grad_scale > 0.0f ? x.numel : 0;
#pragma unroll
  for (int run = 0; run < kRuns; ++run) {
    const int64_t at = begin + run * kDrawRun;
    float m[kFour], v[kFour];
    uint32_t m_draws[kFour], v_draws[kFour];
#pragma unroll
    for (int lane = 0; lane < kFour; ++lane) {
      float p = weights[run].get(lane);
      m[lane] = firsts[run].get(lane);
      v[lane] = seconds[run].get(lane);
      const float g = upcast(grads[run].lanes[lane]) * grad_scale;
      adamw_element(launch.settings, g, p, m[lane], v[lane]);
      weights[run].set(lane, p, weight_draws[lane].word[run]);
      m_draws[lane] = moment_draws[lane].word[run];
      v_draws[lane] = moment_draws[lane].word[run] >> 16;
    }
    weights[run].template save<kWhole>(x, at, end);
    firsts[run].template save<kWhole>(x.exp_avg, x.exp_avg_scale, at, end, m, m_draws);
    seconds[run].template save<kWhole>(x.exp_avg_sq, x.exp_avg_sq_scale, at, end, v, v_draws);
  }
}

template <Weights kWeights, class Grad, Moments kMoments>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    adamw_kernel(const __grid_constant__ AdamwTable table,
                 const __grid_constant__ AdamwLaunch launch) {
  const AdamwTensor& x = table.tensors[find_tensor(table, blockIdx.x)];
  const int64_t tile = blockIdx.x - x.tile_begin;
  const uintptr_t addresses =
      reinterpret_cast<uintptr_t>(x.param) | reinterpret_cast<uintptr_t>(x.grad) |
      reinterpret_cast<uintptr_t>(x.remainder) | reinterpret_cast<uintptr_t>(x.exp_avg) |
      reinterpret_cast<uintptr_t>(x.exp_avg_sq);
  if (addresses % kVectorBytes == 0 && (tile + 1) * kDrawTile <= x.numel)
    update_tile<true, kWeights, Grad, kMoments>(x, launch, tile);
  else
    update_tile<false, kWeights, Grad, kMoments>(x, launch, tile);
}

struct Lists {
  const std::vector<Tensor>&params, &grads, &exp_avgs, &exp_avg_sqs, &remainders, &exp_avg_scales,
      &exp_avg_sq_scales;

  AdamwTensor entry(size_t i) const {
    const auto pointer = [i](const std::vector<Tensor>& list) {
      return list.empty() ? nullptr : list[i].data_ptr();
    };
    AdamwTensor x = {};
    x.param = pointer(params);
    x.remainder = static_cast<int16_t*>(pointer(remainders));
    x.grad = pointer(grads);
    x.exp_avg = pointer(exp_avgs);
    x.exp_avg_sq = pointer(exp_avg_sqs);
    x.exp_avg_scale = static_cast<float*>(pointer(exp_avg_scales));
    x.exp_avg_sq_scale = static_cast<float*>(pointer(exp_avg_sq_scales));
    x.numel = params[i].numel();
    x.place = static_cast<uint32_t>(i);
    return x;
  }
};

template <Weights kWeights, class Grad, Moments kMoments>
void launch_all(const Lists& lists, const AdamwLaunch& launch) {
  const cudaStream_t stream = current_stream(lists.params[0]);
  AdamwTable table = {};
  int64_t num_tiles = 0;
  const auto flush = [&] {
    if (num_tiles)
      adamw_kernel<kWeights, Grad, kMoments>
          <<<static_cast<unsigned>(num_tiles), kThreads, 0, stream>>>(table, launch);
    table.num_tensors = 0;
    num_tiles = 0;
  };
  for (size_t i = 0; i < lists.params.size(); ++i) {
    AdamwTensor x = lists.entry(i);
    const int64_t tiles = ceil_div<int64_t>(x.numel, kDrawTile);
    if (tiles == 0) continue;
    const bool full = table.num_tensors == kTableSize ||
                      num_tiles + tiles > std::numeric_limits<int32_t>::max();
    if (full) flush();
    x.tile_begin = static_cast<int>(num_tiles);
    table.tensors[table.num_tensors++] = x;
    num_tiles += tiles;
  }
  flush();
  check_cuda(cudaGetLastError(), "adamw_update");
}

template <Weights kWeights, class Grad>
void choose_moments(const Lists& lists, const AdamwLaunch& launch) {
  const ScalarType type = lists.exp_avgs[0].scalar_type();
  if (type == ScalarType::Float) launch_all<kWeights, Grad, Moments::kFp32>(lists, launch);
  else if (type == ScalarType::BFloat16) launch_all<kWeights, Grad, Moments::kBf16>(lists, launch);
  else launch_all<kWeights, Grad, Moments::kCodes>(lists, launch);
}

template <Weights kWeights>
void choose_grads(const Lists& lists, const AdamwLaunch& launch) {
  if (lists.grads[0].scalar_type() == ScalarType::Float)
    choose_moments<kWeights, float>(lists, launch);
  else
    choose_moments<kWeights, __nv_bfloat16>(lists, launch);
}

// Every list is as long as params, its tensors contiguous, of their shape and of one type.
void check_list(const Lists& lists, const char* name, const std::vector<Tensor>& list,
                std::initializer_list<ScalarType> types, bool scales = false) {
  constexpr const char* kName = "adamw_update";
  if (list.size() != lists.params.size())
    throw std::runtime_error(std::string(kName) + ": " + name + " has " +
                             std::to_string(list.size()) + " tensors beside " +
                             std::to_string(lists.params.size()) + " params");
  for (size_t i = 0; i < list.size(); ++i) {
    const Argument tensor(kName, name, list[i], i);
    const auto sizes = lists.params[i].sizes();
    if (scales)  // of any shape: the optimizer keeps them by rows where it shards them
      tensor.sized(ceil_div<int64_t>(lists.params[i].numel(), kQuantizedBlock), "params");
    else
      tensor.shaped(sizes.data(), sizes.size(), "params");
    tensor.typed(types).typed({list[0].scalar_type()}).contiguous();
  }
}

void check_devices(const Lists& lists) {
  const Argument first("adamw_update", "params", lists.params[0], 0);
  first.on_gpu();
  const std::pair<const char*, const std::vector<Tensor>&> named[] = {
      {"params", lists.params}, {"grads", lists.grads}, {"exp_avgs", lists.exp_avgs},
      {"exp_avg_sqs", lists.exp_avg_sqs}, {"remainders", lists.remainders},
      {"exp_avg_scales", lists.exp_avg_scales}, {"exp_avg_sq_scales", lists.exp_avg_sq_scales}};
  for (const auto& [name, list] : named)
    for (size_t i = 0; i < list.size(); ++i)
      Argument("adamw_update", name, list[i], i).beside(first);
}

void check(const Lists& lists, const std::optional<Tensor>& grad_scale, bool has_seed) {
  const ScalarType type = lists.params[0].scalar_type();
  check_list(lists, "params", lists.params, {ScalarType::Float, ScalarType::BFloat16});
  check_list(lists, "grads", lists.grads, {ScalarType::Float, type});
  const auto moments = {ScalarType::Float, ScalarType::BFloat16, ScalarType::Byte};
  check_list(lists, "exp_avgs", lists.exp_avgs, moments);
  const ScalarType moment = lists.exp_avgs[0].scalar_type();
  check_list(lists, "exp_avg_sqs", lists.exp_avg_sqs, {moment});
  if (moment == ScalarType::Byte || !lists.exp_avg_scales.empty())
    check_list(lists, "exp_avg_scales", lists.exp_avg_scales, {ScalarType::Float}, true);
  if (moment == ScalarType::Byte || !lists.exp_avg_sq_scales.empty())
    check_list(lists, "exp_avg_sq_scales", lists.exp_avg_sq_scales, {ScalarType::Float}, true);
  const bool splits = !lists.remainders.empty();
  if (splits) check_list(lists, "remainders", lists.remainders, {ScalarType::Short});
  if (splits && type == ScalarType::Float)
    throw std::runtime_error("adamw_update: remainders beside fp32 params");
  if (!has_seed && (moment != ScalarType::Float || (type == ScalarType::BFloat16 && !splits)))
    throw std::runtime_error("adamw_update: seed is missing, and bf16 or 8-bit state is rounded");
  if (grad_scale)
    Argument("adamw_update", "grad_scale", *grad_scale)
        .shaped({}, "params")
        .typed({ScalarType::Float});
  check_devices(lists);
  if (grad_scale)
    Argument("adamw_update", "grad_scale", *grad_scale)
        .beside(Argument("adamw_update", "params", lists.params[0], 0));
}

}  // namespace

void adamw_update(const std::vector<Tensor>& params, const std::vector<Tensor>& grads,
                  const std::vector<Tensor>& exp_avgs, const std::vector<Tensor>& exp_avg_sqs,
                  const std::vector<Tensor>& remainders,
                  const std::vector<Tensor>& exp_avg_scales,
                  const std::vector<Tensor>& exp_avg_sq_scales,
                  const std::optional<Tensor>& grad_scale, int64_t step, double learning_rate,
                  double beta1, double beta2, double eps, double weight_decay,
                  std::optional<int64_t> seed) {
  if (params.empty()) return;
  const Lists lists{params,     grads,          exp_avgs,         exp_avg_sqs,
                    remainders, exp_avg_scales, exp_avg_sq_scales};
  check(lists, grad_scale, seed.has_value());
  const torch::stable::accelerator::DeviceGuard guard(params[0].get_device_index());
  const AdamwLaunch launch{
      adamw_settings(step, learning_rate, beta1, beta2, eps, weight_decay),
      grad_scale ? static_cast<const float*>(grad_scale->data_ptr()) : nullptr, step,
      static_cast<uint64_t>(seed.value_or(0))};
  if (params[0].scalar_type() == ScalarType::Float)
    choose_moments<Weights::kFp32, float>(lists, launch);
  else if (remainders.empty())
    choose_grads<Weights::kRounded>(lists, launch);
  else
    choose_grads<Weights::kSplit>(lists, launch);
}

}  // namespace mmalign
