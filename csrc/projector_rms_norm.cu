// Projector and first RMSNorm in one launch, for Hopper.
//
//   new_hidden[position of i] = image_features[i] @ weight^T + bias; other rows unchanged
//   normed = new_hidden * rstd * norm_weight, rstd = 1 / sqrt(mean(new_hidden^2) + eps)
//
// fp32 accumulation; new_hidden is rounded to its dtype first, and rstd is that of the rounded
// values.
//
// A cluster of up to eight blocks owns 128 image rows and all their columns, so the row statistics
// are combined through its shared memory and no row is read back from memory for them. Each block
// owns passes of 256 columns (4,096: two passes; 3,200: two passes of 224). One warp loads tiles by
// TMA, of the features an eighth for the whole cluster. Two warpgroups multiply 64 x 256 each, add
// the bias, round, write the residual rows and sum the squares. After the last pass each sends its
// sums to all blocks of the cluster, scales what it holds in registers and what it wrote before (by
// itself, so it may read it, from L2), and continues with the next 128 rows, whose tiles are in
// flight by then. Meanwhile three warps norm the text rows; the others help when their image rows
// are done. Rows are summed in a fixed order: deterministic.
//
// Columns: multiples of 8 up to 16,384. Features: multiples of 8. bf16 and fp16; sm_90a only.
//
// T rows of H, M of them image rows of D features, bf16. FLOPs: 2MDH. Bytes from and to memory:
// reads 2MD + 2DH + 2(T - M)H, writes 4TH. M = 6912, T = 8192, D = 1024, H = 4096: 58 GFLOP and 168
// MB. From L2 come also, per 128 rows, the weight once, the features twice and half of the residual
// rows: 490 MB, what a product alone in tiles of 128 x 256 reads.
//
// Remaining cost: 54 row blocks on at most 16 clusters are four rounds, the last one 3/8 full; and
// a warpgroup does not multiply while it writes.
//
// The backward pass is Triton's and cuBLAS's (cuda/projector.py says why).
// Not measured on a GPU yet, so Triton's two launches are the default.
#include "arguments.h"
#include "device.h"
#include "ops.h"
#include "projector_product.cuh"
#include "tensor_map.h"

#include <algorithm>

namespace mmalign {
namespace {

// sm_90a only: the launcher rejects other GPUs, and an image built without the suffix traps.
template <class T, int N>
__global__ void __launch_bounds__(kThreads, 1)
    projector_kernel(const __grid_constant__ CUtensorMap features,  // (num_images, features)
                     const __grid_constant__ CUtensorMap weight,    // (columns, features)
                     const __grid_constant__ Projection<T> call) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ char raw[];
  char* shared = raw + (kPatternBytes - shared_address(raw) % kPatternBytes) % kPatternBytes;
  run_block<T, N>(call, shared, &features, &weight);
#else
  __trap();
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
    refuse("this GPU has no room for a cluster of " + std::to_string(plan.cluster) +
           " blocks. Use the triton backend");
  const int wanted = std::max(ceil_div(p.num_images, kTileRows),
                              ceil_div(p.num_tokens, plan.cluster * kThreads / kWarp));
  config.gridDim = dim3(std::min(resident, wanted) * plan.cluster);
  p.mark_words = ceil_div(ceil_div<int64_t>(p.num_tokens, config.gridDim.x), int64_t{32});
  if (p.mark_words > kMaxMarkWords)
    refuse("hidden_states has " + std::to_string(p.num_tokens) + " rows, this GPU takes " +
           std::to_string(int64_t{kMaxMarkWords} * 32 * config.gridDim.x));
  const CUtensorMap features = rows_map(call.image_features, kTileRows / plan.cluster);
  const CUtensorMap weight = rows_map(call.weight, N);
  check_cuda(cudaLaunchKernelEx(&config, kernel, features, weight, p), kName);
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
  const auto check = [&](const char* name, const Tensor& x, std::initializer_list<int64_t> shape) {
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

void check_gpu() {
  const int major = device_attribute(cudaDevAttrComputeCapabilityMajor);
  const int minor = device_attribute(cudaDevAttrComputeCapabilityMinor);
  if (major != 9)
    refuse("needs a Hopper GPU (compute capability 9.0), this one has " + std::to_string(major) +
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
  const int64_t num_tokens = hidden_states.size(0);
  call.rstd = torch::stable::new_empty(hidden_states, {num_tokens, 1}, ScalarType::Float);
  if (num_tokens > 0) {
    const torch::stable::accelerator::DeviceGuard guard(hidden_states.get_device_index());
    check_gpu();
    if (image_features.scalar_type() == ScalarType::Half) forward<__half>(call);
    else forward<__nv_bfloat16>(call);
  }
  return {call.new_hidden, call.normed, call.rstd};
}

}  // namespace mmalign
