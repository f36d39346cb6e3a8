"""AdamW's moments in bf16 and in 8-bit codes: neighbours of the exact ones, right in the mean."""

import pytest
import torch
from mmalign_kernels.adamw import join_master, split_master

from .test_adamw import Run, gradients, weights

NARROW = (torch.bfloat16, torch.uint8)


def codebook(exponent_bits):
    """Every code's size, in fp64: 3 bits of mantissa, the largest exponent is 0."""
    code = torch.arange(2 ** (exponent_bits + 3))
    exponent, mantissa = (code >> 3).double(), (code & 7).double() / 8
    lowest = 2.0 ** (2 - 2**exponent_bits)  # of the normal codes, and of the subnormal ones
    normal = (1 + mantissa) * lowest * 2 ** (exponent - 1)
    return torch.where(exponent == 0, mantissa * lowest, normal)


def decoded(run, i, kind):
    """A moment in fp64, read by the definition of its format."""
    moment = run.moments[kind][i].view(-1)
    if moment.dtype != torch.uint8:
        return moment.double()
    scale = run.scales[kind][i].double().repeat_interleave(128)[: moment.numel()]
    code = moment.long()
    sizes = codebook((4, 5)[kind])[code % 128 if kind == 0 else code] * scale
    return torch.where(code >= 128, -sizes, sizes) if kind == 0 else sizes


def neighbours(run, i, kind, exact):
    """The values of the format below and above the size of the exact moment."""
    sizes = exact.abs().view(-1)
    if run.moments[kind][i].dtype == torch.bfloat16:
        low = (sizes.view(torch.int32) >> 16).to(torch.int16)
        return tuple(x.view(torch.bfloat16).double() for x in (low, low + 1))
    book, scale = codebook((4, 5)[kind]), run.scales[kind][i].double()
    scale = scale.repeat_interleave(128)[: sizes.numel()]
    place = torch.searchsorted(book, sizes.double() / scale * (1 - 1e-7), right=True) - 1
    above = (place + 1).clamp(max=len(book) - 1)
    return book[place.clamp(min=0)] * scale, book[above] * scale


@pytest.mark.parametrize("moments", NARROW)
def test_one_step_takes_neighbours_of_the_exact_moments(moments):
    exact = Run(weights())
    run = Run([p.clone() for p in exact.params], seed=3, moments=moments)
    grads = gradients(1)[0]
    exact.step(grads)
    run.step(grads)
    for i, (ours, theirs) in enumerate(zip(run.params, exact.params, strict=True)):
        assert torch.equal(ours, theirs)  # the step itself uses the moments before they are rounded
        for kind in (0, 1):
            wanted, found = exact.moments[kind][i].view(-1), decoded(run, i, kind)
            low, high = neighbours(run, i, kind, wanted)
            smallest = high * (low == 0) if kind == 1 else low  # a second moment is never zero
            close = torch.isclose(found.abs(), torch.maximum(low, smallest), rtol=1e-5, atol=0)
            close |= torch.isclose(found.abs(), high, rtol=1e-5, atol=0)
            assert close.all()
            assert ((found < 0) == (wanted < 0)).logical_or(found == 0).all()
            if moments == torch.uint8:
                largest = wanted.abs()[:128].max() if wanted.numel() > 128 else wanted.abs().max()
                torch.testing.assert_close(run.scales[kind][i][0] * 1.875, largest)


@pytest.mark.parametrize("moments", NARROW)
def test_rounding_of_moments_is_unbiased(moments):
    """Second and later steps of one gradient: the mean over many elements is the exact moment."""
    num = 1 << 17
    grads = torch.full((num,), 0.7)
    grads[::128] = 1.0  # the largest of every block
    exact = Run([torch.zeros(num)])
    run = Run([torch.zeros(num)], seed=11, moments=moments)
    for _ in range(3):
        exact.step([grads])
        run.step([grads])
    rest = torch.ones(num, dtype=torch.bool)
    rest[::128] = False
    for kind in (0, 1):
        found, wanted = decoded(run, 0, kind)[rest], exact.moments[kind][0][1].item()
        assert found.unique().numel() > 1
        error = 4 * found.std().item() / len(found) ** 0.5
        assert abs(found.mean().item() - wanted) < error + 1e-6 * wanted


def test_a_small_change_of_the_second_moment_is_not_lost():
    """Rounded to the nearest, beta2 = 0.95 and a hundredth of the gradient would change nothing."""
    num = 1 << 14
    run, exact = Run([torch.zeros(num)], seed=1, moments=torch.uint8), Run([torch.zeros(num)])
    for step in range(40):
        grads = [torch.full((num,), 1.0 if step == 0 else 0.99)]
        run.step(grads)
        exact.step(grads)
    found = decoded(run, 0, 1)
    wanted = exact.moments[1][0][0].item()
    assert abs(found.mean().item() / wanted - 1) < 0.01


@pytest.mark.parametrize("moments", NARROW)
def test_moments_follow_seed_and_step(moments):
    found = []
    for seed in (7, 7, 8):
        run = Run([torch.zeros(5000)], seed=seed, moments=moments)
        torch.manual_seed(0)
        for _ in range(2):
            run.step([torch.randn(5000)])
        found.append(torch.stack([decoded(run, 0, kind) for kind in (0, 1)]))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.parametrize("moments", NARROW)
def test_split_master_with_narrow_moments(moments):
    """The weights of fp32 storage and the same moments, bit for bit."""
    start = weights()
    split = [split_master(p) for p in start]
    plain = Run([p.clone() for p in start], seed=2, moments=moments)
    ours = Run([w for w, _ in split], [low for _, low in split], seed=2, moments=moments)
    for grads in gradients(5):
        for run in (plain, ours):
            run.step(grads, grad_scale=torch.tensor(0.7))
    for i, master in enumerate(plain.params):
        assert torch.equal(join_master(ours.params[i], ours.remainders[i]), master)
        for kind in (0, 1):
            assert torch.equal(ours.moments[kind][i], plain.moments[kind][i])


@pytest.mark.parametrize("factor", (0.0, torch.nan))
@pytest.mark.parametrize("moments", NARROW)
def test_a_skipped_step_changes_nothing(moments, factor):
    run = Run([p.bfloat16() for p in weights()], seed=5, moments=moments)
    run.step(gradients(1)[0])
    scales = [x for x in run.scales if x is not None]
    state = [*run.params, *(x for kind in (*run.moments, *scales) for x in kind)]
    before = [x.clone() for x in state]
    run.step(gradients(1)[0], grad_scale=torch.tensor(factor))
    assert all(torch.equal(x, y) for x, y in zip(state, before, strict=True))


def test_nan_stays_in_its_block():
    run = Run([torch.zeros(300)], seed=1, moments=torch.uint8)
    grads = torch.randn(300)
    grads[130] = torch.nan
    run.step([grads])
    for kind in (0, 1):
        found = decoded(run, 0, kind)
        assert found[128:256].isnan().all() and found[:128].isfinite().all()


def test_wrong_moments():
    run = Run(weights(), moments=torch.uint8)
    with pytest.raises(ValueError, match="needs a seed"):
        run.step(gradients(1)[0])
    run = Run(weights(), moments=torch.uint8, seed=1)
    run.scales = [None, None]
    with pytest.raises(ValueError, match="only 8-bit codes take scales"):
        run.step(gradients(1)[0])
    run = Run(weights(), moments=torch.uint8, seed=1)
    run.scales[1][2] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"exp_avg_sq_scales\[2\] has 3 elements"):
        run.step(gradients(1)[0])
    run = Run(weights(), moments=torch.float16, seed=1)
    with pytest.raises(ValueError, match=r"exp_avgs\[0\] is torch.float16"):
        run.step(gradients(1)[0])


def test_scales_may_lie_in_rows():
    """As the optimizer keeps them, so that they can be sharded."""
    weight, grads = torch.randn(3, 256), [torch.randn(3, 256)]
    flat, rows = (Run([weight.clone()], seed=5, moments=torch.uint8) for _ in range(2))
    rows.scales = [[scale.view(3, 2)] for [scale] in rows.scales]
    for run in (flat, rows):
        run.step(grads)
    assert torch.equal(flat.params[0], rows.params[0]) and not torch.equal(flat.params[0], weight)
    for ours, theirs in zip(rows.scales, flat.scales, strict=True):
        assert torch.equal(ours[0].flatten(), theirs[0])
