"""SwiGLU, CLIP's quick GELU, and rows between the packed and the padded layout."""

from collections.abc import Callable
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from mmalign_kernels import costs, pack_rows, quick_gelu, swiglu, unpack_rows

from bench.comparison import COPY, each
from bench.operation import Case, Operation, costs_of
from bench.peers import Layout, library, liger, ours, peer, torch_variants
from bench.shapes import (
    DECODER_SHAPES,
    DEVICE,
    DTYPE,
    DTYPE_NAME,
    NAMES,
    VISION_SHAPES,
    activations,
    sample_lengths,
)
from mmalign.model.config import DecoderConfig, VisionConfig

ITEMSIZE = DTYPE.itemsize


def activation(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    return library("transformers.activations").ACT2FN[name]


# ---- SwiGLU: silu(gate) * up, of the fused projection ----


def eager_swiglu(i: SimpleNamespace) -> torch.Tensor:
    gate, up = i.gate_up.chunk(2, 1)
    return F.silu(gate) * up


def _split(i: SimpleNamespace) -> SimpleNamespace:
    gate, up = i.gate_up.chunk(2, 1)
    return SimpleNamespace(gate=gate.contiguous(), up=up.contiguous())


SPLIT = Layout(("gate", "up"), _split)  # two projections, as in Hugging Face's LlamaMLP
EAGER_SWIGLU = torch_variants(eager_swiglu)
SWIGLU = Operation(
    "swiglu",
    [
        *ours("swiglu", lambda i: swiglu(i.gate_up)),
        *EAGER_SWIGLU,
        peer("transformers", lambda i: activation("silu")(i.gate) * i.up, SPLIT),
        peer("liger-kernel", lambda i: liger().liger_swiglu(i.gate, i.up), SPLIT),
    ],
    EAGER_SWIGLU[0],
    COPY,
)


def swiglu_case(config: DecoderConfig, tokens: int) -> Case:
    size = config.intermediate_size
    return Case(
        f"{NAMES[config]}, {tokens} tokens, {DTYPE_NAME}",
        lambda: SimpleNamespace(gate_up=activations(tokens, 2 * size)),
        ("gate_up",),
        costs_of(costs.swiglu(tokens, size, ITEMSIZE)),
    )


# ---- quick GELU ----

EAGER_GELU = torch_variants(lambda i: i.x * torch.sigmoid(1.702 * i.x))
QUICK_GELU = Operation(
    "quick_gelu",
    [
        *ours("quick_gelu", lambda i: quick_gelu(i.x)),
        *EAGER_GELU,
        peer("transformers", lambda i: activation("quick_gelu")(i.x)),
    ],
    EAGER_GELU[0],
    COPY,
)


def quick_gelu_case(config: VisionConfig, images: int) -> Case:
    rows, size = images * config.seqlen, config.intermediate_size
    return Case(
        f"{NAMES[config]}, {images} images, {DTYPE_NAME}",
        lambda: SimpleNamespace(x=activations(rows, size)),
        ("x",),
        costs_of(costs.quick_gelu(rows * size, ITEMSIZE)),
    )


# ---- packing: samples of the finetune mix, padded to the longest ----


def eager_unpack(i: SimpleNamespace) -> torch.Tensor:
    zeros = i.packed.new_zeros(i.num_rows, i.packed.shape[1])
    return zeros.index_copy(0, i.positions, i.packed)


EAGER_PACK = torch_variants(lambda i: i.x[i.positions])
PACK_ROWS = Operation(
    "pack_rows",
    [*ours("packing", lambda i: pack_rows(i.x, i.positions)), *EAGER_PACK],
    EAGER_PACK[0],
    COPY,
)
EAGER_UNPACK = torch_variants(eager_unpack)
UNPACK_ROWS = Operation(
    "unpack_rows",
    [*ours("packing", lambda i: unpack_rows(i.packed, i.positions, i.num_rows)), *EAGER_UNPACK],
    EAGER_UNPACK[0],
    COPY,
)


def packing_case(config: DecoderConfig, tokens: int, packed: bool) -> Case:
    size, lengths = config.hidden_size, sample_lengths("finetune", tokens)
    longest = max(lengths)
    num_rows = longest * len(lengths)

    def make() -> SimpleNamespace:
        rows = [torch.arange(n, device=DEVICE) + i * longest for i, n in enumerate(lengths)]
        inputs = SimpleNamespace(positions=torch.cat(rows), num_rows=num_rows)
        x = activations(tokens if packed else num_rows, size)
        setattr(inputs, "packed" if packed else "x", x)
        return inputs

    cost = costs.unpack_rows if packed else costs.pack_rows
    return Case(
        f"{NAMES[config]}, {tokens} tokens in {num_rows} rows, {DTYPE_NAME}",
        make,
        ("packed",) if packed else ("x",),
        costs_of(cost(tokens, num_rows, size, ITEMSIZE)),
    )


PACKING_SHAPES = DECODER_SHAPES[:2]  # the width of the rows makes no difference


COMPARISONS = [
    *SWIGLU.comparisons([swiglu_case(*shape) for shape in DECODER_SHAPES]),
    *QUICK_GELU.comparisons([quick_gelu_case(*shape) for shape in VISION_SHAPES]),
    *PACK_ROWS.comparisons([packing_case(*shape, packed=False) for shape in PACKING_SHAPES]),
    *UNPACK_ROWS.comparisons([packing_case(*shape, packed=True) for shape in PACKING_SHAPES]),
]
test_elementwise = each(COMPARISONS)
