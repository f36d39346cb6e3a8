"""`pytest bench/`: the fixture `compare`, and what pytest-benchmark's JSON says besides.

pytest-benchmark times one function after another; here the variants of a comparison are timed
interleaved (timing.py), and each gets an entry with its own samples. Its options then speak of
these: --benchmark-json, --benchmark-compare, --benchmark-group-by, --benchmark-min-rounds,
--benchmark-max-time (of a comparison), --benchmark-disable (verify, do not time).
"""

import gc
import os
import shlex
from collections.abc import Callable
from fnmatch import fnmatchcase

import pytest
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
from bench.measured_peaks import GpuMonitor, machine, measured_peaks
from bench.timing import MAX_ROUNDS, Timing, measure

SETTINGS = ("MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "MMALIGN_BENCH_DOCUMENTS")


class Session:
    """What a run shares: measured peaks, and why variants were left out."""

    def __init__(self, config: pytest.Config):
        self.options = config.option
        self.patterns = config.option.variants.split(",")
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
            max_seconds=float(self.options.benchmark_max_time),
            min_rounds=rounds or self.options.benchmark_min_rounds,
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


SESSION = pytest.StashKey[Session]()


def pytest_addoption(parser):
    parser.addoption(
        "--variants",
        default="*",
        metavar="PATTERNS",
        help="time only these, e.g. 'mmalign*,torch eager*'; all are timed by default",
    )


def pytest_configure(config):
    config.stash[SESSION] = Session(config)
    defaults = {"columns": ["median", "min", "max", "rounds"], "sort": "median"}
    for name, value in defaults.items():
        if not any(str(x).startswith(f"--benchmark-{name}") for x in config.invocation_params.args):
            setattr(config.option, f"benchmark_{name}", value)


@pytest.fixture
def compare(benchmark, pytestconfig) -> Callable[[Comparison], None]:
    """compare(comparison): verifies and times its variants; fails where one is wrong."""
    return lambda comparison: _compare(comparison, benchmark, pytestconfig.stash[SESSION])


def _compare(comparison: Comparison, benchmark, session: Session) -> None:
    timings, wrong = session.measure(comparison, timed=benchmark.enabled)
    test, infos = benchmark.fullname, session.extra_info(comparison, timings)
    benchmark._mode = "interleaved"  # or pytest-benchmark warns that nothing was timed
    for variant, timing in timings.items():
        names = ("benchmark", "case", "direction")
        benchmark.params = {n: getattr(comparison, n) for n in names} | {"variant": variant}
        benchmark.group = " | ".join(getattr(comparison, n) for n in names)
        benchmark.name, benchmark.fullname = variant, f"{test}[{variant}]"
        benchmark.extra_info = infos[variant]
        entry = benchmark._make_stats(iterations=1)
        for seconds in timing.seconds:
            entry.update(seconds)
    if wrong:
        pytest.fail("\n".join(wrong), pytrace=False)
    if benchmark.enabled and not timings:
        pytest.skip("no variant can run here")


# ---- what the JSON says besides ----


def pytest_benchmark_update_machine_info(machine_info):
    machine_info.clear()  # it names the host
    machine_info.update(machine())


def pytest_benchmark_update_commit_info(commit_info):
    for name in commit_info.keys() - {"id", "time", "dirty"}:
        del commit_info[name]


def pytest_benchmark_update_json(config, output_json):
    session = config.stash[SESSION]
    settings = [f"{name}={os.environ[name]}" for name in SETTINGS if name in os.environ]
    arguments = [str(x) for x in config.invocation_params.args]
    output_json["command"] = shlex.join([*settings, "pytest", *arguments])
    output_json["measured_peaks"] = session.peaks
    output_json["gpu"] = session.monitor.stop()
    output_json["not_measured"] = session.not_measured


def pytest_terminal_summary(terminalreporter, config):
    for variant, reasons in config.stash[SESSION].not_measured.items():
        for reason, benchmarks in reasons.items():
            terminalreporter.write_line(
                f"not measured: {variant} ({', '.join(benchmarks)}): {reason}"
            )


def pytest_unconfigure(config):
    config.stash[SESSION].monitor.stop()
