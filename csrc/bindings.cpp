// Schemas of mmalign_cuda::*, through PyTorch's stable ABI (csrc/ops.h says how to add one).
//
// CPU tensors reach the same functions: these check their arguments and then say which one is not
// on a CUDA device.
#include "ops.h"

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(mmalign_cuda, library) {
  library.def("rms_norm_fwd(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)");
  library.def(
      "add_rms_norm_fwd(Tensor x, Tensor residual, Tensor weight, float eps)"
      " -> (Tensor, Tensor, Tensor)");
  library.def(
      "rms_norm_bwd(Tensor grad_y, Tensor? grad_residual, Tensor x, Tensor weight, Tensor rstd,"
      " bool needs_weight, Tensor(a!) counters) -> (Tensor, Tensor)");
  library.def(
      "project_image_features_fwd(Tensor image_features, Tensor weight, Tensor bias,"
      " Tensor hidden_states, Tensor image_positions, Tensor norm_weight, float eps)"
      " -> (Tensor, Tensor, Tensor)");
  library.def(
      "adamw_update(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs,"
      " Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] remainders, Tensor(e!)[] exp_avg_scales,"
      " Tensor(f!)[] exp_avg_sq_scales, Tensor? grad_scale, int step, float learning_rate,"
      " float beta1, float beta2, float eps, float weight_decay, int? seed) -> ()");
  library.def(
      "rotary_attention_fwd(Tensor qkv, Tensor cos, Tensor sin, Tensor position_ids,"
      " Tensor cu_seqlens, int num_attention_heads, int num_key_value_heads, bool causal)"
      " -> (Tensor, Tensor)");
  library.def(
      "rotary_attention_bwd(Tensor grad_out, Tensor qkv, Tensor out, Tensor logsumexp, Tensor cos,"
      " Tensor sin, Tensor position_ids, Tensor cu_seqlens, int num_attention_heads,"
      " int num_key_value_heads, bool causal) -> Tensor");
}

namespace {

void implement(torch::stable::detail::StableLibrary& library) {
  library.impl("rms_norm_fwd", TORCH_BOX(&mmalign::rms_norm_fwd));
  library.impl("add_rms_norm_fwd", TORCH_BOX(&mmalign::add_rms_norm_fwd));
  library.impl("rms_norm_bwd", TORCH_BOX(&mmalign::rms_norm_bwd));
  library.impl("project_image_features_fwd", TORCH_BOX(&mmalign::project_image_features_fwd));
  library.impl("adamw_update", TORCH_BOX(&mmalign::adamw_update));
  library.impl("rotary_attention_fwd", TORCH_BOX(&mmalign::rotary_attention_fwd));
  library.impl("rotary_attention_bwd", TORCH_BOX(&mmalign::rotary_attention_bwd));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mmalign_cuda, CUDA, library) { implement(library); }
STABLE_TORCH_LIBRARY_IMPL(mmalign_cuda, CPU, library) { implement(library); }
