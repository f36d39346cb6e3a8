"""How the tests judge a result: its error against fp64, relative to that of PyTorch's result."""

from collections.abc import Callable

import torch
from torch import Tensor

# RMS error over the RMS of the oracle, by dtype of the inputs
RATIOS = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item() if x.numel() else 0.0


def assert_accurate(
    name: str, ours: Tensor, peer: Tensor, oracle: Tensor, factor: float, limit: float
) -> None:
    """Our error is at most `factor` times the peer's, and `limit` relative to the oracle's size."""
    assert ours.dtype == peer.dtype and ours.shape == peer.shape, name
    assert ours.isfinite().all(), f"{name} is not finite"
    error, allowed = rms(ours - oracle), factor * rms(peer - oracle)
    if peer is not oracle:
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"
    ratio = error / max(rms(oracle), 1e-30)
    assert ratio <= limit, f"{name}: relative error {ratio:.3g}"


def cast(x, dtype: torch.dtype):
    """A leaf with the values of x in another dtype; anything but floating tensors unchanged."""
    if isinstance(x, Tensor) and x.is_floating_point():
        return x.detach().to(dtype).requires_grad_(x.requires_grad)
    return x


def results(function: Callable, inputs: tuple, seed: int = 1) -> dict[str, Tensor]:
    """Outputs, and gradients of all inputs that require one, for fixed random output gradients."""
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(seed)
    grads = [torch.randn(x.shape, generator=generator, device="cpu").to(x) for x in outputs]
    leaves = {i: x for i, x in enumerate(inputs) if isinstance(x, Tensor) and x.requires_grad}
    found = {f"output {i}": x.detach() for i, x in enumerate(outputs)}
    if leaves:
        pairs = [(x, grad) for x, grad in zip(outputs, grads, strict=True) if x.requires_grad]
        outputs, grads = zip(*pairs, strict=True)
        grads = torch.autograd.grad(outputs, list(leaves.values()), grads)
        found |= {f"gradient {i}": x for i, x in zip(leaves, grads, strict=True)}
    return found


def compare(
    ours: Callable, peer: Callable, inputs: tuple, dtype: torch.dtype, ratios: dict = RATIOS
) -> None:
    """ours(*inputs) and peer(*inputs) in `dtype`, both against peer in fp64.

    The error of outputs may be twice the peer's, that of gradients three times.
    """
    inputs = tuple(cast(x, dtype) for x in inputs)
    oracle = results(peer, tuple(cast(x, torch.float64) for x in inputs))
    theirs = oracle if dtype == torch.float64 else results(peer, inputs)
    found = results(ours, inputs)
    assert found.keys() == theirs.keys() == oracle.keys()
    for name, value in found.items():
        factor = 2 if name.startswith("output") else 3
        assert_accurate(name, value, theirs[name], oracle[name], factor, ratios[dtype])


def assert_same_bits(function: Callable, inputs: tuple) -> None:
    """The same input twice gives the same bits, and leaves the input as it was."""
    before = [x.detach().clone() if isinstance(x, Tensor) else x for x in inputs]
    first, second = results(function, inputs), results(function, inputs)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    for x, old in zip(inputs, before, strict=True):
        assert not isinstance(x, Tensor) or torch.equal(x, old), "an input was modified"
