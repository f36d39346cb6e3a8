// The operations of this library: one .cu file each, registered in bindings.cpp as mmalign_cuda::*.
//
// To add one: declare it here, define it in <operation>.cu (formula and bytes in its header, then
// kernels, then the launcher), register it in bindings.cpp, name the file in CMakeLists.txt, and
// add kernels/mmalign_kernels/cuda/<family>.py.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <vector>

namespace mmalign {

using torch::stable::Tensor;

std::tuple<Tensor, Tensor> rms_norm_fwd(const Tensor& x, const Tensor& weight, double eps);

std::tuple<Tensor, Tensor, Tensor> add_rms_norm_fwd(const Tensor& x, const Tensor& residual,
                                                    const Tensor& weight, double eps);

std::tuple<Tensor, Tensor> rms_norm_bwd(const Tensor& grad_y,
                                        const std::optional<Tensor>& grad_residual,
                                        const Tensor& x, const Tensor& weight, const Tensor& rstd,
                                        bool needs_weight, Tensor counters);

// New hidden states, their normalised rows, and rstd (num_tokens, 1).
std::tuple<Tensor, Tensor, Tensor> project_image_features_fwd(
    const Tensor& image_features, const Tensor& weight, const Tensor& bias,
    const Tensor& hidden_states, const Tensor& image_positions, const Tensor& norm_weight,
    double eps);

// exp_avgs and exp_avg_sqs: fp32, bf16, or uint8 codes with the scales of block_quantization.h;
// the scales are empty lists otherwise.
void adamw_update(const std::vector<Tensor>& params, const std::vector<Tensor>& grads,
                  const std::vector<Tensor>& exp_avgs, const std::vector<Tensor>& exp_avg_sqs,
                  const std::vector<Tensor>& remainders,
                  const std::vector<Tensor>& exp_avg_scales,
                  const std::vector<Tensor>& exp_avg_sq_scales,
                  const std::optional<Tensor>& grad_scale, int64_t step, double learning_rate,
                  double beta1, double beta2, double eps, double weight_decay,
                  std::optional<int64_t> seed);

// Output (num_tokens, num_attention_heads * head_dim), logsumexp (num_tokens, num_attention_heads).
std::tuple<Tensor, Tensor> rotary_attention_fwd(const Tensor& qkv, const Tensor& cos,
                                                const Tensor& sin, const Tensor& position_ids,
                                                const Tensor& cu_seqlens,
                                                int64_t num_attention_heads,
                                                int64_t num_key_value_heads, bool causal);

// Gradient of qkv.
Tensor rotary_attention_bwd(const Tensor& grad_out, const Tensor& qkv, const Tensor& out,
                            const Tensor& logsumexp, const Tensor& cos, const Tensor& sin,
                            const Tensor& position_ids, const Tensor& cu_seqlens,
                            int64_t num_attention_heads, int64_t num_key_value_heads, bool causal);

}  // namespace mmalign
