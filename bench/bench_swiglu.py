"""SwiGLU: silu(gate) * up, of the fused projection."""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from mmalign_kernels import costs, swiglu

from bench import peers
from bench.comparison import each_row
from bench.operation import COPY, Case, Operation, costs_of
from bench.shapes import NAMES, decoder_shapes
from bench.variants import (
    DEVICE,
    DTYPE,
    TYPE_NAME,
    Layout,
    Variant,
    activations,
    ours,
    torch_variants,
)
from mmalign.model.config import DecoderConfig


def eager(inputs: SimpleNamespace) -> torch.Tensor:
    gate, up = inputs.gate_up.chunk(2, 1)
    return F.silu(gate) * up


def _split(inputs: SimpleNamespace) -> SimpleNamespace:
    gate, up = inputs.gate_up.chunk(2, 1)
    return SimpleNamespace(gate=gate.contiguous(), up=up.contiguous())


SPLIT = Layout(("gate", "up"), _split)  # two projections, as in Hugging Face's LlamaMLP
EAGER = torch_variants(eager)
SWIGLU = Operation(
    "swiglu",
    [
        *ours("swiglu", lambda inputs: swiglu(inputs.gate_up)),
        *EAGER,
        Variant("transformers", peers.llama_activation, peers.missing("transformers"), SPLIT),
        Variant("liger-kernel", peers.liger_swiglu, peers.missing("liger-kernel"), SPLIT),
        Variant("flash-attn", peers.flash_swiglu, peers.missing("flash-attn"), SPLIT),
    ],
    EAGER[0],
    COPY,
)


def case(config: DecoderConfig, tokens: int) -> Case:
    size = config.intermediate_size
    return Case(
        f"{NAMES[config]}, {tokens} tokens, {TYPE_NAME}",
        lambda device, dtype: SimpleNamespace(gate_up=activations(tokens, 2 * size, device, dtype)),
        ("gate_up",),
        costs_of(
            costs.swiglu_forward(tokens, size, DTYPE.itemsize),
            costs.swiglu_backward(tokens, size, DTYPE.itemsize),
        ),
    )


@each_row(SWIGLU.comparisons([case(*shape) for shape in decoder_shapes(DEVICE)]))
def test_swiglu(row, compare):
    compare(row)
