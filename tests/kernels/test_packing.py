"""Rows between layouts, against plain indexing."""

import pytest
import torch
from mmalign_kernels import pack_rows, unpack_rows

from .accuracy import assert_same_bits, results


@pytest.fixture
def positions():
    return torch.tensor([7, 0, 3, 4])


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16, torch.float64))
@pytest.mark.parametrize("index_dtype", (torch.int32, torch.int64))
def test_pack_and_unpack(positions, dtype, index_dtype):
    x, rows = torch.randn(9, 3, 2).to(dtype).requires_grad_(), positions.to(index_dtype)
    found = results(lambda y: pack_rows(y, rows), (x,))
    expected = results(lambda y: y[positions], (x,))
    assert all(torch.equal(found[name], expected[name]) for name in expected)

    def unpack(packed):
        return torch.zeros(9, 3, 2, dtype=dtype).index_put((positions,), packed)

    packed = found["output 0"].requires_grad_()
    found = results(lambda y: unpack_rows(y, rows, 9), (packed,))
    expected = results(unpack, (packed,))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_row_taken_twice_adds_its_gradients():
    x, twice = torch.randn(3, 4, requires_grad=True), torch.tensor([1, 1, 0])
    found, expected = (
        results(f, (x,)) for f in (lambda y: pack_rows(y, twice), lambda y: y[twice])
    )
    torch.testing.assert_close(found, expected)


def test_gradcheck(positions):
    x = torch.randn(9, 2, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda y: pack_rows(y, positions), (x,))
    torch.autograd.gradcheck(lambda y: unpack_rows(y[:4], positions, 9), (x,))


def test_no_rows(positions):
    none = positions[:0]
    assert pack_rows(torch.ones(5, 2), none).shape == (0, 2)
    assert torch.equal(unpack_rows(torch.ones(0, 2), none, 3), torch.zeros(3, 2))


def test_inputs_are_left_alone(positions):
    x = torch.randn(9, 2, requires_grad=True)
    assert_same_bits(lambda y: pack_rows(y, positions), (x,))
    assert_same_bits(lambda y: unpack_rows(y[:4], positions, 9), (x,))


def test_wrong_arguments(positions):
    with pytest.raises(ValueError, match=r"positions has shape \(4,\), expected \(3,\)"):
        unpack_rows(torch.ones(3, 2), positions, 9)
    with pytest.raises(ValueError, match="float32"):
        pack_rows(torch.ones(3, 2), torch.ones(2))
