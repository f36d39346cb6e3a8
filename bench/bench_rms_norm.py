"""RMSNorm, alone and fused with the residual's addition; frozen: without the weight's gradient."""

from types import SimpleNamespace

import torch
from mmalign_kernels import add_rms_norm, costs, rms_norm

from bench import peers
from bench.comparison import each_row
from bench.operation import COPY, Case, Operation, costs_of
from bench.shapes import NAMES, decoder_shapes
from bench.variants import (
    DEVICE,
    DTYPE,
    FORWARD,
    TYPE_NAME,
    Variant,
    activations,
    norm_weight,
    ours,
    torch_variants,
)
from mmalign.model.config import DecoderConfig


def norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """As LlamaRMSNorm: statistics in fp32 at least, the weight after rounding to x's type."""
    wide = x.float() if x.dtype == torch.bfloat16 else x
    scale = torch.rsqrt(wide.square().mean(1, keepdim=True) + eps)
    return weight * (wide * scale).to(x.dtype)


def eager(inputs: SimpleNamespace) -> torch.Tensor:
    return norm(inputs.x, inputs.weight, inputs.eps)


def eager_add(inputs: SimpleNamespace) -> tuple[torch.Tensor, torch.Tensor]:
    residual = inputs.x + inputs.residual
    return norm(residual, inputs.weight, inputs.eps), residual


def torch_norm(inputs: SimpleNamespace) -> torch.Tensor:
    return torch.nn.functional.rms_norm(
        inputs.x, inputs.weight.shape, inputs.weight, eps=inputs.eps
    )


EAGER, EAGER_ADD = torch_variants(eager), torch_variants(eager_add)
RMS_NORM = Operation(
    "rms_norm",
    [
        *ours("rms_norm", lambda inputs: rms_norm(inputs.x, inputs.weight, inputs.eps)),
        *EAGER,
        Variant("torch rms_norm", torch_norm),
        Variant("transformers", peers.llama_norm, peers.missing("transformers")),
        Variant("liger-kernel", peers.liger_norm, peers.missing("liger-kernel")),
        Variant("quack", peers.quack_norm, peers.missing("quack")),
        Variant("flash-attn", peers.flash_norm, peers.missing("flash-attn")),
        Variant("apex", peers.apex_norm, peers.missing("apex normalization")),
        Variant("xformers", peers.xformers_norm, peers.missing("xformers"), directions=(FORWARD,)),
    ],
    EAGER[0],
    COPY,
)
ADD_RMS_NORM = Operation(
    "add_rms_norm",
    [
        *ours("rms_norm", lambda i: add_rms_norm(i.x, i.residual, i.weight, i.eps)),
        *EAGER_ADD,
        Variant("transformers", peers.llama_add_norm, peers.missing("transformers")),
        Variant("liger-kernel", peers.liger_add_norm, peers.missing("liger-kernel")),
        Variant("quack", peers.quack_add_norm, peers.missing("quack")),
        Variant("flash-attn", peers.flash_add_norm, peers.missing("flash-attn")),
    ],
    EAGER_ADD[0],
    COPY,
)


def case(config: DecoderConfig, tokens: int, add: bool, frozen: bool = False) -> Case:
    size = config.hidden_size
    forward = costs.add_rms_norm_forward if add else costs.rms_norm_forward
    backward = costs.add_rms_norm_backward if add else costs.rms_norm_backward

    def make(device: torch.device, dtype: torch.dtype) -> SimpleNamespace:
        inputs = SimpleNamespace(
            x=activations(tokens, size, device, dtype),
            weight=norm_weight(size, device, dtype),
            eps=config.rms_norm_eps,
        )
        if add:
            inputs.residual = activations(tokens, size, device, dtype)
        return inputs

    leaves = ("x", *(("residual",) if add else ()), *(() if frozen else ("weight",)))
    return Case(
        f"{NAMES[config]}, {tokens} tokens, {TYPE_NAME}{', frozen weight' if frozen else ''}",
        make,
        leaves,
        costs_of(
            forward(tokens, size, DTYPE.itemsize),
            backward(tokens, size, DTYPE.itemsize, needs_weight=not frozen),
        ),
    )


def cases(add: bool) -> list[Case]:
    first, *others = decoder_shapes(DEVICE)
    return [case(*first, add), case(*first, add, frozen=True), *(case(*o, add) for o in others)]


@each_row(RMS_NORM.comparisons(cases(add=False)))
def test_rms_norm(row, compare):
    compare(row)


@each_row(ADD_RMS_NORM.comparisons(cases(add=True)))
def test_add_rms_norm(row, compare):
    compare(row)
