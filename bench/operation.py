"""Comparisons of one operation: its cases, its variants, and the oracle that all must meet.

A variant is checked once for each case, before anything is timed: outputs and gradients against
the same formula in PyTorch, in fp32 where the variants run in bf16 and in fp64 where they run in
fp32, on the same random data.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
from mmalign_kernels.costs import Cost
from torch import Tensor

from bench.comparison import Calls, CannotRun, Figures, WrongResult
from bench.variants import ALL, BACKWARD, BOTH, DEVICE, DTYPE, FORWARD, Variant

WIDE = {torch.bfloat16: torch.float32, torch.float32: torch.float64}[DTYPE]
COPY, MATRIX = "copy", "matrix"  # which ceiling bounds an operation

# ||result - oracle|| / ||oracle|| of outputs, and of gradients: a few roundings of each type
ERRORS = {torch.bfloat16: (1e-2, 2e-2), torch.float32: (1e-4, 1e-4)}

GPU_LIMITS = {"budget_seconds": 0.5, "min_rounds": 10, "max_rounds": 100}
CPU_LIMITS = {"budget_seconds": 0.4, "min_rounds": 5, "max_rounds": 50}


@dataclass(frozen=True)
class Case:
    """One shape. `make(device, dtype)` draws the inputs; costs by direction are of one call."""

    name: str
    make: Callable[[torch.device, torch.dtype], SimpleNamespace]
    leaves: tuple[str, ...]
    costs: Mapping[str, Cost]


def costs_of(forward: Cost, backward: Cost) -> dict[str, Cost]:
    return {FORWARD: forward, BACKWARD: backward, BOTH: forward + backward}


@dataclass(frozen=True, eq=False)
class Operation:
    name: str
    variants: Sequence[Variant]
    oracle: Variant
    bound: str  # COPY or MATRIX
    directions: tuple[str, ...] = ALL
    errors: tuple[float, float] | None = None  # of outputs and gradients; None: those of the type

    def comparisons(self, cases: Sequence[Case]) -> list["OperationComparison"]:
        """Every case in every direction; what the directions share is made once."""
        shared = [Shared(self, case) for case in cases]
        return [
            OperationComparison(one, direction, rank)
            for rank, one in enumerate(shared)
            for direction in self.directions
        ]


class Shared:
    """A case's data and checked variants, held until another case is loaded."""

    held: "Shared | None" = None

    def __init__(self, operation: Operation, case: Case):
        self.operation, self.case = operation, case
        self.inputs: SimpleNamespace | None = None
        self.ready: dict[str, Ready] = {}
        self.refused: dict[str, Exception] = {}

    def load(self, variants: Sequence[Variant], device: torch.device) -> dict[str, "Ready"]:
        """Raises WrongResult or CannotRun for the first variant that fails its check."""
        if Shared.held is not self:
            Shared.drop()
            Shared.held = self
            torch.manual_seed(0)
            self.inputs = self.case.make(device, DTYPE)
        fresh = [v for v in variants if v.name not in self.ready and v.name not in self.refused]
        if fresh:
            self._check(fresh)
        for variant in variants:
            if variant.name in self.refused:
                raise self.refused[variant.name]
        return {variant.name: self.ready[variant.name] for variant in variants}

    @classmethod
    def drop(cls) -> None:
        """Frees the case that is held, and forgets what was compiled for it."""
        if cls.held is not None:
            cls.held.inputs, cls.held.ready = None, {}
        cls.held = None
        torch._dynamo.reset()  # past a limit of recompilations it would fall back to eager
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _check(self, variants: Sequence[Variant]) -> None:
        leaves = self.case.leaves
        wide = _cast(self.inputs, WIDE)
        expected = _results(self.operation.oracle, self.operation.oracle.function, wide, leaves)
        del wide
        for variant in variants:
            function = torch.compile(variant.function) if variant.compiled else variant.function
            used = leaves if BOTH in variant.directions else ()
            try:
                actual = _results(variant, function, _cast(self.inputs, DTYPE), used)
                _compare(variant.name, actual, expected, self.operation.errors or ERRORS[DTYPE])
                self.ready[variant.name] = Ready(variant, function, self.inputs, leaves)
            except WrongResult as error:
                self.refused[variant.name] = error
            except Exception as error:  # whatever a library raises where it does not support a case
                if variant.name.startswith("mmalign"):
                    raise
                reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:120]}"
                self.refused[variant.name] = CannotRun(variant.name, reason)
            torch.cuda.empty_cache()


class Ready:
    """A checked variant on its own copy of the layout, ready to be timed."""

    def __init__(
        self,
        variant: Variant,
        function: Callable,
        inputs: SimpleNamespace,
        leaves: tuple[str, ...],
    ):
        self.variant, self.function = variant, function
        with torch.no_grad():
            entered = variant.layout.enter(SimpleNamespace(**vars(inputs)))
        self.inputs = SimpleNamespace(**vars(entered))
        names = (variant.layout.leaves or leaves) if leaves else ()
        self.originals = {name: getattr(self.inputs, name).detach() for name in names}
        self.grads: tuple[Tensor, ...] | None = None
        self.renew()

    def renew(self) -> None:
        """Fresh leaves: the backward pass of some libraries overwrites what it was given."""
        for name, original in self.originals.items():
            setattr(self.inputs, name, original.clone().requires_grad_())
        self.leaves = [getattr(self.inputs, name) for name in self.originals]

    def forward(self) -> object:
        with self.variant.context():
            return self.function(self.inputs)

    def without_grad(self) -> object:
        with torch.no_grad():
            return self.forward()

    def prepare(self) -> tuple:
        """The graph of a forward pass, and gradients of its outputs."""
        self.renew()
        outputs = _tuple(self.forward())
        if self.grads is None:
            self.grads = _output_grads(self.variant, self.inputs, outputs)
        return outputs, tuple(grad.clone() for grad in self.grads)

    def backward(self, prepared: tuple) -> object:
        outputs, grads = prepared
        with self.variant.context():
            return torch.autograd.grad(outputs, self.leaves, grads, allow_unused=True)

    def both(self, grads: tuple[Tensor, ...]) -> object:
        return self.backward((_tuple(self.forward()), grads))

    def prepare_grads(self) -> tuple[Tensor, ...]:
        if self.grads is None:
            self.prepare()
        self.renew()
        return tuple(grad.clone() for grad in self.grads)


@dataclass(frozen=True, eq=False)
class OperationComparison:
    shared: Shared
    direction: str
    rank: int  # of the case in its operation
    part: str = field(default="kernels", init=False)

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

    def missing(self, variant: str, device: torch.device) -> str | None:
        return self._variant(variant).missing(device)

    def calls(self, variants: Sequence[str], device: torch.device) -> Calls:
        ready = self.shared.load([self._variant(name) for name in variants], device)
        if self.direction == BACKWARD:
            calls = {name: one.backward for name, one in ready.items()}
            return Calls(calls, {name: one.prepare for name, one in ready.items()})
        if self.direction == BOTH:
            calls = {name: one.both for name, one in ready.items()}
            return Calls(calls, {name: one.prepare_grads for name, one in ready.items()})
        if self.direction == FORWARD:
            return Calls({name: one.forward for name, one in ready.items()})
        return Calls({name: one.without_grad for name, one in ready.items()})

    def figures(self, variant: str, seconds: float, ceilings: Mapping) -> Figures:
        cost = self.shared.case.costs[self.direction]
        if not self._variant(variant).comparable:
            return Figures()
        if self.operation.bound == COPY:  # small shapes stay in a CPU's cache: no share
            return Figures(cost.bytes, cost.flops, COPY, bounded=DEVICE.type == "cuda")
        return Figures(cost.bytes, cost.flops, ceilings["matrix_reference"])

    def limits(self) -> Mapping[str, float | int]:
        return GPU_LIMITS if DEVICE.type == "cuda" else CPU_LIMITS


def _tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def _cast(inputs: SimpleNamespace, dtype: torch.dtype) -> SimpleNamespace:
    """A copy whose tensors of the benchmark's type have another; tables and indices stay."""

    def convert(value: object) -> object:
        if isinstance(value, Tensor) and value.dtype == DTYPE:
            return value.detach().to(dtype, copy=True)
        return [convert(item) for item in value] if isinstance(value, list) else value

    return SimpleNamespace(**{name: convert(value) for name, value in vars(inputs).items()})


def _results(
    variant: Variant, function: Callable, inputs: SimpleNamespace, leaves: tuple[str, ...]
) -> dict[str, Tensor]:
    """Outputs, and gradients by the leaves of the case, through the variant's layout."""
    for name in leaves:
        getattr(inputs, name).requires_grad_()
    with torch.set_grad_enabled(bool(leaves)), variant.context():
        entered = variant.layout.enter(inputs)
        outputs = _tuple(function(entered))
        outputs = [variant.layout.exit(entered, output) for output in outputs]
        results = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
        if leaves:
            sources = [getattr(inputs, name) for name in leaves]
            grads = torch.autograd.grad(outputs, sources, [_grad_like(o) for o in outputs])
            results |= {f"gradient of {n}": g for n, g in zip(leaves, grads, strict=True)}
    return results


def _grad_like(output: Tensor) -> Tensor:
    """The same random gradient for every variant, whatever its type; 1 for a loss."""
    if output.ndim == 0:
        return torch.ones_like(output)
    generator = torch.Generator(output.device).manual_seed(1)
    grad = torch.randn(output.shape, generator=generator, device=output.device)
    return grad.to(DTYPE).to(output.dtype)


def _output_grads(
    variant: Variant, inputs: SimpleNamespace, outputs: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """The gradients that the check takes, in the variant's layout: zero where it has padding."""
    grads = []
    for output in outputs:
        inner = output.detach().requires_grad_()
        plain = variant.layout.exit(inputs, inner)
        grads.append(torch.autograd.grad(plain, inner, _grad_like(plain))[0])
    return tuple(grads)


def _compare(
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
