"""Scores of chosen tokens against log_softmax of whole logits."""

import pytest
import torch
import torch.nn.functional as F
from mmalign_kernels import target_logprobs
from mmalign_kernels.reference import linear_cross_entropy as reference_head
from torch.utils._python_dispatch import TorchDispatchMode

from .accuracy import RATIOS as COMMON_RATIOS
from .accuracy import assert_same_bits, compare

# logits are rounded to the type of the input, and spread over tens
RATIOS = COMMON_RATIOS | {torch.bfloat16: 1.5e-2, torch.float16: 2e-3}
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def whole_logits(hidden_states, weight, target_ids, target_rows):
    logits = F.linear(hidden_states, weight)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    rows = torch.arange(len(target_ids)) if target_rows is None else target_rows
    return logits.log_softmax(-1)[rows, target_ids]


def inputs(rows=40, hidden_size=24, vocab_size=203, num_targets=60):
    """Targets in random order; some rows are read often, some never."""
    hidden_states = torch.randn(rows, hidden_size, requires_grad=True)
    weight = torch.randn(vocab_size, hidden_size, requires_grad=True)
    target_ids = torch.randint(vocab_size, (num_targets,))
    return hidden_states, weight, target_ids, torch.randint(rows, (num_targets,))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ((1, 8, 11, 4), (199, 64, 1003, 300), (50, 24, 3200, 7)))
def test_equals_whole_logits(shape, dtype):
    compare(target_logprobs, whole_logits, inputs(*shape), dtype, RATIOS)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("num_logits", (1, 5 * 203))
def test_chunks(num_logits, dtype, backend, monkeypatch):
    if backend != "reference":
        pytest.skip("only the reference holds logits, in chunks")
    monkeypatch.setattr(reference_head, "LOGITS_PER_CHUNK", num_logits)
    compare(target_logprobs, whole_logits, inputs(), dtype, RATIOS)


def test_row_by_row():
    hidden_states, weight, _, _ = inputs()
    target_ids = torch.randint(203, (40,))
    compare(target_logprobs, whole_logits, (hidden_states, weight, target_ids, None), torch.float32)


@pytest.mark.usefixtures("sm_90_settings")
def test_tensor_descriptors():
    """The path of sm_90: tiles come by descriptor. It needs rows of a multiple of 16 bytes."""
    compare(target_logprobs, whole_logits, inputs(150), torch.float16, RATIOS)


def test_each_distinct_row_is_multiplied_once(backend):
    if backend != "reference":
        pytest.skip("counts the matrix products of the reference")
    rows_multiplied = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function._overloadpacket is torch.ops.aten.mm:
                rows_multiplied.append(len(args[0]))
            return function(*args, **(kwargs or {}))

    hidden_states, weight, target_ids, target_rows = inputs()
    with torch.no_grad(), Count():
        target_logprobs(hidden_states, weight, target_ids, target_rows)
    assert sum(rows_multiplied) == len(target_rows.unique())


def test_rows_without_a_target_are_never_read():
    hidden_states, weight, target_ids, target_rows = inputs(num_targets=12)
    before = target_logprobs(hidden_states, weight, target_ids, target_rows)
    with torch.no_grad():
        unread = torch.ones(40, dtype=torch.bool)
        unread[target_rows] = False
        hidden_states[unread] = torch.nan
    assert torch.equal(before, target_logprobs(hidden_states, weight, target_ids, target_rows))


def test_no_target():
    hidden_states, weight, target_ids, target_rows = inputs()
    none = target_logprobs(hidden_states, weight, target_ids[:0], target_rows[:0])
    assert none.shape == (0,) and none.dtype == torch.float32


def test_order_of_targets_does_not_matter():
    hidden_states, weight, target_ids, target_rows = inputs()
    order = torch.randperm(len(target_ids))
    expected = target_logprobs(hidden_states, weight, target_ids, target_rows)[order]
    found = target_logprobs(hidden_states, weight, target_ids[order], target_rows[order])
    assert torch.equal(found, expected)


def test_gradcheck():
    hidden_states, weight, target_ids, target_rows = inputs(5, 4, 7, 9)
    doubles = (x.detach().double().requires_grad_() for x in (hidden_states, weight))
    torch.autograd.gradcheck(
        lambda *xs: target_logprobs(*xs, target_ids, target_rows), tuple(doubles), fast_mode=True
    )


def test_same_bits():
    assert_same_bits(target_logprobs, inputs())


def test_wrong_arguments():
    hidden_states, weight, target_ids, target_rows = inputs()
    with pytest.raises(ValueError, match=r"target_rows has shape \(5,\), expected \(60,\)"):
        target_logprobs(hidden_states, weight, target_ids, target_rows[:5])
    with pytest.raises(ValueError, match=r"target_ids has shape \(60,\), expected \(40,\)"):
        target_logprobs(hidden_states, weight, target_ids)
    with pytest.raises(ValueError, match=r"lm_head_weight has shape \(24, 203\)"):
        target_logprobs(hidden_states, weight.t(), target_ids, target_rows)
