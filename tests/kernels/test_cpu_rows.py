"""Operations on rows in csrc/cpu: any number of threads, ends of rows, numbers not finite."""

import pytest
import torch
from mmalign_kernels import (
    add_rms_norm,
    linear_cross_entropy,
    quick_gelu,
    rms_norm,
    swiglu,
    unpack_rows,
)
from mmalign_kernels.cpu.library import operation

from .accuracy import compare, results

pytestmark = pytest.mark.parametrize("backend", ["cpu"], indirect=True)


def normal(*shape):
    return torch.randn(shape, requires_grad=True)


@pytest.mark.parametrize(
    "call",
    (
        lambda x, weight: rms_norm(x, weight, 1e-5),
        lambda x, weight: add_rms_norm(x, x.detach(), weight, 1e-5),
        lambda x, weight: swiglu(x),
        lambda x, weight: quick_gelu(x),
        lambda x, weight: linear_cross_entropy(x, x[:100], torch.arange(len(x)) % 100),
    ),
)
def test_the_number_of_threads_does_not_matter(call):
    inputs, found, before = (normal(1037, 200), normal(200)), [], torch.get_num_threads()
    used = inputs if call.__code__.co_names[0].endswith("_norm") else inputs[:1]
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(results(lambda *x: call(*x, *inputs[len(x) :]), used))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(found[0][name], other[name]) for name in other)


@pytest.mark.parametrize("columns", (*range(5, 36), 64, 65, 127))
def test_ends_of_rows(columns):
    weight = normal(columns)
    peer = torch.nn.functional.rms_norm
    compare(
        lambda x, w: rms_norm(x, w, 1e-5),
        lambda x, w: peer(x, (columns,), w, 1e-5),
        (normal(3, columns), weight),
        torch.float32,
    )
    target_ids = torch.arange(3) % columns
    logits = torch.randn(3, columns)
    expected = torch.nn.functional.cross_entropy(logits, target_ids, reduction="none")
    found = operation("cross_entropy")(logits, target_ids, False)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("column", (0, 15, 16, 36))
@pytest.mark.parametrize("number", (torch.nan, torch.inf))
def test_what_is_not_finite_shows(column, number):
    logits = torch.zeros(2, 37)
    logits[0, column] = number
    losses = operation("cross_entropy")(logits, torch.tensor([3, 3]), True)
    assert not losses[0].isfinite() and losses[1].isfinite()
    assert logits[0].isnan().any() and logits[1].isfinite().all()
    x = torch.ones(1, 74)
    x[0, column] = number
    assert not swiglu(x)[0, column].isfinite()
    assert not rms_norm(x, torch.ones(74), 1e-5)[0, column].isfinite()


def test_the_sigmoid_far_from_zero():
    x = torch.tensor([[-200.0, -88.0, -20.0, -1e-30, 0.0, 1e-30, 20.0, 88.0, 200.0]])
    found, exact = quick_gelu(x), x.double() * torch.sigmoid(1.702 * x.double())
    torch.testing.assert_close(found.double(), exact, rtol=3e-6, atol=1e-36)


def test_targets_outside_of_the_vocabulary():
    with pytest.raises(RuntimeError, match="target_ids has 5, expected 0 to 4"):
        operation("cross_entropy")(torch.zeros(1, 5), torch.tensor([5]), True)


@pytest.mark.parametrize("dtype", (torch.int32, torch.int64))
def test_positions_that_no_row_has(dtype):
    for positions, message in (
        ([0, 4], "has 4, expected 0 to 3"),
        ([-1, 0], "has -1, expected 0"),
        ([2, 2], "has 2 twice"),
    ):
        with pytest.raises(RuntimeError, match=message):
            unpack_rows(torch.ones(2, 3), torch.tensor(positions, dtype=dtype), 4)
