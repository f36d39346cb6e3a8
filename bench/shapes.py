"""The device and type of the benchmarks, the shapes they run at, and random data of these shapes.

On a GPU the shapes are those of the published models in bf16, on a CPU small ones in fp32, and in a
rehearsal (bench/gpu.py) so small that Triton's interpreter runs them.
"""

import os
import random
from dataclasses import replace
from types import SimpleNamespace

import torch
from torch import Tensor

from mmalign.model.config import CLIP_VIT_L_14, LLAMA2_7B, OPENLLAMA_3B, DecoderConfig, VisionConfig

# MMALIGN_BENCH_DEVICE=cuda pytest bench/ --collect-only lists a GPU's rows on any machine
DEVICE = torch.device(
    os.environ.get("MMALIGN_BENCH_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
)
ON_GPU = DEVICE.type == "cuda"
REHEARSAL = "MMALIGN_BENCH_REHEARSAL" in os.environ
DTYPE, DTYPE_NAME = (torch.bfloat16, "bf16") if ON_GPU else (torch.float32, "fp32")

SMALL_DECODER = DecoderConfig(
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
TINY_DECODER = replace(
    SMALL_DECODER,
    vocab_size=320,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=32,
)
SMALL_VISION = VisionConfig(
    hidden_size=256,
    intermediate_size=1024,
    num_hidden_layers=4,
    num_attention_heads=4,
    image_size=224,
    patch_size=14,
)
TINY_VISION = replace(
    SMALL_VISION,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=1,
    image_size=56,
)
NAMES = {
    LLAMA2_7B: "llama2-7b",
    OPENLLAMA_3B: "openllama-3b",
    SMALL_DECODER: "small decoder",
    CLIP_VIT_L_14: "clip-vit-l-14",
    SMALL_VISION: "small vision tower",
    TINY_DECODER: "tiny decoder",
    TINY_VISION: "tiny vision tower",
}

# (model, tokens per micro-batch), the most important first; at 2,048 a launch costs as much as
# the computation
DECODER_SHAPES: list[tuple[DecoderConfig, int]] = [(SMALL_DECODER, 2048)]
VISION_SHAPES: list[tuple[VisionConfig, int]] = [(SMALL_VISION, 4)]  # (tower, images)
if ON_GPU:
    DECODER_SHAPES = [(LLAMA2_7B, 16384), (LLAMA2_7B, 2048), (OPENLLAMA_3B, 16384)]
    VISION_SHAPES = [(CLIP_VIT_L_14, 64)]
elif REHEARSAL:
    DECODER_SHAPES, VISION_SHAPES = [(TINY_DECODER, 96)], [(TINY_VISION, 1)]

LENGTHS = {"finetune": (300, 900), "wide mix": (32, 2048)}  # tokens of a sample, from and to
if REHEARSAL:
    LENGTHS["finetune"] = (9, 40)
ONE_LONG = "one long sample"
SUPERVISED = {"pretrain": 0.07, "finetune": 0.44}  # share of the tokens that have a target


def sample_lengths(mix: str, num_tokens: int, longest: int = 2048) -> list[int]:
    """Lengths of packed samples, `num_tokens` in all: a mix of LENGTHS, or ONE_LONG.

    ONE_LONG: one sample of `longest` tokens, then the finetune mix.
    """
    low, high = LENGTHS["finetune" if mix == ONE_LONG else mix]
    generator = random.Random(0)
    lengths = [min(longest, num_tokens)] if mix == ONE_LONG else []
    while (rest := num_tokens - sum(lengths)) > 0:
        lengths.append(min(generator.randint(low, min(high, longest)), rest))
    return lengths


def cu_seqlens_of(lengths: list[int], device: torch.device | str) -> Tensor:
    """Offsets of samples of these lengths, int32 (samples + 1,)."""
    return torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)


def position_ids_of(lengths: list[int], device: torch.device | str) -> Tensor:
    """Positions that restart at 0 in every sample, int32 (tokens,)."""
    return torch.cat([torch.arange(n, dtype=torch.int32, device=device) for n in lengths])


# ---- random data; zeros would run faster ----


def activations(rows: int, columns: int, spread: float = 0.5) -> Tensor:
    """Normal, with columns of different scale, as hidden states have."""
    scale = torch.exp(spread * torch.randn(columns, device=DEVICE))
    return (torch.randn(rows, columns, device=DEVICE) * scale).to(DTYPE)


def norm_weight(columns: int) -> Tensor:
    return (1 + 0.2 * torch.randn(columns, device=DEVICE)).to(DTYPE)


def head_inputs(
    tokens: int, num_supervised: int, hidden_size: int, vocab_size: int
) -> SimpleNamespace:
    """Hidden states that lean towards their target: the loss of a trained model, about 2."""
    weight = torch.randn(vocab_size, hidden_size, device=DEVICE) / hidden_size**0.5
    target_ids = torch.randint(vocab_size, (tokens,), device=DEVICE)
    hidden_states = torch.randn(tokens, hidden_size, device=DEVICE) + 9 * weight[target_ids]
    target_ids[torch.randperm(tokens, device=DEVICE)[num_supervised:]] = -100
    return SimpleNamespace(
        hidden_states=hidden_states.to(DTYPE), weight=weight.to(DTYPE), target_ids=target_ids
    )
