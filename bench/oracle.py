"""The check before the timing: a variant's outputs and gradients against the oracle's."""

from collections.abc import Callable, Mapping
from types import SimpleNamespace

import torch
from torch import Tensor

from bench.comparison import WrongResult
from bench.variants import DTYPE, Variant

WIDE = {torch.bfloat16: torch.float32, torch.float32: torch.float64}[DTYPE]

# ||result - oracle|| / ||oracle|| of outputs, and of gradients: a few roundings of each type
ERRORS = {torch.bfloat16: (1e-2, 2e-2), torch.float32: (1e-4, 1e-4)}


def as_tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def cast(inputs: SimpleNamespace, dtype: torch.dtype) -> SimpleNamespace:
    """A copy whose tensors of the benchmark's type have another; tables and indices stay."""

    def convert(value: object) -> object:
        if isinstance(value, Tensor) and value.dtype == DTYPE:
            return value.detach().to(dtype, copy=True)
        return [convert(item) for item in value] if isinstance(value, list) else value

    return SimpleNamespace(**{name: convert(value) for name, value in vars(inputs).items()})


def results(
    variant: Variant, function: Callable, inputs: SimpleNamespace, leaves: tuple[str, ...]
) -> dict[str, Tensor]:
    """Outputs, and gradients by the leaves of the case, through the variant's layout."""
    for name in leaves:
        getattr(inputs, name).requires_grad_()
    with torch.set_grad_enabled(bool(leaves)), variant.context():
        entered = variant.layout.enter(inputs)
        outputs = as_tuple(function(entered))
        outputs = [variant.layout.exit(entered, output) for output in outputs]
        found = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
        if leaves:
            sources = [getattr(inputs, name) for name in leaves]
            grads = torch.autograd.grad(outputs, sources, [grad_like(o) for o in outputs])
            found |= {f"gradient of {n}": g for n, g in zip(leaves, grads, strict=True)}
    return found


def grad_like(output: Tensor) -> Tensor:
    """The same random gradient for every variant, whatever its type; 1 for a loss."""
    if output.ndim == 0:
        return torch.ones_like(output)
    generator = torch.Generator(output.device).manual_seed(1)
    grad = torch.randn(output.shape, generator=generator, device=output.device)
    return grad.to(DTYPE).to(output.dtype)


def output_grads(
    variant: Variant, inputs: SimpleNamespace, outputs: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """The gradients that the check takes, in the variant's layout: zero where it has padding."""
    grads = []
    for output in outputs:
        inner = output.detach().requires_grad_()
        plain = variant.layout.exit(inputs, inner)
        grads.append(torch.autograd.grad(plain, inner, grad_like(plain))[0])
    return tuple(grads)


def compare(
    name: str,
    actual: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    errors: tuple[float, float],
) -> None:
    for what, result in actual.items():
        limit = errors[what.startswith("gradient")]
        oracle = expected[what].to(WIDE)
        if result.shape != oracle.shape:
            shapes = f"{tuple(result.shape)}, not {tuple(oracle.shape)}"
            raise WrongResult(name, f"{what} has shape {shapes}")
        error = ((result.to(WIDE) - oracle).norm() / oracle.norm()).item()
        if not error <= limit:  # NaN is refused, too
            raise WrongResult(name, f"{what} is off by {error:.2g} of its norm, above {limit:g}")
