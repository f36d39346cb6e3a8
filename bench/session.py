"""Measures comparisons: which variants run here, their timings, and what is said beside them.

`pytest bench/` (conftest.py) and bench/gpu_work.py both measure through it.
"""

import gc
from fnmatch import fnmatchcase

import torch

from bench import shapes
from bench.comparison import (
    COPY,
    Calls,
    CannotRun,
    Comparison,
    WrongResult,
    over_best_peer,
    share_of_peak,
)
from bench.measured_peaks import GpuMonitor, measured_peaks
from bench.timing import MAX_ROUNDS, Timing, measure


class Session:
    """What a run shares: measured peaks, and why variants were left out."""

    def __init__(self, variants: str = "*", max_seconds: float = 1.0, min_rounds: int = 5):
        """variants: patterns of their names, separated by commas; max_seconds: of a comparison."""
        self.patterns = variants.split(",")
        self.max_seconds, self.min_rounds = max_seconds, min_rounds
        self.not_measured: dict[str, dict[str, list[str]]] = {}  # variant: reason: benchmarks
        self.peaks: dict = {}
        self.monitor = GpuMonitor()

    def measure(self, comparison: Comparison, timed: bool) -> tuple[dict[str, Timing], list[str]]:
        """Timings by variant, and the messages of variants whose results are wrong."""
        if timed and not self.peaks:  # first: it needs memory that a comparison may fill
            self.peaks = measured_peaks(shapes.DEVICE)
        variants, wrong = self._runnable(comparison), []
        while variants:
            try:
                calls = comparison.calls(variants)
                return (self._time(comparison, calls) if timed else {}), wrong
            except CannotRun as error:
                self.leave_out(comparison, error.variant, str(error))
                variants.remove(error.variant)
            except WrongResult as error:
                wrong.append(str(error))
                variants.remove(error.variant)
            gc.collect()
            if shapes.ON_GPU:
                torch.cuda.empty_cache()
        return {}, wrong

    def _runnable(self, comparison: Comparison) -> list[str]:
        runnable = []
        for variant in comparison.variants:
            if not any(fnmatchcase(variant, pattern.strip()) for pattern in self.patterns):
                continue
            reason = comparison.missing(variant)
            if reason is None:
                runnable.append(variant)
            else:
                self.leave_out(comparison, variant, reason)
        return runnable

    def _time(self, comparison: Comparison, calls: Calls) -> dict[str, Timing]:
        rounds = comparison.rounds
        return measure(
            calls.calls,
            shapes.DEVICE,
            prepare=calls.prepare,
            max_seconds=self.max_seconds,
            min_rounds=rounds or self.min_rounds,
            max_rounds=rounds or MAX_ROUNDS,
            cpu_memory=rounds is not None,
        )

    def leave_out(self, comparison: Comparison, variant: str, reason: str) -> None:
        benchmarks = self.not_measured.setdefault(variant, {}).setdefault(reason, [])
        if comparison.benchmark not in benchmarks:
            benchmarks.append(comparison.benchmark)

    def extra_info(self, comparison: Comparison, timings: dict[str, Timing]) -> dict[str, dict]:
        """By variant: memory, the comparison's figures, share of the peak, ratio to the peers."""
        found = {}
        for variant, timing in timings.items():
            info = {**timing.memory, **comparison.figures(variant, timing.median)}
            # the small tensors of a CPU's benchmarks stay in its cache
            if info.get("bound") != COPY or shapes.ON_GPU:
                info["share_of_peak"] = share_of_peak(info, timing.median, self.peaks)
            found[variant] = {key: value for key, value in info.items() if value is not None}
        ratios = over_best_peer({name: (timings[name].median, found[name]) for name in timings})
        for variant, ratio in ratios.items():
            found[variant]["over_best_peer"] = ratio
        return found
