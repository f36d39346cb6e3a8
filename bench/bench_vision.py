"""LayerNorm and quick GELU of the CLIP tower, on the patches of a micro-batch of images."""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from mmalign_kernels import costs, layer_norm, quick_gelu

from bench import peers
from bench.comparison import each_row
from bench.operation import COPY, Case, Operation, costs_of
from bench.shapes import NAMES, vision_shapes
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
from mmalign.model.config import VisionConfig


def eager_norm(inputs: SimpleNamespace) -> torch.Tensor:
    return F.layer_norm(inputs.x, inputs.weight.shape, inputs.weight, inputs.bias, inputs.eps)


def eager_gelu(inputs: SimpleNamespace) -> torch.Tensor:
    return inputs.x * torch.sigmoid(1.702 * inputs.x)


EAGER_NORM, EAGER_GELU = torch_variants(eager_norm), torch_variants(eager_gelu)
LAYER_NORM = Operation(
    "layer_norm",
    [
        *ours("layer_norm", lambda i: layer_norm(i.x, i.weight, i.bias, i.eps)),
        *EAGER_NORM,  # transformers' CLIP calls the same module
        Variant("liger-kernel", peers.liger_layer_norm, peers.missing("liger-kernel")),
        Variant("apex", peers.apex_layer_norm, peers.missing("apex normalization")),
    ],
    EAGER_NORM[0],
    COPY,
)
QUICK_GELU = Operation(
    "quick_gelu",
    [
        *ours("quick_gelu", lambda inputs: quick_gelu(inputs.x)),
        *EAGER_GELU,
        Variant("transformers", peers.clip_activation, peers.missing("transformers")),
    ],
    EAGER_GELU[0],
    COPY,
)


def norm_case(config: VisionConfig, images: int) -> Case:
    rows, size = images * config.seqlen, config.hidden_size

    def make(device: torch.device, dtype: torch.dtype) -> SimpleNamespace:
        return SimpleNamespace(
            x=activations(rows, size, device, dtype),
            weight=norm_weight(size, device, dtype),
            bias=0.1 * activations(1, size, device, dtype)[0],
            eps=config.layer_norm_eps,
        )

    return Case(
        f"{NAMES[config]}, {images} images, {TYPE_NAME}",
        make,
        ("x", "weight", "bias"),
        costs_of(
            costs.layer_norm_forward(rows, size, DTYPE.itemsize),
            costs.layer_norm_backward(rows, size, DTYPE.itemsize),
        ),
    )


def gelu_case(config: VisionConfig, images: int) -> Case:
    rows, size = images * config.seqlen, config.intermediate_size
    return Case(
        f"{NAMES[config]}, {images} images, {TYPE_NAME}",
        lambda device, dtype: SimpleNamespace(x=activations(rows, size, device, dtype)),
        ("x",),
        costs_of(
            costs.quick_gelu_forward(rows * size, DTYPE.itemsize),
            costs.quick_gelu_backward(rows * size, DTYPE.itemsize),
        ),
    )


SHAPES = vision_shapes(DEVICE)


@each_row(LAYER_NORM.comparisons([norm_case(*shape) for shape in SHAPES]))
def test_layer_norm(row, compare):
    compare(row)


@each_row(QUICK_GELU.comparisons([gelu_case(*shape) for shape in SHAPES]))
def test_quick_gelu(row, compare):
    compare(row)
