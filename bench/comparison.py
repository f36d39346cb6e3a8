"""One group of a benchmark table: several variants of the same work on the same data.

A benchmark file declares comparisons and one test that runs a row of them:

    @each_row(COMPARISONS)
    def test_swiglu(row, compare):
        compare(row)

The first row of a comparison that runs measures all its selected rows in turn (conftest.py).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import pytest
import torch

from bench.record import Record
from bench.timing import Timing


@dataclass(frozen=True)
class Calls:
    """What `timing.measure` takes: the calls, and what runs untimed before each of them."""

    calls: Mapping[str, Callable[..., object]]
    prepare: Mapping[str, Callable[[], object]] = field(default_factory=dict)


@dataclass(frozen=True)
class Figures:
    """What a record says beside the time. `ceiling` is "copy" or a key of the matrix rates."""

    bytes: int | None = None
    flops: int | None = None
    ceiling: str | None = None
    bounded: bool = True  # whether a share of the ceiling says anything
    extra: Mapping[str, float | int | str] = field(default_factory=dict)


class Comparison(Protocol):
    """A group. The first variant that runs is the one that ratios are taken over."""

    part: str  # file of the records: kernels, train, evaluate
    benchmark: str  # rms_norm, train_step
    case: str  # shape and type, or model and stage
    direction: str  # forward, backward, both; step, score, load
    variants: Sequence[str]

    def missing(self, variant: str, device: torch.device) -> str | None:
        """Why the variant cannot run here; None where it can."""

    def calls(self, variants: Sequence[str], device: torch.device) -> Calls:
        """Makes the data once, checks every variant's results, and returns what is timed.

        Raises WrongResult where a variant computes something else than the others, CannotRun
        where a library refuses; it is called again without that variant.
        """

    def figures(self, variant: str, seconds: float, ceilings: Mapping) -> Figures:
        """Of one call of the variant. `ceilings` is what bench.ceilings measured."""

    def limits(self) -> Mapping[str, float | int]:
        """Arguments of timing.measure: budget_seconds, min_rounds, max_rounds."""


class WrongResult(AssertionError):
    """A variant's result is not the oracle's; timing it would mean nothing."""

    def __init__(self, variant: str, message: str):
        super().__init__(f"{variant}: {message}")
        self.variant = variant


class CannotRun(Exception):
    """A library refuses this case, or memory does not suffice: its row is skipped."""

    def __init__(self, variant: str, reason: str):
        super().__init__(reason)
        self.variant = variant


@dataclass(frozen=True)
class Row:
    comparison: Comparison
    variant: str

    @property
    def group(self) -> str:
        return title(self.comparison)


def title(comparison: Comparison) -> str:
    return f"{comparison.benchmark} | {comparison.case} | {comparison.direction}"


def each_row(comparisons: Sequence[Comparison]) -> pytest.MarkDecorator:
    """Parametrizes a test with every row, grouped by comparison; `-k` picks by these ids."""
    rows = [
        Row(comparison, variant) for comparison in comparisons for variant in comparison.variants
    ]
    ids = [f"{row.comparison.case}, {row.comparison.direction}, {row.variant}" for row in rows]
    return pytest.mark.parametrize("row", rows, ids=ids)


def record(row: Row, timing: Timing | None, ceilings: Mapping, skipped: str | None) -> Record:
    """The row as bench/record.py keeps it; without a timing the reason in its place."""
    comparison = row.comparison
    names = (comparison.benchmark, comparison.case, comparison.direction, row.variant)
    if timing is None:
        return Record(*names, None, skipped=skipped)
    figures = comparison.figures(row.variant, timing.median, ceilings)
    return Record(
        *names,
        timing.median,
        fastest=timing.fastest,
        slowest=timing.slowest,
        repeats=timing.repeats,
        bytes=figures.bytes,
        flops=figures.flops,
        ceiling=figures.ceiling,
        share=share(figures, timing.median, ceilings),
        peak_memory_bytes=timing.peak_memory_bytes,
        extra=dict(figures.extra),
    )


def share(figures: Figures, seconds: float, ceilings: Mapping) -> float | None:
    """Of the ceiling that the figures name, between 0 and about 1."""
    if figures.ceiling is None or not figures.bounded:
        return None
    if figures.ceiling == "copy":
        return figures.bytes / seconds / ceilings["copy_bytes_per_second"]
    return figures.flops / seconds / ceilings["matrix_flops_per_second"][figures.ceiling]
