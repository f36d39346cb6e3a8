"""The projector: image features into the packed hidden states, and the first layer's RMSNorm."""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from mmalign_kernels import costs, project_image_features

from bench import peers
from bench.bench_rms_norm import norm
from bench.comparison import each_row
from bench.operation import COPY, Case, Operation, costs_of
from bench.shapes import CLIP_VIT_L_14, NAMES, SMALL_VISION, decoder_shapes
from bench.variants import (
    DEVICE,
    DTYPE,
    TYPE_NAME,
    Variant,
    activations,
    norm_weight,
    ours,
    torch_variants,
)
from mmalign.model.config import DecoderConfig

TOWER = CLIP_VIT_L_14 if DEVICE.type == "cuda" else SMALL_VISION
IMAGE_SHARE = 0.5  # of the tokens
PREFIX = 35  # tokens of a sample before its image


def eager(inputs: SimpleNamespace) -> tuple[torch.Tensor, torch.Tensor]:
    projected = F.linear(inputs.features, inputs.weight, inputs.bias)
    hidden_states = inputs.hidden_states.index_copy(0, inputs.positions, projected)
    return hidden_states, norm(hidden_states, inputs.norm_weight, inputs.eps)


def scattered(inputs: SimpleNamespace, norm) -> tuple[torch.Tensor, torch.Tensor]:
    """As transformers' LLaVA: a mask over every element; then the layer's norm."""
    projected = F.linear(inputs.features, inputs.weight, inputs.bias)
    mask = inputs.mask[:, None].expand_as(inputs.hidden_states)
    hidden_states = inputs.hidden_states.masked_scatter(mask, projected)
    of_norm = SimpleNamespace(x=hidden_states, weight=inputs.norm_weight, eps=inputs.eps)
    return hidden_states, norm(of_norm)


EAGER = torch_variants(eager)
PROJECTOR = Operation(
    "project_image_features",
    [
        *ours(
            "projector",
            lambda i: project_image_features(
                i.features, i.weight, i.bias, i.hidden_states, i.positions, i.norm_weight, i.eps
            ),
        ),
        *EAGER,
        Variant(
            "transformers",
            lambda inputs: scattered(inputs, peers.llama_norm),
            peers.missing("transformers"),
        ),
        Variant(
            "transformers, liger-kernel",
            lambda inputs: scattered(inputs, peers.liger_norm),
            peers.missing("liger-kernel"),
        ),
    ],
    EAGER[0],
    COPY,
)


def case(config: DecoderConfig, tokens: int) -> Case:
    """Gradients of the projector only, as in the first stage."""
    size, vision_size = config.hidden_size, TOWER.hidden_size
    images = max(int(tokens * IMAGE_SHARE) // TOWER.num_patches, 1)
    rows = images * TOWER.num_patches

    def make(device: torch.device, dtype: torch.dtype) -> SimpleNamespace:
        starts = torch.arange(images, device=device)[:, None] * (tokens // images) + PREFIX
        positions = (starts + torch.arange(TOWER.num_patches, device=device)).flatten()
        mask = torch.zeros(tokens, dtype=torch.bool, device=device)
        mask[positions] = True
        return SimpleNamespace(
            features=activations(rows, vision_size, device, dtype),
            weight=(0.02 * torch.randn(size, vision_size, device=device)).to(dtype),
            bias=(0.02 * torch.randn(size, device=device)).to(dtype),
            hidden_states=activations(tokens, size, device, dtype),
            positions=positions,
            mask=mask,
            norm_weight=norm_weight(size, device, dtype),
            eps=config.rms_norm_eps,
        )

    shape = (rows, vision_size, tokens, size, DTYPE.itemsize)
    return Case(
        f"{NAMES[config]}, {images} images in {tokens} tokens, {TYPE_NAME}",
        make,
        ("weight", "bias"),
        costs_of(
            costs.project_image_features_forward(*shape),
            costs.project_image_features_backward(*shape, needs_hidden=False),
        ),
    )


@each_row(PROJECTOR.comparisons([case(*shape) for shape in decoder_shapes(DEVICE)]))
def test_project_image_features(row, compare):
    compare(row)
