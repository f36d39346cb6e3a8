"""How each library computes attention within packed samples, rotated or not.

The inputs hold qkv (tokens, 3 * heads * head_dim) of samples of `lengths`; `rotary` says whether q
and k turn with their positions, `causal` whether a token looks ahead. Libraries that know no
rotation of packed samples get q and k from a compiled one. Masks and index tables, which a model
makes once for all its layers, are made untimed.
"""

from collections.abc import Callable
from functools import cache
from inspect import signature
from itertools import pairwise
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.peers import Inputs, library, liger
from bench.variants import Layout


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Half-split rotation: x (..., head_dim), cos and sin (..., head_dim / 2), in their type."""
    first, second = x.chunk(2, -1)
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
    return turned.to(x.dtype)


@cache
def _compiled() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return torch.compile(rotate)


def compiled_rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return _compiled()(x, cos, sin)


def packed_heads(inputs: Inputs, turn=rotate) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v (tokens, heads, head_dim), rotated where the inputs ask for it."""
    q, k, v = inputs.qkv.view(len(inputs.qkv), 3, inputs.num_heads, -1).unbind(1)
    if not inputs.rotary:
        return q, k, v
    rows = inputs.position_ids
    cos, sin = inputs.cos[rows][:, None], inputs.sin[rows][:, None]
    return turn(q, cos, sin), turn(k, cos, sin), v


def sample_by_sample(inputs: Inputs) -> Tensor:
    """PyTorch's attention on one sample after another."""
    q, k, v = packed_heads(inputs)
    outs = []
    for begin, end in pairwise(inputs.offsets):
        q1, k1, v1 = (x[begin:end].transpose(0, 1)[None] for x in (q, k, v))
        out = F.scaled_dot_product_attention(q1, k1, v1, is_causal=inputs.causal)
        outs.append(out[0].transpose(0, 1).flatten(1))
    return torch.cat(outs)


def flex(inputs: Inputs) -> Tensor:
    """PyTorch's flex_attention with a mask by documents; only fast when compiled."""
    from torch.nn.attention.flex_attention import flex_attention

    q, k, v = (x.transpose(0, 1)[None] for x in packed_heads(inputs))
    out = flex_attention(q, k, v, block_mask=inputs.block_mask)
    return out[0].transpose(0, 1).flatten(1)


def _with_block_mask(inputs: Inputs) -> Inputs:
    from torch.nn.attention.flex_attention import create_block_mask

    lengths = torch.tensor(inputs.lengths, device=inputs.qkv.device)
    sample = torch.repeat_interleave(lengths)
    causal = inputs.causal

    def allowed(batch, head, row, column):
        same = sample[row] == sample[column]
        return same & (row >= column) if causal else same

    tokens = len(inputs.qkv)
    inputs.block_mask = create_block_mask(allowed, None, None, tokens, tokens, device=sample.device)
    return inputs


FLEX = Layout(enter=_with_block_mask)


def torch_varlen(inputs: Inputs) -> Tensor:
    varlen_attn = library("torch.nn.attention.varlen").varlen_attn
    causal = {"window_size": (-1, 0 if inputs.causal else -1)}
    if "window_size" not in signature(varlen_attn).parameters:  # before torch 2.11
        causal = {"is_causal": inputs.causal}
    offsets, longest = inputs.cu_seqlens, inputs.max_seqlen
    q, k, v = packed_heads(inputs, compiled_rotate)
    return varlen_attn(q, k, v, offsets, offsets, longest, longest, **causal).flatten(1)


def flash(inputs: Inputs) -> Tensor:
    """flash-attn's own rotation, which restarts in every sample."""
    offsets, longest = inputs.cu_seqlens, inputs.max_seqlen
    q, k, v = inputs.qkv.view(len(inputs.qkv), 3, inputs.num_heads, -1).unbind(1)
    if inputs.rotary:
        turn = library("flash_attn.layers.rotary").apply_rotary_emb
        cos, sin = (x[:longest].to(q.dtype) for x in (inputs.cos, inputs.sin))
        q, k = (turn(x, cos, sin, cu_seqlens=offsets, max_seqlen=longest) for x in (q, k))
    attention = library("flash_attn").flash_attn_varlen_func
    return attention(q, k, v, offsets, offsets, longest, longest, causal=inputs.causal).flatten(1)


def flash3(inputs: Inputs) -> Tensor:
    q, k, v = packed_heads(inputs, compiled_rotate)
    out = library("flash_attn_interface").flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q=inputs.cu_seqlens,
        cu_seqlens_k=inputs.cu_seqlens,
        max_seqlen_q=inputs.max_seqlen,
        max_seqlen_k=inputs.max_seqlen,
        causal=inputs.causal,
    )
    return (out[0] if isinstance(out, tuple) else out).flatten(1)  # older: with the logsumexp


def xformers(inputs: Inputs) -> Tensor:
    q, k, v = (x[None] for x in packed_heads(inputs, compiled_rotate))
    attention = library("xformers.ops").memory_efficient_attention
    return attention(q, k, v, attn_bias=inputs.bias)[0].flatten(1)


def _with_bias(inputs: Inputs) -> Inputs:
    biases = library("xformers.ops.fmha.attn_bias")
    kind = biases.BlockDiagonalCausalMask if inputs.causal else biases.BlockDiagonalMask
    inputs.bias = kind.from_seqlens(inputs.lengths)
    return inputs


XFORMERS = Layout(enter=_with_bias)


# padded batches: one sample a row, padding on the right


def _pad(inputs: Inputs) -> Inputs:
    """q, k, v (samples, longest, heads * head_dim), as three projections leave them."""
    samples, longest = len(inputs.lengths), inputs.max_seqlen
    device = inputs.qkv.device
    starts = torch.arange(samples, device=device) * longest
    lengths = torch.tensor(inputs.lengths, device=device)
    within = torch.cat([torch.arange(n, device=device) for n in inputs.lengths])
    padded = SimpleNamespace(**vars(inputs))
    padded.rows = torch.repeat_interleave(starts, lengths) + within
    for name, x in zip("qkv", inputs.qkv.chunk(3, 1), strict=True):
        whole = x.new_zeros(samples * longest, x.shape[1]).index_copy(0, padded.rows, x)
        setattr(padded, name, whole.view(samples, longest, -1))
    if inputs.rotary:
        turned = [x[None, :longest].to(inputs.qkv.dtype) for x in (inputs.cos, inputs.sin)]
        padded.cos, padded.sin = (torch.cat([x, x], -1) for x in turned)  # as transformers has them
    places = torch.arange(longest, device=device)
    mask = (places < lengths[:, None])[:, None, None]
    if inputs.causal:
        mask = mask & (places[:, None] >= places)
    padded.mask = None if mask.all() else mask.expand(samples, 1, longest, longest).contiguous()
    return padded


def _unpad(inputs: Inputs, output: Tensor) -> Tensor:
    return output.reshape(-1, output.shape[-1])[inputs.rows]


PADDED = Layout(("q", "k", "v"), _pad, _unpad)


def _padded_heads(inputs: Inputs) -> list[Tensor]:
    shape = (len(inputs.lengths), inputs.max_seqlen, inputs.num_heads, -1)
    return [x.view(shape).transpose(1, 2) for x in (inputs.q, inputs.k, inputs.v)]


def _together(output: Tensor) -> Tensor:
    return output.transpose(1, 2).flatten(2)


def transformers_sdpa(inputs: Inputs) -> Tensor:
    """LlamaAttention's steps between its projections; CLIP's where nothing is rotated."""
    q, k, v = _padded_heads(inputs)
    if inputs.rotary:
        llama = library("transformers.models.llama.modeling_llama")
        q, k = llama.apply_rotary_pos_emb(q, k, inputs.cos, inputs.sin)
    return _together(F.scaled_dot_product_attention(q, k, v, attn_mask=inputs.mask))


def liger_sdpa(inputs: Inputs) -> Tensor:
    """The same with liger-kernel's rotation; it has no attention of its own."""
    q, k, v = _padded_heads(inputs)
    q, k = liger().liger_rope(q, k, inputs.cos, inputs.sin)
    return _together(F.scaled_dot_product_attention(q, k, v, attn_mask=inputs.mask))


def cudnn_sdpa(inputs: Inputs) -> Tensor:
    """cuDNN's fused attention; causal on right padding, it needs no mask."""
    q, k, v = _padded_heads(inputs)
    if inputs.rotary:
        half = inputs.cos.shape[-1] // 2
        cos, sin = inputs.cos[..., :half], inputs.sin[..., :half]
        q, k = compiled_rotate(q, cos, sin), compiled_rotate(k, cos, sin)
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        mask = None if inputs.causal else inputs.mask
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=inputs.causal)
    return _together(out)
