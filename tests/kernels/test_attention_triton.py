"""How Triton's attention cuts packed samples into programs; what it gives: test_attention.py."""

from collections import Counter

import pytest
import torch
from mmalign_kernels import dispatch, rotary_attention
from mmalign_kernels.triton.attention_tiles import attention_tiles

from .accuracy import results
from .packed_samples import offsets, positions, rotary_table

BLOCK = 16
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # there in the interpreter
pytestmark = [pytest.mark.gpu] if torch.cuda.is_available() else []
LENGTHS = {
    "one token each": [1] * 70,
    "a block, and one more or less": [BLOCK, BLOCK + 1, BLOCK - 1],
    "longer than a block": [5 * BLOCK + 3],
    "widely different": [1, 700, 2, 2, 350, 1, 33, 16],
    "empty samples": [0, 20, 0, 0, 40, 0],
    "many of one length": [40] * 70,
    "nothing": [],
}


@pytest.fixture
def backend():
    """The backend is named in the tests."""


def tiles_of(lengths: list[int], causal: bool) -> list[tuple[int, int, int, int]]:
    """(sample, first row, length, tile) in the order of the programs, idle ones included."""
    tiles = attention_tiles(offsets(lengths).to(DEVICE), sum(lengths), BLOCK, causal)
    assert tiles.dtype == torch.int32 and tiles.shape[1] == sum(lengths) // BLOCK + len(lengths)
    return list(zip(*tiles.tolist(), strict=True))


@pytest.mark.parametrize("causal", (True, False))
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_every_tile_has_one_program(lengths, causal):
    tiles = tiles_of(lengths, causal)
    bounds = offsets(lengths).tolist()
    wanted = {
        (sample, bounds[sample], length, tile)
        for sample, length in enumerate(lengths)
        for tile in range(-(-length // BLOCK))
    }
    assert len(tiles) - len(wanted) <= len(lengths)
    assert Counter(x for x in tiles if x[2]) == Counter(wanted)
    assert all(x == (0, 0, 0, 0) for x in tiles[len(wanted) :]), "idle programs come last"


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_longest_first(lengths):
    shares = [tile + 1 for *_, length, tile in tiles_of(lengths, causal=True) if length]
    assert shares == sorted(shares, reverse=True)
    blocks = [-(-length // BLOCK) for *_, length, _ in tiles_of(lengths, causal=False)]
    assert blocks == sorted(blocks, reverse=True)


def test_tiles_of_a_full_sample_are_neighbours():
    """They read the same keys, so they should run at the same time."""
    rows = [row for _, row, length, _ in tiles_of([40, 70, 40, 70], causal=False) if length]
    assert len([a for a, b in zip(rows, rows[1:], strict=False) if a != b]) == 3


def test_all_layers_share_a_table():
    """Made once per batch, and anew where the lengths changed in place."""
    bounds = offsets([40, 3]).to(DEVICE)
    table = attention_tiles(bounds, 43, BLOCK, True)
    assert attention_tiles(bounds, 43, BLOCK, True) is table
    assert attention_tiles(bounds, 43, BLOCK, False) is not table
    bounds[1] = 3
    assert torch.equal(
        attention_tiles(bounds, 43, BLOCK, True),
        attention_tiles(offsets([3, 40]).to(DEVICE), 43, BLOCK, True),
    )
    with torch.inference_mode():  # which counts no changes
        bounds = offsets([40, 3]).to(DEVICE)
        assert torch.equal(attention_tiles(bounds, 43, BLOCK, True), table)
        bounds[1] = 3
        assert not torch.equal(attention_tiles(bounds, 43, BLOCK, True), table)


@pytest.mark.parametrize("causal", (True, False))
@pytest.mark.parametrize("lengths", ([1] * 5, [64], [65], [1, 129, 63], [0, 3, 0]), ids=str)
def test_tile_borders_equal_the_reference(lengths, causal):
    """Samples that end just before, at and after the end of a tile, with grouped heads."""
    shape = sum(lengths), 4 * 16  # fp64: only the order of additions differs, on a GPU as here
    qkv = torch.randn(shape, dtype=torch.float64, device=DEVICE, requires_grad=True)
    table = [x.to(DEVICE) for x in rotary_table(130, 16)]

    def attention(qkv):
        ids, bounds = (x(lengths).to(DEVICE) for x in (positions, offsets))
        return rotary_attention(qkv, *table, ids, bounds, max(lengths), 2, 1, causal)

    found = {}
    for backend in ("triton", "reference"):
        with dispatch.use_backend(backend):
            found[backend] = results(attention, (qkv,))
    for name, value in found["reference"].items():
        torch.testing.assert_close(found["triton"][name], value)
