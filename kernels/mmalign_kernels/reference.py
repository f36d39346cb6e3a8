"""The plain-PyTorch meaning of every operation."""

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100


def _wide(x: Tensor) -> Tensor:
    """Half precisions widen to fp32 for arithmetic; fp32 and fp64 stay."""
    return x if x.dtype == torch.float64 else x.float()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = _wide(x)
    rstd = (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (wide * rstd * _wide(weight)).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    new_residual = x + residual
    return rms_norm(new_residual, weight, eps), new_residual


def project_image_features(
    image_features: Tensor,
    weight: Tensor,
    bias: Tensor,
    hidden_states: Tensor,
    image_positions: Tensor,
    norm_weight: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    projected = F.linear(image_features, weight, bias)
    hidden_states = hidden_states.index_copy(0, image_positions.long(), projected)
    return hidden_states, rms_norm(hidden_states, norm_weight, eps)


def _attend(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, causal: bool) -> Tensor:
    bounds = cu_seqlens.tolist()
    outs = []
    for begin, end in zip(bounds, bounds[1:], strict=False):
        parts = (x[begin:end].transpose(0, 1)[None] for x in (q, k, v))  # (1, heads, length, dim)
        out = F.scaled_dot_product_attention(
            *parts, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1]
        )
        outs.append(out[0].transpose(0, 1).flatten(1))
    return torch.cat(outs)


def rotary_attention(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    num_attention_heads: int,
    num_key_value_heads: int,
    causal: bool = True,
) -> Tensor:
    num_rotated = num_attention_heads + num_key_value_heads
    heads = qkv.unflatten(1, (num_rotated + num_key_value_heads, -1))
    rotated, v = heads.split((num_rotated, num_key_value_heads), 1)
    cos, sin = cos[position_ids][:, None], sin[position_ids][:, None]
    first, second = _wide(rotated).chunk(2, -1)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(qkv.dtype)
    q, k = rotated.split((num_attention_heads, num_key_value_heads), 1)
    return _attend(q, k, v, cu_seqlens, causal)


def full_attention(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, num_attention_heads: int
) -> Tensor:
    q, k, v = qkv.unflatten(1, (3, num_attention_heads, -1)).unbind(1)
    return _attend(q, k, v, cu_seqlens, causal=False)


def swiglu(gate_up: Tensor) -> Tensor:
    gate, up = _wide(gate_up).chunk(2, -1)
    return (F.silu(gate) * up).to(gate_up.dtype)


def linear_cross_entropy(
    hidden_states: Tensor, lm_head_weight: Tensor, target_ids: Tensor
) -> Tensor:
    rows = (target_ids != IGNORE_INDEX).nonzero().squeeze(1)
    logits = _wide(F.linear(hidden_states[rows], lm_head_weight))
    return F.cross_entropy(logits, target_ids[rows], reduction="sum")


def target_logprobs(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    target_ids: Tensor,
    target_rows: Tensor | None = None,
) -> Tensor:
    rows = torch.arange(len(target_ids)) if target_rows is None else target_rows
    logprobs = _wide(F.linear(hidden_states, lm_head_weight)).log_softmax(-1)
    return logprobs[rows, target_ids]


def pack_rows(x: Tensor, positions: Tensor) -> Tensor:
    return x.index_select(0, positions)


def unpack_rows(packed: Tensor, positions: Tensor, num_rows: int) -> Tensor:
    return packed.new_zeros(num_rows, *packed.shape[1:]).index_copy(0, positions, packed)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def quick_gelu(x: Tensor) -> Tensor:
    wide = _wide(x)
    return (wide * torch.sigmoid(1.702 * wide)).to(x.dtype)


@torch.no_grad()
def adamw_step(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    *,
    step: int,
    learning_rate: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    grad_scale: Tensor | None = None,
    remainders: list[Tensor] | None = None,
    seed: int | None = None,
) -> None:
    for param, grad, exp_avg, exp_avg_sq in zip(params, grads, exp_avgs, exp_avg_sqs, strict=True):
        if grad_scale is not None:
            grad = grad * grad_scale
        param.mul_(1 - learning_rate * weight_decay)
        exp_avg.lerp_(grad, 1 - beta1)
        exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        denominator = (exp_avg_sq.sqrt() / (1 - beta2**step) ** 0.5).add_(eps)
        param.addcdiv_(exp_avg, denominator, value=-learning_rate / (1 - beta1**step))
