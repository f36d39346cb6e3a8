#pragma once

#include "attention_samples.h"

namespace mmalign {

// out (total_tokens, heads * head_dim), logsumexp (total_tokens, heads).
void rotary_attention_forward(const Attention& call, float* out, float* logsumexp);

// grad_qkv, of qkv's shape, from grad_out and the forward pass's out and logsumexp.
void rotary_attention_backward(const Attention& call, const float* grad_out, const float* out,
                               const float* logsumexp, float* grad_qkv);

}  // namespace mmalign
