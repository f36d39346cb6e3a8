"""The shapes that benchmarks use: those of the real models, and small ones for a CPU."""

import random

import torch
from torch import Tensor

from mmalign.model.config import (
    CLIP_VIT_L_14,
    LLAMA2_7B,
    OPENLLAMA_3B,
    DecoderConfig,
    VisionConfig,
)

SMALL_DECODER = DecoderConfig(  # for a CPU
    vocab_size=8000,
    hidden_size=256,
    intermediate_size=688,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=64,
    rms_norm_eps=1e-5,
    max_position_embeddings=2048,
)
SMALL_VISION = VisionConfig(  # for a CPU
    hidden_size=256,
    intermediate_size=1024,
    num_hidden_layers=4,
    num_attention_heads=4,
    image_size=224,
    patch_size=14,
)
NAMES = {
    LLAMA2_7B: "llama2-7b",
    OPENLLAMA_3B: "openllama-3b",
    SMALL_DECODER: "small decoder",
    CLIP_VIT_L_14: "clip-vit-l-14",
    SMALL_VISION: "small vision tower",
}

NUM_TOKENS = 16384  # of one large micro-batch on a GPU
NUM_TOKENS_SHORT = 2048  # where launching costs as much as computing
NUM_TOKENS_CPU = 2048

LENGTHS = {  # tokens of a sample, at least and at most
    "finetune": (300, 900),
    "wide mix": (32, 2048),
}
SUPERVISED = {"pretrain": 0.07, "finetune": 0.44}  # share of the tokens that have a target
ONE_LONG = "one long sample"


def sample_lengths(mix: str, num_tokens: int, longest: int = 2048, seed: int = 0) -> list[int]:
    """Lengths of packed samples, `num_tokens` in all; a mix of LENGTHS, or ONE_LONG first.

    ONE_LONG: one sample of `longest` tokens among the finetune mix.
    """
    low, high = LENGTHS["finetune" if mix == ONE_LONG else mix]
    generator = random.Random(seed)
    lengths = [min(longest, num_tokens)] if mix == ONE_LONG else []
    while (rest := num_tokens - sum(lengths)) > 0:
        lengths.append(min(generator.randint(low, min(high, longest)), rest))
    return lengths


def offsets(lengths: list[int], device: torch.device | str) -> Tensor:
    """cu_seqlens of samples of these lengths."""
    return torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)


def positions(lengths: list[int], device: torch.device | str) -> Tensor:
    """position_ids: counted from 0 in every sample."""
    return torch.cat([torch.arange(n, dtype=torch.int32, device=device) for n in lengths])


def decoder_shapes(device: torch.device) -> list[tuple[DecoderConfig, int]]:
    """(model, tokens) that a row-wise operation is measured at, the most important first."""
    if device.type == "cpu":
        return [(SMALL_DECODER, NUM_TOKENS_CPU)]
    return [(LLAMA2_7B, NUM_TOKENS), (LLAMA2_7B, NUM_TOKENS_SHORT), (OPENLLAMA_3B, NUM_TOKENS)]


def vision_shapes(device: torch.device) -> list[tuple[VisionConfig, int]]:
    """(tower, images) of a micro-batch."""
    return [(SMALL_VISION, 4)] if device.type == "cpu" else [(CLIP_VIT_L_14, 64)]
