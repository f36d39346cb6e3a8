"""RMSNorm (alone, after the residual's addition, after the projector) and CLIP's LayerNorm."""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from mmalign_kernels import add_rms_norm, costs, layer_norm, project_image_features, rms_norm

from bench.comparison import COPY, each
from bench.operation import Case, Operation, costs_of
from bench.peers import Variant, library, liger, llama_norm, missing, ours, peer, torch_variants
from bench.shapes import (
    DECODER_SHAPES,
    DEVICE,
    DTYPE,
    DTYPE_NAME,
    NAMES,
    REHEARSAL,
    VISION_SHAPES,
    activations,
    norm_weight,
)
from mmalign.model.config import DecoderConfig, VisionConfig

ITEMSIZE = DTYPE.itemsize


def norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """As LlamaRMSNorm: statistics in fp32 at least, the weight after rounding to x's type."""
    wide = x.float() if x.dtype == torch.bfloat16 else x
    scale = torch.rsqrt(wide.square().mean(1, keepdim=True) + eps)
    return weight * (wide * scale).to(x.dtype)


# ---- RMSNorm; a frozen weight needs no gradient ----


def add_norm(i: SimpleNamespace, norm) -> tuple[torch.Tensor, torch.Tensor]:
    residual = i.x + i.residual
    return norm(residual, i.weight, i.eps), residual


EAGER = torch_variants(lambda i: norm(i.x, i.weight, i.eps))
RMS_NORM = Operation(
    "rms_norm",
    [
        *ours("rms_norm", lambda i: rms_norm(i.x, i.weight, i.eps)),
        *EAGER,
        Variant("torch rms_norm", lambda i: F.rms_norm(i.x, i.weight.shape, i.weight, eps=i.eps)),
        peer("transformers", lambda i: llama_norm(i.x, i.weight, i.eps)),
        peer("liger-kernel", lambda i: liger().liger_rms_norm(i.x, i.weight, i.eps)),
        peer("quack", lambda i: library("quack").rmsnorm(i.x, i.weight, eps=i.eps)),
    ],
    EAGER[0],
    COPY,
)
EAGER_ADD = torch_variants(lambda i: add_norm(i, norm))
ADD_RMS_NORM = Operation(
    "add_rms_norm",
    [
        *ours("rms_norm", lambda i: add_rms_norm(i.x, i.residual, i.weight, i.eps)),
        *EAGER_ADD,
        peer("transformers", lambda i: add_norm(i, llama_norm)),
        peer(
            "liger-kernel",
            lambda i: liger().liger_fused_add_rms_norm(i.x, i.residual, i.weight, i.eps),
        ),
        peer(
            "quack",
            lambda i: library("quack").rmsnorm(
                i.x, i.weight, residual=i.residual, eps=i.eps, prenorm=True
            ),
        ),
    ],
    EAGER_ADD[0],
    COPY,
)


def rms_norm_case(config: DecoderConfig, tokens: int, add: bool, frozen: bool = False) -> Case:
    size = config.hidden_size
    cost = costs.add_rms_norm if add else costs.rms_norm

    def make() -> SimpleNamespace:
        inputs = SimpleNamespace(
            x=activations(tokens, size), weight=norm_weight(size), eps=config.rms_norm_eps
        )
        if add:
            inputs.residual = activations(tokens, size)
        return inputs

    leaves = ("x", *(("residual",) if add else ()), *(() if frozen else ("weight",)))
    return Case(
        f"{NAMES[config]}, {tokens} tokens, {DTYPE_NAME}{', frozen weight' if frozen else ''}",
        make,
        leaves,
        costs_of(cost(tokens, size, ITEMSIZE, needs_weight=not frozen)),
    )


def rms_norm_cases(add: bool) -> list[Case]:
    frozen = rms_norm_case(*DECODER_SHAPES[0], add, frozen=True)
    return [*(rms_norm_case(*shape, add) for shape in DECODER_SHAPES), frozen]


# ---- the projector: image features into the packed hidden states, then layer 0's RMSNorm ----

TOWER = VISION_SHAPES[0][0]
IMAGE_SHARE = 0.5  # of the tokens
PREFIX = 3 if REHEARSAL else 35  # tokens of a sample before its image


def eager_projector(i: SimpleNamespace) -> tuple[torch.Tensor, torch.Tensor]:
    projected = F.linear(i.features, i.weight, i.bias)
    hidden_states = i.hidden_states.index_copy(0, i.positions, projected)
    return hidden_states, norm(hidden_states, i.norm_weight, i.eps)


def scattered(i: SimpleNamespace, norm) -> tuple[torch.Tensor, torch.Tensor]:
    """As transformers' LLaVA: a mask over every element; then the layer's norm."""
    projected = F.linear(i.features, i.weight, i.bias)
    mask = i.mask[:, None].expand_as(i.hidden_states)
    hidden_states = i.hidden_states.masked_scatter(mask, projected)
    return hidden_states, norm(hidden_states, i.norm_weight, i.eps)


EAGER_PROJECTOR = torch_variants(eager_projector)
PROJECTOR = Operation(
    "project_image_features",
    [
        *ours(
            "projector",
            lambda i: project_image_features(
                i.features, i.weight, i.bias, i.hidden_states, i.positions, i.norm_weight, i.eps
            ),
        ),
        *EAGER_PROJECTOR,
        peer("transformers", lambda i: scattered(i, llama_norm)),
        Variant(
            "transformers, liger-kernel",
            lambda i: scattered(i, liger().liger_rms_norm),
            missing("liger-kernel"),
        ),
    ],
    EAGER_PROJECTOR[0],
    COPY,
)


def projector_case(config: DecoderConfig, tokens: int) -> Case:
    """Gradients of the projector only, as in the first stage."""
    size, vision_size = config.hidden_size, TOWER.hidden_size
    images = max(int(tokens * IMAGE_SHARE) // TOWER.num_patches, 1)
    rows = images * TOWER.num_patches

    def make() -> SimpleNamespace:
        starts = torch.arange(images, device=DEVICE)[:, None] * (tokens // images) + PREFIX
        positions = (starts + torch.arange(TOWER.num_patches, device=DEVICE)).flatten()
        mask = torch.zeros(tokens, dtype=torch.bool, device=DEVICE)
        mask[positions] = True
        return SimpleNamespace(
            features=activations(rows, vision_size),
            weight=(0.02 * torch.randn(size, vision_size, device=DEVICE)).to(DTYPE),
            bias=(0.02 * torch.randn(size, device=DEVICE)).to(DTYPE),
            hidden_states=activations(tokens, size),
            positions=positions,
            mask=mask,
            norm_weight=norm_weight(size),
            eps=config.rms_norm_eps,
        )

    shape = (rows, vision_size, tokens, size, ITEMSIZE)
    return Case(
        f"{NAMES[config]}, {images} images in {tokens} tokens, {DTYPE_NAME}",
        make,
        ("weight", "bias"),
        costs_of(costs.project_image_features(*shape, needs_hidden=False)),
    )


# ---- CLIP's LayerNorm ----

EAGER_LAYER_NORM = torch_variants(  # transformers' CLIP calls the same function
    lambda i: F.layer_norm(i.x, i.weight.shape, i.weight, i.bias, i.eps)
)
LAYER_NORM = Operation(
    "layer_norm",
    [
        *ours("layer_norm", lambda i: layer_norm(i.x, i.weight, i.bias, i.eps)),
        *EAGER_LAYER_NORM,
        peer("liger-kernel", lambda i: liger().liger_layer_norm(i.x, i.weight, i.bias, i.eps)),
    ],
    EAGER_LAYER_NORM[0],
    COPY,
)


def layer_norm_case(config: VisionConfig, images: int) -> Case:
    rows, size = images * config.seqlen, config.hidden_size
    return Case(
        f"{NAMES[config]}, {images} images, {DTYPE_NAME}",
        lambda: SimpleNamespace(
            x=activations(rows, size),
            weight=norm_weight(size),
            bias=0.1 * activations(1, size)[0],
            eps=config.layer_norm_eps,
        ),
        ("x", "weight", "bias"),
        costs_of(costs.layer_norm(rows, size, ITEMSIZE)),
    )


COMPARISONS = [
    *RMS_NORM.comparisons(rms_norm_cases(add=False)),
    *ADD_RMS_NORM.comparisons(rms_norm_cases(add=True)),
    *PROJECTOR.comparisons([projector_case(*shape) for shape in DECODER_SHAPES]),
    *LAYER_NORM.comparisons([layer_norm_case(*shape) for shape in VISION_SHAPES]),
]
test_norms = each(COMPARISONS)
