"""lm_head and loss against a linear layer and F.cross_entropy on whole logits."""

import pytest
import torch
import torch.nn.functional as F
from mmalign_kernels import linear_cross_entropy
from mmalign_kernels.operation import Operation

from .accuracy import RATIOS as COMMON_RATIOS
from .accuracy import assert_same_bits, compare, results

IGNORED = -100
# logits are rounded to the type of the input, and spread over tens
RATIOS = COMMON_RATIOS | {torch.bfloat16: 1.5e-2, torch.float16: 2e-3}
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SHAPES = ((1, 8, 11), (199, 64, 1003), (130, 24, 3200))  # rows, hidden_size, vocab_size


def whole_logits(hidden_states, weight, target_ids):
    logits = F.linear(hidden_states, weight)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(logits, target_ids, ignore_index=IGNORED, reduction="sum")


def inputs(rows=40, hidden_size=24, vocab_size=203, ignored=0.3):
    hidden_states = torch.randn(rows, hidden_size)
    weight = torch.randn(vocab_size, hidden_size) * torch.logspace(-2, 0, vocab_size)[:, None]
    target_ids = torch.randint(vocab_size, (rows,))
    target_ids[torch.rand(rows) < ignored] = IGNORED
    target_ids[0] = 3
    return hidden_states.requires_grad_(), weight.requires_grad_(), target_ids


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_whole_logits(shape, dtype):
    compare(linear_cross_entropy, whole_logits, inputs(*shape), dtype, RATIOS)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("num_logits", (1, 5 * 203))
def test_chunks(num_logits, dtype, backend, monkeypatch):
    """A few rows at a time, down to one (or one tile), and a partial or empty last chunk."""
    module = "triton.launch" if backend == "triton" else "reference.linear_cross_entropy"
    monkeypatch.setattr(f"mmalign_kernels.{module}.LOGITS_PER_CHUNK", num_logits)
    compare(linear_cross_entropy, whole_logits, inputs(199), dtype, RATIOS)
    compare(linear_cross_entropy, whole_logits, inputs(130, ignored=0.8), dtype, RATIOS)


@pytest.mark.usefixtures("sm_90_settings")
def test_tensor_descriptors():
    """The path of sm_90: tiles loaded by descriptor, which needs rows of a multiple of 16 bytes."""
    compare(linear_cross_entropy, whole_logits, inputs(150), torch.float16, RATIOS)


def test_gradcheck():
    hidden_states, weight, target_ids = inputs(6, 4, 9)
    weights = (x.detach().double().requires_grad_() for x in (hidden_states, weight))
    function = lambda *xs: linear_cross_entropy(*xs, target_ids)  # noqa: E731
    torch.autograd.gradcheck(function, tuple(weights), fast_mode=True)


def test_no_supervised_row():
    hidden_states, weight, target_ids = inputs()
    found = results(linear_cross_entropy, (hidden_states, weight, target_ids.fill_(IGNORED)))
    assert all(not value.any() for value in found.values())


def test_ignored_rows_are_never_read():
    hidden_states, weight, target_ids = inputs()
    before = results(linear_cross_entropy, (hidden_states, weight, target_ids))
    with torch.no_grad():
        hidden_states[target_ids == IGNORED] = torch.nan
    after = results(linear_cross_entropy, (hidden_states, weight, target_ids))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not after["gradient 0"][target_ids == IGNORED].any()


def test_frozen_weights_cost_nothing(monkeypatch):
    calls = {}
    run = Operation.run
    monkeypatch.setattr(
        Operation, "run", lambda self, *args: calls.update({self.name: args}) or run(self, *args)
    )
    hidden_states, weight, target_ids = inputs()
    whole = results(linear_cross_entropy, (hidden_states, weight, target_ids))
    for frozen in (0, 1):
        tensors = [hidden_states, weight]
        tensors[frozen] = tensors[frozen].detach()
        found = results(linear_cross_entropy, (*tensors, target_ids))
        needs = calls["linear_cross_entropy_fwd"][3:]
        assert needs == (frozen != 0, frozen != 1) and f"gradient {frozen}" not in found
        assert all(torch.equal(value, whole[name]) for name, value in found.items())
    with torch.no_grad():
        linear_cross_entropy(hidden_states, weight, target_ids)
    assert calls["linear_cross_entropy_fwd"][3:] == (False, False)


def test_extreme_logits():
    """A hopeless target has a large finite loss, a certain one almost none."""
    hidden_states = torch.full((1, 1), 16.0, requires_grad=True)
    weight = torch.tensor([[1.0], [0.0], [-200.0]], requires_grad=True)
    hopeless, certain = torch.tensor([2]), torch.tensor([0])
    compare(linear_cross_entropy, whole_logits, (hidden_states, weight, hopeless), torch.float32)
    found = results(linear_cross_entropy, (hidden_states, weight, certain))
    assert all(value.abs().max() < 1e-5 for value in found.values())


def test_gradient_scales_with_the_loss():
    hidden_states, weight, target_ids = inputs()
    plain, tenth = (
        torch.autograd.grad(
            linear_cross_entropy(hidden_states, weight, target_ids) * scale, (hidden_states, weight)
        )
        for scale in (1, 0.1)
    )
    for one, other in zip(plain, tenth, strict=True):
        torch.testing.assert_close(one * 0.1, other)


def test_tied_weight_sums_its_gradients():
    """With tied embeddings one tensor is both an input's source and lm_head."""
    _, weight, target_ids = inputs()
    ids = torch.randint(len(weight), target_ids.shape)
    found, expected = (
        results(lambda w, loss=loss: loss(F.embedding(ids, w), w, target_ids), (weight,))
        for loss in (linear_cross_entropy, whole_logits)
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


def test_strided_input():
    hidden_states, weight, target_ids = inputs()
    with torch.no_grad():
        strided = hidden_states.t().contiguous().t().requires_grad_()
    found = results(linear_cross_entropy, (strided, weight, target_ids))
    expected = results(linear_cross_entropy, (hidden_states, weight, target_ids))
    torch.testing.assert_close(found, expected)


def test_same_bits():
    assert_same_bits(linear_cross_entropy, inputs())


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        (((5, 8), (11, 9), (5,)), r"lm_head_weight has shape \(11, 9\), expected \(11, 8\)"),
        (((5, 8), (11, 8), (4,)), r"target_ids has shape \(4,\), expected \(5,\).*\(5, 8\)"),
        (((5, 8, 1), (11, 8), (5,)), r"hidden_states has shape \(5, 8, 1\), expected 2"),
    ],
)
def test_wrong_shapes(shapes, words):
    hidden_states, weight, target_ids = map(torch.ones, shapes)
    with pytest.raises(ValueError, match=words):
        linear_cross_entropy(hidden_states, weight, target_ids.long())


def test_wrong_types():
    with pytest.raises(ValueError, match="target_ids is torch.float32"):
        linear_cross_entropy(torch.ones(5, 8), torch.ones(11, 8), torch.ones(5))
    with pytest.raises(ValueError, match="lm_head_weight is torch.float16"):
        linear_cross_entropy(torch.ones(5, 8), torch.ones(11, 8).half(), torch.ones(5).long())
