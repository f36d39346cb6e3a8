"""AdamW against torch.optim.AdamW; bf16 weights with split master or stochastic rounding."""

from collections import Counter

import pytest
import torch
from mmalign_kernels import adamw_step
from mmalign_kernels.adamw import join_master, split_master
from mmalign_kernels.dispatch import use_backend
from torch.utils._python_dispatch import TorchDispatchMode

SETTINGS = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
SHAPES = ((1,), (199,), (64, 48), (67, 1031))  # sizes that allow wide accesses or do not


class Run:
    """Parameters of several shapes and their state; one call makes a step."""

    def __init__(self, params, remainders=None, seed=None, moments=torch.float32):
        self.params, self.remainders, self.seed = params, remainders, seed
        self.moments = [[torch.zeros(p.shape, dtype=moments) for p in params] for _ in range(2)]
        scales = [[torch.zeros(-(-p.numel() // 128)) for p in params] for _ in range(2)]
        self.scales = scales if moments == torch.uint8 else [None, None]
        self.count = 0

    def step(self, grads, learning_rate=1e-2, grad_scale=None):
        self.count += 1
        adamw_step(
            self.params,
            [grad.clone() for grad in grads],
            *self.moments,
            step=self.count,
            learning_rate=learning_rate,
            grad_scale=grad_scale,
            remainders=self.remainders,
            exp_avg_scales=self.scales[0],
            exp_avg_sq_scales=self.scales[1],
            seed=self.seed,
            **SETTINGS,
        )


def weights():
    return [torch.randn(shape) for shape in SHAPES]


def gradients(num_steps, dtype=torch.float32):
    return [[torch.randn(shape).to(dtype) for shape in SHAPES] for _ in range(num_steps)]


class Dispatched(TorchDispatchMode):
    """Counts what PyTorch runs."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[str(function)] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("moments", "seed"), ((torch.float32, None), (torch.uint8, 1)))
def test_the_host_works_once_for_the_whole_list(backend, moments, seed):
    """A LoRA has 448 matrices: work of the host for each of them would outlast the device's."""
    if backend != "triton":
        pytest.skip("the reference goes tensor by tensor")
    found = []
    for copies in (1, 6):
        params = [p for _ in range(copies) for p in weights()]
        run = Run(params, moments=moments, seed=seed)
        grads = [torch.ones_like(p) for p in params]
        with Dispatched() as dispatched:
            run.step(grads)
        assert dispatched.counts.pop("aten.clone.default") == len(grads)  # of Run.step
        found.append(dispatched.counts)
    assert found[0] == found[1] and found[0].total() < 40, found


@pytest.mark.parametrize("clip", (False, True))
@pytest.mark.parametrize("fused", (False, True))
def test_fp32_equals_torch(fused, clip):
    run = Run(weights())
    theirs = [p.clone().requires_grad_() for p in run.params]
    betas = (SETTINGS["beta1"], SETTINGS["beta2"])
    decay = SETTINGS["weight_decay"]
    optimizer = torch.optim.AdamW(theirs, lr=1e-2, betas=betas, weight_decay=decay, fused=fused)
    for i, grads in enumerate(gradients(10)):
        learning_rate, scale = 1e-2 * (10 - i) / 10, torch.tensor(0.3 if clip else 1.0)
        run.step(grads, learning_rate, scale if clip else None)
        optimizer.param_groups[0]["lr"] = learning_rate
        for param, grad in zip(theirs, grads, strict=True):
            param.grad = grad * scale
        optimizer.step()
    for our, their in zip(run.params, theirs, strict=True):
        torch.testing.assert_close(our, their.detach(), rtol=2e-6, atol=2e-7)


def test_one_step_by_the_formula():
    """fp64 arithmetic, the formula of the paper written out."""
    run, grads = Run(weights()), gradients(2)
    m, v = (SETTINGS[name] for name in ("beta1", "beta2"))
    expected = [p.double() for p in run.params]
    first, second = [0] * len(SHAPES), [0] * len(SHAPES)
    for step, grads_of_step in enumerate(grads, 1):
        run.step(grads_of_step)
        for i, grad in enumerate(g.double() for g in grads_of_step):
            first[i] = m * first[i] + (1 - m) * grad
            second[i] = v * second[i] + (1 - v) * grad**2
            root = (second[i] / (1 - v**step)).sqrt() + SETTINGS["eps"]
            decayed = expected[i] * (1 - 1e-2 * SETTINGS["weight_decay"])
            expected[i] = decayed - 1e-2 * first[i] / (1 - m**step) / root
    for our, exact in zip(run.params, expected, strict=True):
        torch.testing.assert_close(our, exact.float(), rtol=2e-6, atol=2e-7)


@pytest.mark.parametrize("grad_dtype", (torch.float32, torch.bfloat16))
def test_split_master_is_the_fp32_run_bit_for_bit(grad_dtype):
    exact = Run(weights())
    split = [split_master(p) for p in exact.params]
    ours = Run([weight for weight, _ in split], [remainder for _, remainder in split])
    for grads in gradients(10, grad_dtype):
        scale = torch.tensor(0.7)
        exact.step([grad.float() for grad in grads], grad_scale=scale)
        ours.step(grads, grad_scale=scale)
    for i, master in enumerate(exact.params):
        assert torch.equal(join_master(ours.params[i], ours.remainders[i]), master)
        assert (ours.params[i].float() - master).abs().le(master.abs() / 256).all()
        for kind in (0, 1):
            assert torch.equal(ours.moments[kind][i], exact.moments[kind][i])


@pytest.mark.parametrize("backend", ("cpu",), indirect=True)
@pytest.mark.parametrize("beta1", (0.9, 0.3))
@pytest.mark.parametrize("clip", (False, True))
@pytest.mark.parametrize("splits", (False, True))
def test_the_bits_of_torchs_fused_kernel(splits, clip, beta1, monkeypatch):
    """Which the reference calls; with any number of threads and of elements past whole vectors."""
    monkeypatch.setitem(SETTINGS, "beta1", beta1)
    start = [torch.randn(n) for n in (*range(20), 3 * 512, 100_003)]
    grads = [[torch.randn_like(p) for p in start] for _ in range(3)]
    scale, found, before = torch.tensor(0.3) if clip else None, [], torch.get_num_threads()
    for name, threads in (("reference", 1), ("cpu", 1), ("cpu", 2), ("cpu", 3)):
        halves = [split_master(p) for p in start]
        run = Run([p.clone() for p in start])
        if splits:
            run = Run([high for high, _ in halves], [low for _, low in halves])
        torch.set_num_threads(threads)
        try:
            with use_backend(name):
                for grads_of_step in grads:
                    run.step(grads_of_step, grad_scale=scale)
        finally:
            torch.set_num_threads(before)
        found.append([*run.params, *(run.remainders or []), *run.moments[0], *run.moments[1]])
    for other in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(found[0], other, strict=True))


def test_split_master_of_every_kind_of_number():
    bits = torch.randint(-(2**31), 2**31, (100_000,)).int()
    special = [0.0, -0.0, 1.0, 1.0 + 2**-8, 1.0 + 2**-9, 3e-45, -3e-45, 1e38, torch.inf, -torch.inf]
    numbers = torch.cat((bits.view(torch.float32), torch.tensor(special)))
    numbers = numbers[~numbers.isnan()]
    weight, remainder = split_master(numbers)
    joined = join_master(weight, remainder)
    assert torch.equal(joined.view(torch.int32), numbers.view(torch.int32))
    ties = (numbers.view(torch.int32) & 0xFFFF) == 0x8000
    assert torch.equal(weight[~ties], numbers[~ties].bfloat16())
    plain = torch.randn(1000).bfloat16()  # a bf16 weight with remainder zero is itself
    assert torch.equal(join_master(plain, torch.zeros(1000, dtype=torch.int16)), plain.float())


def nans():
    return torch.tensor([0x7FFFFFFF, -1, 0x7FC00000, 0x7F800001]).int().view(torch.float32)


@pytest.mark.parametrize("moments", (torch.float32, torch.bfloat16, torch.uint8))
@pytest.mark.parametrize("master", ("fp32", "split", "stochastic"))
def test_nan_stays_nan(master, moments):
    """Also the one that arithmetic gives on a GPU: all bits set, it would round to a zero."""
    weight = torch.ones(4 * 128)
    low = [torch.zeros(weight.shape, dtype=torch.int16)] if master == "split" else None
    weight = weight if master == "fp32" else weight.bfloat16()
    rounds = master == "stochastic" or moments != torch.float32
    run = Run([weight], low, seed=3 if rounds else None, moments=moments)
    grads = torch.ones(weight.shape)
    grads[::128] = nans()
    run.step([grads])
    run.step([torch.ones(weight.shape)])  # the narrow forms are read again
    expected = grads.isnan()
    if moments == torch.uint8:
        expected[:] = True  # a NaN takes all whose scale it shares
    else:
        assert all(torch.equal(run.moments[kind][0].isnan(), expected) for kind in (0, 1))
    weight = run.params[0]
    assert torch.equal(weight.isnan(), expected)
    assert low is None or torch.equal(join_master(weight, low[0]).isnan(), expected)


def test_split_master_of_nan_is_nan_for_both_readers():
    weight, remainder = split_master(nans())
    assert weight.isnan().all() and join_master(weight, remainder).isnan().all()


def test_stochastic_rounding_is_unbiased():
    """A step far below bf16's resolution moves the mean weight by what fp32 would move it."""
    num, learning_rate = 400_000, 1e-4  # bf16 keeps steps of 2^-7 around 1
    run = Run([torch.ones(num).bfloat16()], seed=5)
    exact = Run([torch.ones(num)])
    grads = [torch.full((num,), 2.0)]
    run.step(grads, learning_rate)
    exact.step(grads, learning_rate)
    rounded, target = run.params[0].float(), exact.params[0][0].item()
    assert set(rounded.unique().tolist()) == {1 - 2**-8, 1.0}  # the two neighbours of the target
    share = (1 - target) / 2**-8
    deviation = (share * (1 - share) / num) ** 0.5
    assert abs(rounded.lt(1).double().mean().item() - share) < 4 * deviation
    assert not torch.equal(rounded[: num // 2], rounded[num // 2 :])


def test_stochastic_rounding_of_negative_weights():
    run = Run([-torch.ones(100_000).bfloat16()], seed=5)
    run.step([torch.full((100_000,), -2.0)], 1e-4)
    exact = Run([-torch.ones(1)])
    exact.step([torch.full((1,), -2.0)], 1e-4)
    mean = run.params[0].double().mean().item()
    assert abs(mean - exact.params[0].item()) < 4 * 2**-9 / 100_000**0.5


def test_stochastic_rounding_follows_its_seed():
    start, grads = [p.bfloat16() for p in weights()], gradients(3)
    found = []
    for seed in (7, 7, 8):
        run = Run([p.clone() for p in start], seed=seed)
        for grads_of_step in grads:
            run.step(grads_of_step)
        found.append(run.params)
    assert all(torch.equal(x, y) for x, y in zip(found[0], found[1], strict=True))
    assert not all(torch.equal(x, y) for x, y in zip(found[0], found[2], strict=True))


def test_every_step_draws_new_numbers():
    """With one seed, step 1 and step 2 must not draw the same numbers."""
    found = []
    for step in (1, 2):
        run = Run([torch.ones(10_000).bfloat16()], seed=3)
        run.count = step - 1
        run.step([torch.full((10_000,), 1.0)], 1e-3)
        found.append(run.params[0])
    assert not torch.equal(*found)


def test_a_long_list_is_updated_as_each_of_its_tensors():
    """More tensors than one table's smallest size, some empty, some at odd addresses."""
    sizes = [16 * i for i in range(20)] + [i * i + 1 for i in range(20)]
    memory, grads = torch.randn(sum(sizes) + 1), [torch.randn(size) for size in sizes]
    params = list(memory[1:].split(sizes))
    alone = [Run([param.clone()]) for param in params]
    run = Run(params)
    for _ in range(2):
        run.step(grads)
        for one, grad in zip(alone, grads, strict=True):
            one.step([grad])
    for i, one in enumerate(alone):
        assert torch.equal(one.params[0], params[i])
        assert all(torch.equal(one.moments[kind][0], run.moments[kind][i]) for kind in (0, 1))


def test_wrong_arguments():
    run = Run(weights())
    with pytest.raises(ValueError, match="4 params, but 3 grads"):
        run.step(gradients(1)[0][:3])
    with pytest.raises(ValueError, match=r"grads\[0\] has shape \(2,\), expected \(1,\)"):
        run.step([torch.ones(2), *gradients(1)[0][1:]])
    bf16_params = [p.bfloat16() for p in weights()]
    with pytest.raises(ValueError, match="stochastic rounding, which needs a seed"):
        Run(bf16_params).step(gradients(1)[0])
    with pytest.raises(ValueError, match="nothing here uses stochastic rounding"):
        Run(weights(), seed=1).step(gradients(1)[0])
    with pytest.raises(ValueError, match="fp32 params take no remainders"):
        lows = [torch.zeros(shape, dtype=torch.int16) for shape in SHAPES]
        Run(weights(), lows).step(gradients(1)[0])
    with pytest.raises(ValueError, match=r"remainders\[0\] is torch.int32"):
        Run(bf16_params, [torch.zeros(s, dtype=torch.int32) for s in SHAPES]).step(gradients(1)[0])
    with pytest.raises(ValueError, match=r"params\[0\].*not contiguous"):
        Run([torch.randn(4, 3).t()]).step([torch.randn(3, 4)])
    with pytest.raises(ValueError, match=r"remainders\[0\] is not contiguous"):
        Run([torch.ones(4, 3).bfloat16()], [torch.zeros(3, 4).short().t()]).step([torch.ones(4, 3)])
    mixed = [torch.ones(shape, dtype=torch.bfloat16) for shape in SHAPES[:3]]
    with pytest.raises(ValueError, match=r"grads\[3\] is torch.float32"):
        Run(weights()).step([*mixed, gradients(1)[0][3]])
    with pytest.raises(ValueError, match="grads are torch.bfloat16 for torch.float32 params"):
        Run(weights()[:1]).step(mixed[:1])
