"""Attention within packed samples: rotary and causal in the decoder, full in the CLIP tower."""

from types import SimpleNamespace

import torch
from mmalign_kernels import costs, full_attention, rotary_attention

from bench import peers_attention as peers
from bench.comparison import each_row
from bench.operation import MATRIX, Case, Operation, costs_of
from bench.peers import missing
from bench.shapes import (
    LLAMA2_7B,
    NAMES,
    NUM_TOKENS,
    NUM_TOKENS_SHORT,
    ONE_LONG,
    OPENLLAMA_3B,
    SMALL_DECODER,
    offsets,
    positions,
    sample_lengths,
    vision_shapes,
)
from bench.variants import DEVICE, DTYPE, TYPE_NAME, Variant, activations, on_gpu, ours
from mmalign.model.config import DecoderConfig, VisionConfig


def our_rotary(i: SimpleNamespace) -> torch.Tensor:
    heads = i.num_heads
    return rotary_attention(
        i.qkv, i.cos, i.sin, i.position_ids, i.cu_seqlens, i.max_seqlen, heads, heads
    )


def our_full(i: SimpleNamespace) -> torch.Tensor:
    return full_attention(i.qkv, i.cu_seqlens, i.max_seqlen, i.num_heads)


EAGER = Variant("torch eager, sample by sample", peers.sample_by_sample)
OTHERS = [
    EAGER,
    Variant("torch.compile, flex_attention", peers.flex, on_gpu, peers.FLEX, compiled=True),
    Variant("torch varlen_attn", peers.torch_varlen, on_gpu),
    Variant("flash-attn", peers.flash, missing("flash-attn")),
    Variant("flash-attn 3", peers.flash3, missing("flash-attn 3")),
    Variant("xformers", peers.xformers, missing("xformers"), peers.XFORMERS),
    Variant("cuDNN sdpa, padded", peers.cudnn_sdpa, on_gpu, peers.PADDED),
    Variant(
        "transformers sdpa, padded",
        peers.transformers_sdpa,
        missing("transformers"),
        peers.PADDED,
    ),
]
LIGER = Variant(
    "transformers sdpa, padded, liger-kernel",
    peers.liger_sdpa,
    missing("liger-kernel"),
    peers.PADDED,
)
ROTARY = Operation(
    "rotary_attention", [*ours("rotary_attention", our_rotary), *OTHERS, LIGER], EAGER, MATRIX
)
FULL = Operation("full_attention", [*ours("full_attention", our_full), *OTHERS], EAGER, MATRIX)


def _table(config: DecoderConfig, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    places = torch.arange(config.max_position_embeddings, device=device).float()
    columns = torch.arange(0, config.head_dim, 2, device=device).float()
    angles = torch.outer(places, config.rope_theta ** -(columns / config.head_dim))
    return angles.cos(), angles.sin()


def _inputs(lengths: list[int], heads: int, head_dim: int, device, dtype) -> SimpleNamespace:
    cu_seqlens = offsets(lengths, device)
    return SimpleNamespace(
        qkv=activations(sum(lengths), 3 * heads * head_dim, device, dtype, spread=0.2),
        num_heads=heads,
        lengths=lengths,
        offsets=cu_seqlens.tolist(),
        cu_seqlens=cu_seqlens,
        max_seqlen=max(lengths),
        rotary=False,
        causal=False,
    )


def rotary_case(config: DecoderConfig, tokens: int, mix: str) -> Case:
    longest = min(config.max_position_embeddings, tokens // 2)
    lengths = sample_lengths(mix, tokens, longest)
    heads, head_dim = config.num_attention_heads, config.head_dim

    def make(device: torch.device, dtype: torch.dtype) -> SimpleNamespace:
        inputs = _inputs(lengths, heads, head_dim, device, dtype)
        inputs.cos, inputs.sin = _table(config, device)
        inputs.position_ids = positions(lengths, device)
        inputs.rotary = inputs.causal = True
        return inputs

    shape = (offsets(lengths, "cpu").tolist(), heads, heads, head_dim, DTYPE.itemsize)
    return Case(
        f"{NAMES[config]}, {tokens} tokens in {len(lengths)} samples ({mix}), {TYPE_NAME}",
        make,
        ("qkv",),
        costs_of(costs.rotary_attention_forward(*shape), costs.rotary_attention_backward(*shape)),
    )


def full_case(config: VisionConfig, images: int) -> Case:
    lengths, heads = [config.seqlen] * images, config.num_attention_heads
    head_dim = config.hidden_size // heads
    shape = (offsets(lengths, "cpu").tolist(), heads, head_dim, DTYPE.itemsize)
    return Case(
        f"{NAMES[config]}, {images} images, {TYPE_NAME}",
        lambda device, dtype: _inputs(lengths, heads, head_dim, device, dtype),
        ("qkv",),
        costs_of(costs.full_attention_forward(*shape), costs.full_attention_backward(*shape)),
    )


SHAPES = [(SMALL_DECODER, 2048, "finetune"), (SMALL_DECODER, 2048, ONE_LONG)]
if DEVICE.type == "cuda":
    SHAPES = [
        (LLAMA2_7B, NUM_TOKENS, "finetune"),
        (LLAMA2_7B, NUM_TOKENS_SHORT, "finetune"),
        (LLAMA2_7B, NUM_TOKENS, ONE_LONG),
        (LLAMA2_7B, NUM_TOKENS, "wide mix"),
        (OPENLLAMA_3B, NUM_TOKENS, "finetune"),
    ]


@each_row(ROTARY.comparisons([rotary_case(*shape) for shape in SHAPES]))
def test_rotary_attention(row, compare):
    compare(row)


@each_row(FULL.comparisons([full_case(*shape) for shape in vision_shapes(DEVICE)]))
def test_full_attention(row, compare):
    compare(row)
