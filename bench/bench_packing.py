"""Rows between the packed layout and samples of the finetune mix, padded to the longest."""

from types import SimpleNamespace

import torch
from mmalign_kernels import costs, pack_rows, unpack_rows

from bench import peers
from bench.comparison import each_row
from bench.operation import COPY, Case, Operation, costs_of
from bench.shapes import NAMES, decoder_shapes, sample_lengths
from bench.variants import (
    DEVICE,
    DTYPE,
    TYPE_NAME,
    Variant,
    activations,
    ours,
    torch_variants,
)
from mmalign.model.config import DecoderConfig


def eager_pack(inputs: SimpleNamespace) -> torch.Tensor:
    return inputs.x[inputs.positions]


def eager_unpack(inputs: SimpleNamespace) -> torch.Tensor:
    zeros = inputs.packed.new_zeros(inputs.num_rows, inputs.packed.shape[1])
    return zeros.index_copy(0, inputs.positions, inputs.packed)


EAGER_PACK, EAGER_UNPACK = torch_variants(eager_pack), torch_variants(eager_unpack)
PACK_ROWS = Operation(
    "pack_rows",
    [
        *ours("packing", lambda inputs: pack_rows(inputs.x, inputs.positions)),
        *EAGER_PACK,
        Variant("flash-attn", peers.flash_pack, peers.missing("flash-attn")),
    ],
    EAGER_PACK[0],
    COPY,
)
UNPACK_ROWS = Operation(
    "unpack_rows",
    [
        *ours("packing", lambda i: unpack_rows(i.packed, i.positions, i.num_rows)),
        *EAGER_UNPACK,
        Variant("flash-attn", peers.flash_unpack, peers.missing("flash-attn")),
    ],
    EAGER_UNPACK[0],
    COPY,
)


def _inputs(config: DecoderConfig, tokens: int, device, dtype, packed: bool) -> SimpleNamespace:
    lengths = sample_lengths("finetune", tokens)
    width, num_rows = max(lengths), max(lengths) * len(lengths)
    positions = [torch.arange(n, device=device) + i * width for i, n in enumerate(lengths)]
    inputs = SimpleNamespace(positions=torch.cat(positions), num_rows=num_rows)
    rows = activations(tokens if packed else num_rows, config.hidden_size, device, dtype)
    setattr(inputs, "packed" if packed else "x", rows)
    return inputs


def case(config: DecoderConfig, tokens: int, packed: bool) -> Case:
    size, lengths = config.hidden_size, sample_lengths("finetune", tokens)
    padded = max(lengths) * len(lengths)
    pack = (
        costs.pack_rows_forward(tokens, size, DTYPE.itemsize),
        costs.pack_rows_backward(tokens, padded, size, DTYPE.itemsize),
    )
    unpack = (
        costs.unpack_rows_forward(tokens, padded, size, DTYPE.itemsize),
        costs.unpack_rows_backward(tokens, size, DTYPE.itemsize),
    )
    return Case(
        f"{NAMES[config]}, {tokens} tokens in {padded} rows, {TYPE_NAME}",
        lambda device, dtype: _inputs(config, tokens, device, dtype, packed),
        ("packed",) if packed else ("x",),
        costs_of(*(unpack if packed else pack)),
    )


SHAPES = decoder_shapes(DEVICE)[:2]  # rows of one width tell it all


@each_row(PACK_ROWS.comparisons([case(*shape, packed=False) for shape in SHAPES]))
def test_pack_rows(row, compare):
    compare(row)


@each_row(UNPACK_ROWS.comparisons([case(*shape, packed=True) for shape in SHAPES]))
def test_unpack_rows(row, compare):
    compare(row)
