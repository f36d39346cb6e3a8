"""Comparisons of one operation: its cases and variants, and the oracle that all must match.

A variant is verified once per case, before anything is timed: outputs and gradients against the
same formula in PyTorch, in fp32 where the variants run in bf16 and in fp64 where they run in fp32,
on the same random data.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace

import torch
from mmalign_kernels.costs import Cost, Passes
from torch import Tensor

from bench.comparison import (
    BACKWARD,
    BOTH,
    FORWARD,
    Calls,
    CannotRun,
    Comparison,
    WrongResult,
    is_ours,
)
from bench.peers import Variant
from bench.shapes import DTYPE, ON_GPU

ALL = (FORWARD, BACKWARD, BOTH)
ORACLE_DTYPE = {torch.bfloat16: torch.float32, torch.float32: torch.float64}[DTYPE]
# ||result - oracle|| / ||oracle|| of outputs, and of gradients: a few roundings of each type
ERRORS = {torch.bfloat16: (1e-2, 2e-2), torch.float32: (1e-4, 1e-4)}[DTYPE]

Inputs = SimpleNamespace


@dataclass(frozen=True)
class Case:
    """One shape. `make()` draws the inputs; costs by direction are of one call."""

    name: str
    make: Callable[[], Inputs]
    leaves: tuple[str, ...]  # the inputs that gradients are taken of
    costs: Mapping[str, Cost]


def costs_of(passes: Passes) -> dict[str, Cost]:
    return {FORWARD: passes.forward, BACKWARD: passes.backward, BOTH: passes.both}


@dataclass(frozen=True, eq=False)
class Operation:
    name: str
    variants: Sequence[Variant]
    oracle: Variant
    bound: str  # COPY or MATMUL
    directions: tuple[str, ...] = ALL
    errors: tuple[float, float] = ERRORS

    def comparisons(self, cases: Sequence[Case]) -> list["OperationComparison"]:
        """Every case in every direction; the directions share data and verified variants."""
        shared = [Verified(self, case) for case in cases]
        return [OperationComparison(one, way) for one in shared for way in self.directions]


@dataclass(frozen=True, eq=False)
class OperationComparison(Comparison):
    shared: "Verified"
    direction: str

    @property
    def operation(self) -> Operation:
        return self.shared.operation

    @property
    def benchmark(self) -> str:
        return self.operation.name

    @property
    def case(self) -> str:
        return self.shared.case.name

    @property
    def variants(self) -> list[str]:
        return [v.name for v in self.operation.variants if self.direction in v.directions]

    def _variant(self, name: str) -> Variant:
        return next(variant for variant in self.operation.variants if variant.name == name)

    def missing(self, variant: str) -> str | None:
        return self._variant(variant).missing()

    def calls(self, variants: Sequence[str]) -> Calls:
        ready = self.shared.load([self._variant(name) for name in variants])
        if self.direction == BACKWARD:
            calls = {name: one.backward for name, one in ready.items()}
            return Calls(calls, {name: one.prepare for name, one in ready.items()})
        if self.direction == BOTH:
            calls = {name: one.both for name, one in ready.items()}
            return Calls(calls, {name: one.prepare_grads for name, one in ready.items()})
        if self.direction == FORWARD:
            return Calls({name: one.forward for name, one in ready.items()})
        return Calls({name: one.without_grad for name, one in ready.items()})

    def figures(self, variant: str, seconds: float) -> dict:
        if not self._variant(variant).comparable:
            return {}
        cost = self.shared.case.costs[self.direction]
        return {"bytes": cost.bytes, "flops": cost.flops, "bound": self.operation.bound}


# ---- verification ----


class Verified:
    """A case's data and verified variants, held until another case is loaded."""

    held: "Verified | None" = None

    def __init__(self, operation: Operation, case: Case):
        self.operation, self.case = operation, case
        self.inputs = Inputs()  # until it is loaded
        self.ready: dict[str, Ready] = {}
        self.refused: dict[str, WrongResult | CannotRun] = {}

    def load(self, variants: Sequence[Variant]) -> dict[str, "Ready"]:
        """Raises WrongResult or CannotRun for the first variant that fails its verification."""
        if Verified.held is not self:
            Verified.drop()
            Verified.held = self
            torch.manual_seed(0)
            self.inputs = self.case.make()
        fresh = [v for v in variants if v.name not in self.ready.keys() | self.refused.keys()]
        if fresh:
            self._verify(fresh)
        for variant in variants:
            if variant.name in self.refused:
                raise self.refused[variant.name]
        return {variant.name: self.ready[variant.name] for variant in variants}

    @classmethod
    def drop(cls) -> None:
        """Frees the case that is held, and forgets what was compiled for it."""
        if cls.held is not None:
            cls.held.inputs, cls.held.ready = Inputs(), {}
        cls.held = None
        if "torch._dynamo" in sys.modules:  # past a limit of recompilations it would run eagerly
            torch._dynamo.reset()
        if ON_GPU:
            torch.cuda.empty_cache()

    def _verify(self, variants: Sequence[Variant]) -> None:
        leaves, oracle = self.case.leaves, self.operation.oracle
        expected = results(oracle, oracle.function, cast(self.inputs, ORACLE_DTYPE), leaves)
        for variant in variants:
            function = torch.compile(variant.function) if variant.compiled else variant.function
            used = leaves if BOTH in variant.directions else ()
            try:
                actual = results(variant, function, cast(self.inputs, DTYPE), used)
                compare(variant.name, actual, expected, self.operation.errors)
                self.ready[variant.name] = Ready(variant, function, self.inputs, leaves)
            except WrongResult as error:
                self.refused[variant.name] = error
            except Exception as error:  # of any kind: a library refuses the case, or we fail at it
                refusal = WrongResult if is_ours(variant.name) else CannotRun
                first_line = str(error).strip().partition("\n")[0][:120]
                reason = f"{type(error).__name__}: {first_line}"
                self.refused[variant.name] = refusal(variant.name, reason)
            if ON_GPU:
                torch.cuda.empty_cache()


def cast(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """A copy whose tensors of the benchmark's type have another; tables and indices stay."""

    def convert(value: object) -> object:
        if isinstance(value, Tensor) and value.dtype == DTYPE:
            return value.detach().to(dtype, copy=True)
        return [convert(item) for item in value] if isinstance(value, list) else value

    return Inputs(**{name: convert(value) for name, value in vars(inputs).items()})


def results(
    variant: Variant, function: Callable, inputs: Inputs, leaves: tuple[str, ...]
) -> dict[str, Tensor]:
    """Outputs, and gradients of the case's leaves, through the variant's layout."""
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


def compare(
    name: str,
    actual: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    errors: tuple[float, float],
) -> None:
    """Raises WrongResult where an output or gradient is further from the oracle than `errors`."""
    for what, result in actual.items():
        limit, oracle = errors[what.startswith("gradient")], expected[what].to(ORACLE_DTYPE)
        if result.shape != oracle.shape:
            shapes = f"{tuple(result.shape)}, not {tuple(oracle.shape)}"
            raise WrongResult(name, f"{what} has shape {shapes}")
        error = ((result.to(ORACLE_DTYPE) - oracle).norm() / oracle.norm()).item()
        if not error <= limit:  # refuses NaN, too
            raise WrongResult(name, f"{what} is off by {error:.2g} of its norm, above {limit:g}")


def as_tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def grad_like(output: Tensor) -> Tensor:
    """The same random gradient for every variant, whatever its type; 1 for a loss."""
    if output.ndim == 0:
        return torch.ones_like(output)
    generator = torch.Generator(output.device).manual_seed(1)
    grad = torch.randn(output.shape, generator=generator, device=output.device)
    return grad.to(DTYPE).to(output.dtype)


# ---- what is timed ----


class Ready:
    """A verified variant on its own copy of the layout."""

    def __init__(
        self, variant: Variant, function: Callable, inputs: Inputs, leaves: tuple[str, ...]
    ):
        self.variant, self.function = variant, function
        with torch.no_grad():
            self.inputs = Inputs(**vars(variant.layout.enter(Inputs(**vars(inputs)))))
        names = (variant.layout.leaves or leaves) if leaves else ()
        self.originals = {name: getattr(self.inputs, name).detach() for name in names}
        self.renew()

    def renew(self) -> None:
        """Fresh leaves: the backward pass of some libraries overwrites what it was given."""
        for name, original in self.originals.items():
            setattr(self.inputs, name, original.clone().requires_grad_())
        self.leaves = [getattr(self.inputs, name) for name in self.originals]

    @cached_property
    def grads(self) -> tuple[Tensor, ...]:
        """Those of the verification, in the variant's layout: 0 where it has padding."""
        outputs = [output.detach().requires_grad_() for output in as_tuple(self.without_grad())]
        plain = [self.variant.layout.exit(self.inputs, output) for output in outputs]
        return torch.autograd.grad(plain, outputs, [grad_like(x) for x in plain])

    def forward(self) -> Tensor | tuple[Tensor, ...]:
        with self.variant.context():
            return self.function(self.inputs)

    def without_grad(self) -> Tensor | tuple[Tensor, ...]:
        with torch.no_grad():
            return self.forward()

    def prepare(self) -> tuple:
        """The graph of a forward pass, and gradients of its outputs."""
        grads = self.prepare_grads()
        return as_tuple(self.forward()), grads

    def backward(self, prepared: tuple) -> object:
        outputs, grads = prepared
        with self.variant.context():
            return torch.autograd.grad(outputs, self.leaves, grads, allow_unused=True)

    def prepare_grads(self) -> tuple[Tensor, ...]:
        grads = tuple(grad.clone() for grad in self.grads)
        self.renew()
        return grads

    def both(self, grads: tuple[Tensor, ...]) -> object:
        return self.backward((as_tuple(self.forward()), grads))
