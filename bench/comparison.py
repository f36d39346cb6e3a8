"""A comparison: several variants of the same work on the same data, one table of the results.

A benchmark file declares comparisons and one test over them, which `-k` selects from by their ids:

    test_swiglu = each(COMPARISONS)

The fixture `compare` (conftest.py) verifies every variant, times them interleaved, and gives
pytest-benchmark one entry per variant.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import pytest

FORWARD, BACKWARD, BOTH, STEP = "forward", "backward", "both", "step"
LOSS_ONLY, SCORE = "loss only", "score"  # forward passes without gradients
COPY, MATMUL = "copy", "matmul"  # which measured peak bounds the work


@dataclass(frozen=True)
class Calls:
    """What `timing.measure` takes: the calls, and what runs untimed before each of them."""

    calls: Mapping[str, Callable[..., object]]
    prepare: Mapping[str, Callable[[], object]] = field(default_factory=dict)


class Comparison:
    """What a benchmark file declares; a subclass has these attributes and methods."""

    benchmark: str  # rms_norm, train_step
    case: str  # shape and type, or model and stage
    direction: str  # forward, backward, both; step, score, load
    variants: Sequence[str]  # ours begin with "mmalign"
    rounds: int | None = None  # of whole programs; None: as many as --benchmark-max-time holds

    def missing(self, variant: str) -> str | None:
        """Why the variant cannot run on this machine; None where it can."""
        return None

    def calls(self, variants: Sequence[str]) -> Calls:
        """Makes the data once, verifies every variant, and returns what is timed.

        Raises WrongResult where a variant computes something else than the others, CannotRun
        where a library refuses; it is called again without that variant.
        """
        raise NotImplementedError

    def figures(self, variant: str, seconds: float) -> dict:
        """The entry's extra_info: bytes and flops of a call, the peak that bounds it, rates."""
        raise NotImplementedError


class WrongResult(AssertionError):
    """A variant's result is not the oracle's; its time would mean nothing."""

    def __init__(self, variant: str, message: str):
        super().__init__(f"{variant}: {message}")
        self.variant = variant


class CannotRun(Exception):
    """A library refuses this case, or memory does not suffice: the variant is left out."""

    def __init__(self, variant: str, reason: str):
        super().__init__(reason)
        self.variant = variant


def each(comparisons: Sequence[Comparison]) -> Callable:
    ids = [f"{c.benchmark}, {c.case}, {c.direction}" for c in comparisons]

    @pytest.mark.parametrize("comparison", comparisons, ids=ids)
    def test(comparison, compare):
        compare(comparison)

    return test


def is_ours(variant: str) -> bool:
    return variant.startswith("mmalign")


def share_of_peak(info: Mapping, seconds: float, peaks: Mapping) -> float | None:
    """Rate of an entry over the measured peak that bounds it, between 0 and about 1."""
    if info.get("bound") == COPY:
        return info["bytes"] / seconds / peaks["copy_bytes_per_second"]
    if info.get("bound") == MATMUL:
        return info["flops"] / seconds / peaks["matmul_flops_per_second"]
    return None


def speedup(ours: tuple[float, Mapping], theirs: tuple[float, Mapping]) -> float:
    """How many times faster ours is, each given as (seconds, extra_info).

    By samples per second where both have it, as their batches may differ in length.
    """
    key = "samples_per_second"
    if key in ours[1] and key in theirs[1]:
        return ours[1][key] / theirs[1][key]
    return theirs[0] / ours[0]


def over_best_peer(entries: Mapping[str, tuple[float, Mapping]]) -> dict[str, float]:
    """Of {variant: (seconds, extra_info)}: of each of ours, the speedup over the best peer."""
    peers = [entry for name, entry in entries.items() if not is_ours(name)]
    ours = {name: entry for name, entry in entries.items() if is_ours(name)}
    if not peers:
        return {}
    return {name: min(speedup(entry, peer) for peer in peers) for name, entry in ours.items()}
