"""Attention within packed samples: rotary and causal in the decoder, full in the CLIP tower.

flash-attn, xformers and torch's varlen attention run as mmalign's backends of these names; their q
and k are rotated first. Masks and index tables, which a model makes once for all its layers, are
made untimed.
"""

from collections.abc import Callable
from functools import cache
from itertools import pairwise

import torch
import torch.nn.functional as F
from mmalign_kernels import costs, full_attention, rotary_attention
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.comparison import MATMUL, each
from bench.operation import Case, Operation, costs_of
from bench.peers import Inputs, Layout, Variant, library, liger, missing, on_gpu, ours
from bench.shapes import (
    DECODER_SHAPES,
    DEVICE,
    DTYPE,
    DTYPE_NAME,
    NAMES,
    ON_GPU,
    ONE_LONG,
    VISION_SHAPES,
    activations,
    cu_seqlens_of,
    position_ids_of,
    sample_lengths,
)
from mmalign.model.config import DecoderConfig, VisionConfig

# ---- ours ----


def our_rotary(i: Inputs) -> Tensor:
    heads = i.num_heads
    return rotary_attention(
        i.qkv, i.cos, i.sin, i.position_ids, i.cu_seqlens, i.max_seqlen, heads, heads
    )


def our_full(i: Inputs) -> Tensor:
    return full_attention(i.qkv, i.cu_seqlens, i.max_seqlen, i.num_heads)


# ---- packed samples: qkv (tokens, 3 * heads * head_dim), rotated where i.rotary ----


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Half-split rotation: x (..., head_dim), cos and sin (..., head_dim / 2), in their type."""
    first, second = x.chunk(2, -1)
    rotated = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
    return rotated.to(x.dtype)


@cache
def _compiled() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return torch.compile(rotate)


def compiled_rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return _compiled()(x, cos, sin)


def packed_heads(i: Inputs, rotation=rotate) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v (tokens, heads, head_dim), rotated where the inputs ask for it."""
    q, k, v = i.qkv.view(len(i.qkv), 3, i.num_heads, -1).unbind(1)
    if not i.rotary:
        return q, k, v
    rows = i.position_ids
    cos, sin = i.cos[rows][:, None], i.sin[rows][:, None]
    return rotation(q, cos, sin), rotation(k, cos, sin), v


def sample_by_sample(i: Inputs) -> Tensor:
    """PyTorch's attention on one sample after another."""
    q, k, v = packed_heads(i)
    outs = []
    for begin, end in pairwise(i.offsets):
        q1, k1, v1 = (x[begin:end].transpose(0, 1)[None] for x in (q, k, v))
        out = F.scaled_dot_product_attention(q1, k1, v1, is_causal=i.causal)
        outs.append(out[0].transpose(0, 1).flatten(1))
    return torch.cat(outs)


def flex(i: Inputs) -> Tensor:
    """PyTorch's flex_attention with a mask by documents; only fast when compiled."""
    from torch.nn.attention.flex_attention import flex_attention

    q, k, v = (x.transpose(0, 1)[None] for x in packed_heads(i))
    out = flex_attention(q, k, v, block_mask=i.block_mask)
    return out[0].transpose(0, 1).flatten(1)


def _with_block_mask(i: Inputs) -> Inputs:
    from torch.nn.attention.flex_attention import create_block_mask

    lengths = torch.tensor(i.lengths, device=i.qkv.device)
    sample = torch.repeat_interleave(lengths)
    causal = i.causal

    def allowed(batch, head, row, column):
        same = sample[row] == sample[column]
        return same & (row >= column) if causal else same

    tokens = len(i.qkv)
    i.block_mask = create_block_mask(allowed, None, None, tokens, tokens, device=sample.device)
    return i


FLEX = Layout(enter=_with_block_mask)


# ---- padded batches: one sample per row, padding on the right ----


def _pad(i: Inputs) -> Inputs:
    """q, k, v (samples, longest, heads * head_dim), as three projections leave them."""
    samples, longest = len(i.lengths), i.max_seqlen
    device = i.qkv.device
    starts = torch.arange(samples, device=device) * longest
    lengths = torch.tensor(i.lengths, device=device)
    within = torch.cat([torch.arange(n, device=device) for n in i.lengths])
    padded = Inputs(**vars(i))
    padded.rows = torch.repeat_interleave(starts, lengths) + within
    for name, x in zip("qkv", i.qkv.chunk(3, 1), strict=True):
        whole = x.new_zeros(samples * longest, x.shape[1]).index_copy(0, padded.rows, x)
        setattr(padded, name, whole.view(samples, longest, -1))
    if i.rotary:
        rotated = [x[None, :longest].to(i.qkv.dtype) for x in (i.cos, i.sin)]
        # as transformers has them
        padded.cos, padded.sin = (torch.cat([x, x], -1) for x in rotated)
    places = torch.arange(longest, device=device)
    mask = (places < lengths[:, None])[:, None, None]
    if i.causal:
        mask = mask & (places[:, None] >= places)
    padded.mask = None if mask.all() else mask.expand(samples, 1, longest, longest).contiguous()
    return padded


def _unpad(i: Inputs, output: Tensor) -> Tensor:
    return output.reshape(-1, output.shape[-1])[i.rows]


PADDED = Layout(("q", "k", "v"), _pad, _unpad)


def _padded_heads(i: Inputs) -> list[Tensor]:
    shape = (len(i.lengths), i.max_seqlen, i.num_heads, -1)
    return [x.view(shape).transpose(1, 2) for x in (i.q, i.k, i.v)]


def _together(output: Tensor) -> Tensor:
    return output.transpose(1, 2).flatten(2)


def transformers_sdpa(i: Inputs) -> Tensor:
    """LlamaAttention's steps between its projections; CLIP's where nothing is rotated."""
    q, k, v = _padded_heads(i)
    if i.rotary:
        llama = library("transformers.models.llama.modeling_llama")
        q, k = llama.apply_rotary_pos_emb(q, k, i.cos, i.sin)
    return _together(F.scaled_dot_product_attention(q, k, v, attn_mask=i.mask))


def liger_sdpa(i: Inputs) -> Tensor:
    """The same with liger-kernel's rotation; it has no attention of its own."""
    q, k, v = _padded_heads(i)
    q, k = liger().liger_rope(q, k, i.cos, i.sin)
    return _together(F.scaled_dot_product_attention(q, k, v, attn_mask=i.mask))


def cudnn_sdpa(i: Inputs) -> Tensor:
    """cuDNN's fused attention; causal on right padding, it needs no mask."""
    q, k, v = _padded_heads(i)
    if i.rotary:
        half = i.cos.shape[-1] // 2
        cos, sin = i.cos[..., :half], i.sin[..., :half]
        q, k = compiled_rotate(q, cos, sin), compiled_rotate(k, cos, sin)
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        mask = None if i.causal else i.mask
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=i.causal)
    return _together(out)


# ---- variants and cases ----

EAGER = Variant("torch eager, sample by sample", sample_by_sample)
PEERS = [
    EAGER,
    Variant("torch.compile, flex_attention", flex, on_gpu, FLEX, compiled=True),
    Variant("cuDNN sdpa, padded", cudnn_sdpa, on_gpu, PADDED),
    Variant("transformers sdpa, padded", transformers_sdpa, missing("transformers"), PADDED),
]
LIGER = Variant(
    "transformers sdpa, padded, liger-kernel", liger_sdpa, missing("liger-kernel"), PADDED
)
ROTARY = Operation(
    "rotary_attention", [*ours("rotary_attention", our_rotary), *PEERS, LIGER], EAGER, MATMUL
)
FULL = Operation("full_attention", [*ours("full_attention", our_full), *PEERS], EAGER, MATMUL)


def _inputs(lengths: list[int], heads: int, head_dim: int) -> Inputs:
    cu_seqlens = cu_seqlens_of(lengths, DEVICE)
    return Inputs(
        qkv=activations(sum(lengths), 3 * heads * head_dim, spread=0.2),
        num_heads=heads,
        lengths=lengths,
        offsets=cu_seqlens.tolist(),
        cu_seqlens=cu_seqlens,
        max_seqlen=max(lengths),
        rotary=False,
        causal=False,
    )


def rotary_case(config: DecoderConfig, tokens: int, mix: str) -> Case:
    lengths = sample_lengths(mix, tokens, min(config.max_position_embeddings, tokens // 2))
    heads, head_dim = config.num_attention_heads, config.head_dim

    def make() -> Inputs:
        inputs = _inputs(lengths, heads, head_dim)
        places = torch.arange(config.max_position_embeddings, device=DEVICE).float()
        columns = torch.arange(0, head_dim, 2, device=DEVICE).float()
        angles = torch.outer(places, config.rope_theta ** -(columns / head_dim))
        inputs.cos, inputs.sin = angles.cos(), angles.sin()
        inputs.position_ids = position_ids_of(lengths, DEVICE)
        inputs.rotary = inputs.causal = True
        return inputs

    shape = (cu_seqlens_of(lengths, "cpu").tolist(), heads, heads, head_dim, DTYPE.itemsize)
    return Case(
        f"{NAMES[config]}, {tokens} tokens in {len(lengths)} samples ({mix}), {DTYPE_NAME}",
        make,
        ("qkv",),
        costs_of(costs.rotary_attention(*shape)),
    )


def full_case(config: VisionConfig, images: int) -> Case:
    lengths, heads = [config.seqlen] * images, config.num_attention_heads
    head_dim = config.hidden_size // heads
    shape = (cu_seqlens_of(lengths, "cpu").tolist(), heads, head_dim, DTYPE.itemsize)
    return Case(
        f"{NAMES[config]}, {images} images, {DTYPE_NAME}",
        lambda: _inputs(lengths, heads, head_dim),
        ("qkv",),
        costs_of(costs.full_attention(*shape)),
    )


SHAPES = [(*shape, "finetune") for shape in DECODER_SHAPES]
SHAPES.append((*DECODER_SHAPES[0], ONE_LONG))
if ON_GPU:
    SHAPES.append((*DECODER_SHAPES[0], "wide mix"))


COMPARISONS = [
    *ROTARY.comparisons([rotary_case(*shape) for shape in SHAPES]),
    *FULL.comparisons([full_case(*shape) for shape in VISION_SHAPES]),
]
test_attention = each(COMPARISONS)
