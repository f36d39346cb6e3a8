"""AdamW with clipping against torch's, and the ways to keep weights and moments in fewer bytes."""

from dataclasses import replace

import pytest
import torch
from mmalign_kernels.adamw import join_master

from mmalign.config import OptimizerConfig
from mmalign.errors import UserError
from mmalign.training.loop import train
from mmalign.training.optimizer import AdamW
from mmalign.training.trainer import Trainer
from tests.training.helpers import exported_weights, losses, small_config

SHAPES = {"matrix": (24, 256), "odd": (7, 5), "vector": (130,)}
NARROW = tuple(
    (master, moments)
    for master in ("split", "fp32-copy", "stochastic")
    for moments in ("fp32", "bf16", "8bit")
)


def parameters(dtype=torch.bfloat16):
    return {n: torch.nn.Parameter(torch.randn(s).to(dtype)) for n, s in SHAPES.items()}


def set_gradients(optimizer, step):
    generator = torch.Generator().manual_seed(step)
    for p in optimizer.parameters.values():
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def masters(optimizer):
    """The fp32 weights that stand behind bf16 ones."""
    low = optimizer.remainder
    return {
        name: join_master(p.detach(), low[name]) if name in low else optimizer.master[name]
        for name, p in optimizer.parameters.items()
    }


def assert_same(one, other):
    """The same bits in parameters and state."""
    assert one.state().keys() == other.state().keys()
    for tensors, others in ((one.state(), other.state()), (one.parameters, other.parameters)):
        for name, tensor in tensors.items():
            assert torch.equal(tensor, others[name]), name


def test_equals_torch_with_clipping_and_weight_decay():
    torch.manual_seed(0)
    config = OptimizerConfig(learning_rate=1e-2, weight_decay=0.1, max_grad_norm=0.5)
    ours = {str(i): torch.nn.Parameter(torch.randn(7, 5)) for i in range(3)}
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours.values()]
    optimizer = AdamW(ours, config)
    reference = torch.optim.AdamW(theirs, lr=1e-2, weight_decay=0.1)
    for _ in range(10):
        for mine, other in zip(ours.values(), theirs, strict=True):
            mine.grad = torch.randn_like(mine)
            other.grad = mine.grad.clone()
        norm = torch.nn.utils.clip_grad_norm_(theirs, config.max_grad_norm)
        torch.testing.assert_close(optimizer.gradient_norm(), norm)
        optimizer.step(1e-2, optimizer.gradient_norm())
        reference.step()
    for mine, other in zip(ours.values(), theirs, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("master", ("split", "fp32-copy"))
def test_bf16_weights_are_torchs_fp32_run_bit_for_bit(master):
    """200 steps of torch's fused AdamW on fp32 weights, most of them far below bf16's steps."""
    torch.manual_seed(0)
    config = OptimizerConfig(max_grad_norm=0.0, master=master, weight_decay=0.1)
    ours = AdamW(parameters(), config)
    theirs = {n: torch.nn.Parameter(p.detach().float()) for n, p in ours.parameters.items()}
    reference = torch.optim.AdamW(theirs.values(), lr=1e-5, weight_decay=0.1, fused=True)
    for step in range(200):
        set_gradients(ours, step)
        for name, p in theirs.items():
            p.grad = ours.parameters[name].grad.float()
        ours.step(1e-5, ours.gradient_norm())
        reference.step()
    for name, master in masters(ours).items():
        assert torch.equal(master, theirs[name])
        weight, exact = ours.parameters[name].float(), theirs[name]
        assert (weight - exact).abs().le(exact.abs() / 256).all()


def test_stochastic_weights_are_right_in_the_mean():
    """A drift of a hundredth of bf16's step, 20 times: rounded to the nearest, nothing moves."""
    num = 1 << 16
    config = OptimizerConfig(max_grad_norm=0.0, master="stochastic")
    weight = torch.nn.Parameter(torch.ones(num // 256, 256).bfloat16())
    optimizer, learning_rate = AdamW({"weight": weight}, config, seed=1), 4e-5
    exact = torch.ones(1, requires_grad=True)
    reference = torch.optim.AdamW([exact], lr=learning_rate, weight_decay=0.0)
    for _ in range(20):
        weight.grad, exact.grad = torch.ones_like(weight), torch.ones(1)
        optimizer.step(learning_rate, optimizer.gradient_norm())
        reference.step()
    found = weight.detach().double()
    assert abs(found.mean() - exact.item()) < 4 * found.std() / num**0.5
    assert found.std() > 0


@pytest.mark.parametrize(("master", "moments"), NARROW)
def test_state_continues_bit_for_bit(master, moments):
    """Through a copy of state(), which is what a checkpoint holds."""
    config = OptimizerConfig(master=master, moments=moments)
    torch.manual_seed(0)
    whole, resumed = AdamW(parameters(), config, seed=3), None
    for step in range(6):
        if step == 3:
            resumed = AdamW(parameters(), config, seed=3)
            saved = {name: tensor.clone() for name, tensor in whole.state().items()}
            for name, tensor in resumed.state().items():
                tensor.copy_(saved[name])
            for name, parameter in resumed.parameters.items():
                parameter.data.copy_(whole.parameters[name])
            resumed.step_count = 3
        for optimizer in (whole, resumed):
            if optimizer is not None:
                set_gradients(optimizer, step)
                optimizer.step(1e-2, optimizer.gradient_norm())
    assert_same(whole, resumed)


def test_bytes_of_the_state():
    """What the README and the memory plan promise, for a matrix."""
    found = {}
    for master, moments in NARROW:
        weight = {"w": torch.nn.Parameter(torch.zeros(256, 128).bfloat16())}
        state = AdamW(weight, OptimizerConfig(master=master, moments=moments)).state()
        found[master, moments] = sum(x.nbytes for x in state.values()) / (256 * 128)
    assert found["fp32-copy", "fp32"] == 12  # without weight and gradient
    assert found["split", "fp32"] == 10
    assert found["split", "bf16"] == 6
    assert found["stochastic", "bf16"] == 4
    assert found["stochastic", "8bit"] == 2 + 2 * 4 / 128
    assert found["split", "8bit"] == 4 + 2 * 4 / 128


def test_update_in_backward_is_the_plain_update():
    """Bit for bit, with micro-batches that add up before the last one."""
    config = OptimizerConfig(max_grad_norm=0.0, weight_decay=0.1)
    models = []
    for in_backward in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(32, 128), torch.nn.Linear(128, 8)).bfloat16()
        settings = replace(config, update_in_backward=in_backward)
        optimizer = AdamW(dict(model.named_parameters()), settings)
        norms = []
        for step in range(3):
            inputs = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(step)).bfloat16()
            model(inputs[0]).square().sum().backward()
            if in_backward:
                optimizer.arm(1e-3)
            model(inputs[1]).square().sum().backward()
            assert all((p.grad is None) == in_backward for p in model.parameters())
            norms.append(optimizer.gradient_norm())
            optimizer.step(1e-3, norms[-1])
            optimizer.zero_grad()
        models.append((optimizer, torch.stack(norms)))
    (plain, norms), (hooked, hooked_norms) = models
    torch.testing.assert_close(hooked_norms, norms)
    assert plain.step_count == hooked.step_count == 3
    assert_same(plain, hooked)


def test_update_in_backward_leaves_out_what_is_not_finite():
    weights = {n: torch.nn.Parameter(torch.ones(3)) for n in ("good", "bad")}
    optimizer = AdamW(weights, OptimizerConfig(max_grad_norm=0.0, update_in_backward=True))
    optimizer.arm(1e-2)
    (weights["good"].sum() + (weights["bad"] * torch.inf).sum()).backward()
    assert weights["good"].ne(1).all() and weights["bad"].eq(1).all()
    assert not optimizer.gradient_norm().isfinite()
    optimizer.step(1e-2, torch.tensor(torch.inf))
    optimizer.arm(1e-2, allowed=torch.tensor(False))
    before = weights["good"].detach().clone()
    weights["good"].sum().backward()
    assert torch.equal(weights["good"], before)


def test_update_in_backward_and_clipping_exclude_each_other():
    config = OptimizerConfig(update_in_backward=True, max_grad_norm=1.0)
    with pytest.raises(UserError, match="--optimizer.max-grad-norm 0"):
        AdamW(parameters(), config)
    with pytest.raises(UserError, match="the 2 processes of this run"):
        AdamW(parameters(), replace(config, max_grad_norm=0.0), world_size=2)


def test_loss_curves_are_that_of_fp32(small_world, tmp_path):
    """Products in bf16 alone move them by 0.002, narrow state by up to 0.005."""
    settings = {"num_steps": 12, "optimizer": {"learning_rate": 2e-3}}
    train(small_config(small_world, tmp_path / "fp32", **settings))
    fp32 = torch.tensor(losses(tmp_path / "fp32"))
    assert fp32[-1] < fp32[0] - 1.5
    for master, moments in (("stochastic", "bf16"), ("stochastic", "8bit"), ("split", "8bit")):
        settings["optimizer"] |= {"master": master, "moments": moments}
        run_dir = tmp_path / master / moments
        train(small_config(small_world, run_dir, precision="bf16", **settings))
        torch.testing.assert_close(torch.tensor(losses(run_dir)), fp32, atol=0.01, rtol=0)


def test_a_run_with_narrow_state_continues_bit_for_bit(small_world, tmp_path, monkeypatch):
    optimizer = {"master": "stochastic", "moments": "8bit"}
    settings = {"precision": "bf16", "optimizer": optimizer, "num_steps": 4}
    train(small_config(small_world, tmp_path / "whole", **settings))
    halted = small_config(small_world, tmp_path / "halves", **settings)
    train_step, seen = Trainer.train_step, []

    def fail_at_the_third(self, step, *flags):
        seen.append(step.index)
        if seen == [0, 1, 2]:
            raise KeyboardInterrupt
        return train_step(self, step, *flags)

    monkeypatch.setattr(Trainer, "train_step", fail_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        train(halted)
    train(halted)
    assert seen == [0, 1, 2, 2, 3]
    whole, halves = (exported_weights(tmp_path / name) for name in ("whole", "halves"))
    assert whole.keys() == halves.keys()
    assert all(torch.equal(tensor, halves[name]) for name, tensor in whole.items())


def test_a_run_that_updates_in_backward(small_world, tmp_path):
    """The weights of the plain run, bit for bit, with several micro-batches a step."""
    settings = {"precision": "bf16", "num_steps": 3, "micro_batch_tokens": 310}
    for name, in_backward in (("plain", False), ("backward", True)):
        optimizer = {"max_grad_norm": 0.0, "update_in_backward": in_backward}
        train(small_config(small_world, tmp_path / name, **settings, optimizer=optimizer))
    plain, ours = (exported_weights(tmp_path / name) for name in ("plain", "backward"))
    assert all(torch.equal(tensor, ours[name]) for name, tensor in plain.items())
