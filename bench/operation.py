"""Comparisons of one operation: its cases, its variants, and the oracle that all must meet.

A variant is checked once for each case, before anything is timed: outputs and gradients against
the same formula in PyTorch, in fp32 where the variants run in bf16 and in fp64 where they run in
fp32, on the same random data.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
from mmalign_kernels.costs import Cost
from torch import Tensor

from bench.comparison import Calls, CannotRun, Figures, WrongResult
from bench.oracle import ERRORS, WIDE, as_tuple, cast, compare, output_grads, results
from bench.variants import ALL, BACKWARD, BOTH, DEVICE, DTYPE, FORWARD, Variant

COPY, MATRIX = "copy", "matrix"  # which ceiling bounds an operation

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
        if "torch._dynamo" in sys.modules:  # past a limit of recompilations it would run eagerly
            torch._dynamo.reset()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _check(self, variants: Sequence[Variant]) -> None:
        leaves = self.case.leaves
        wide = cast(self.inputs, WIDE)
        expected = results(self.operation.oracle, self.operation.oracle.function, wide, leaves)
        del wide
        for variant in variants:
            function = torch.compile(variant.function) if variant.compiled else variant.function
            used = leaves if BOTH in variant.directions else ()
            try:
                actual = results(variant, function, cast(self.inputs, DTYPE), used)
                compare(variant.name, actual, expected, self.operation.errors or ERRORS[DTYPE])
                self.ready[variant.name] = Ready(variant, function, self.inputs, leaves)
            except WrongResult as error:
                self.refused[variant.name] = error
            except Exception as error:  # of any kind: a library refuses the case, or we fail at it
                refusal = WrongResult if variant.name.startswith("mmalign") else CannotRun
                self.refused[variant.name] = refusal(variant.name, _in_short(error))
            torch.cuda.empty_cache()

    def _check(self, variants: Sequence[Variant]) -> None:
        leaves = self.case.leaves
        wide = cast(self.inputs, WIDE)
        expected = results(self.operation.oracle, self.operation.oracle.function, wide, leaves)
        del wide
        for variant in variants:
            function = torch.compile(variant.function) if variant.compiled else variant.function
            used = leaves if BOTH in variant.directions else ()
            try:
                actual = results(variant, function, cast(self.inputs, DTYPE), used)
                compare(variant.name, actual, expected, self.operation.errors or ERRORS[DTYPE])
                self.ready[variant.name] = Ready(variant, function, self.inputs, leaves)
            except WrongResult as error:
                self.refused[variant.name] = error
            except Exception as error:  # whatever a library raises where it does not support a case
                said = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:120]}"
                ours = variant.name.startswith("mmalign")
                self.refused[variant.name] = (WrongResult if ours else CannotRun)(
                    variant.name, said
                )
            torch.cuda.empty_cache()


def _in_short(error: Exception) -> str:
    first_line = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first_line[:120]}"


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
        outputs = as_tuple(self.forward())
        if self.grads is None:
            self.grads = output_grads(self.variant, self.inputs, outputs)
        return outputs, tuple(grad.clone() for grad in self.grads)

    def backward(self, prepared: tuple) -> object:
        outputs, grads = prepared
        with self.variant.context():
            return torch.autograd.grad(outputs, self.leaves, grads, allow_unused=True)

    def both(self, grads: tuple[Tensor, ...]) -> object:
        return self.backward((as_tuple(self.forward()), grads))

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
