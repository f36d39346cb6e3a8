"""Fixtures of `pytest bench/`: where our measurements, pytest-benchmark and the records meet.

pytest-benchmark times one function after another by the wall clock, so it is not asked to time:
the rows of a comparison are measured in turn (bench/timing.py), and each row replays its rounds to
pytest-benchmark through a clock that stands still in between. Its tables, --benchmark-json and
--benchmark-compare then speak of our measurements.
"""

import os
import shlex
from pathlib import Path

import pytest
import torch

from bench.comparison import CannotRun, Comparison, Row, WrongResult, record, title
from bench.record import Record, write_part
from bench.table import tables
from bench.timing import Timing, measure

SETTINGS = ("MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "MMALIGN_BENCH_DOCUMENTS")
UNUSED_IS_FINE = pytest.mark.filterwarnings("ignore:Benchmark fixture was not used")  # a wrong row


class ReplayClock:
    """Time that passes only where a recorded round is replayed."""

    def __init__(self):
        self.seconds = 0.0

    def now(self) -> float:
        return self.seconds

    def replay(self, rounds: list[float]) -> None:
        self.seconds += rounds.pop(0)


class Measurements:
    """What this run has measured: the comparisons' timings, and a record of every row."""

    def __init__(self, device: torch.device):
        self.device = device
        self.timings: dict[str, dict[str, Timing]] = {}
        self.refused: dict[str, dict[str, Exception]] = {}
        self.broken: dict[str, Exception] = {}
        self.records: dict[str, list[Record]] = {}  # by part
        self._ceilings: dict | None = None

    @property
    def ceilings(self) -> dict:
        if self._ceilings is None:
            from bench.ceilings import ceilings

            self._ceilings = ceilings(self.device)
        return self._ceilings

    def of(self, comparison: Comparison, variants: list[str]) -> dict[str, Timing]:
        """Timings of these variants, measured once; `refused` says which it left out."""
        group = title(comparison)
        if group not in self.refused:
            self.refused[group] = {}
            try:
                self.timings[group] = self._measure(comparison, variants, self.refused[group])
            except Exception as error:
                self.broken[group] = error
        if group in self.broken:  # every row of the group fails alike
            raise self.broken[group]
        return self.timings[group]

    def _measure(
        self,
        comparison: Comparison,
        variants: list[str],
        refused: dict[str, WrongResult | CannotRun],
    ) -> dict[str, Timing]:
        self.ceilings  # noqa: B018  first: it needs memory that a comparison may fill
        while variants:
            try:
                work = comparison.calls(variants, self.device)
                limits = comparison.limits()
                return measure(work.calls, self.device, prepare=work.prepare, **limits)
            except (WrongResult, CannotRun) as error:
                refused[error.variant] = error
                variants = [variant for variant in variants if variant != error.variant]
        return {}

    def keep(self, row: Row, timing: Timing | None, skipped: str | None = None) -> Record:
        kept = record(row, timing, self._ceilings or {}, skipped)
        self.records.setdefault(row.comparison.part, []).append(kept)
        return kept

    def write(self, folder: Path, command: str) -> list[Path]:
        return [
            write_part(folder, part, records, self._ceilings or {}, command)
            for part, records in self.records.items()
        ]


MEASUREMENTS = pytest.StashKey[Measurements]()
CLOCK = pytest.StashKey[ReplayClock]()


def pytest_addoption(parser):
    parser.addoption(
        "--record",
        type=Path,
        metavar="DIR",
        help="write what was measured to DIR/<machine>/<part>.json; RESULTS.md is made of them",
    )


def pytest_configure(config):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config.stash[MEASUREMENTS] = Measurements(device)
    config.stash[CLOCK] = ReplayClock()
    if not any("--benchmark-columns" in str(given) for given in config.invocation_params.args):
        config.option.benchmark_columns = ["median", "min", "max", "rounds"]
        config.option.benchmark_sort = "median"


def pytest_collection_modifyitems(config, items):
    """The first case of every operation comes first: a run that is stopped has what counts."""
    items.sort(key=lambda item: getattr(getattr(_row(item), "comparison", None), "rank", 0))
    for item in items:
        row = _row(item)
        if row is not None:
            timer = config.stash[CLOCK].now
            item.add_marker(pytest.mark.benchmark(group=row.group, timer=timer))
            item.add_marker(UNUSED_IS_FINE)


def _row(item) -> Row | None:
    return getattr(item, "callspec", None) and item.callspec.params.get("row")


@pytest.fixture(scope="session")
def device(pytestconfig) -> torch.device:
    """The GPU where there is one."""
    return pytestconfig.stash[MEASUREMENTS].device


@pytest.fixture
def compare(request, benchmark, pytestconfig):
    """compare(row): measures the row's comparison at its first row, and reports this row."""
    return lambda row: _compare(row, request, benchmark, pytestconfig)


def _compare(row: Row, request, benchmark, config) -> None:
    measurements = config.stash[MEASUREMENTS]
    reason = row.comparison.missing(row.variant, measurements.device)
    if reason is not None:
        measurements.keep(row, None, reason)
        pytest.skip(reason)
    selected = [other for item in request.session.items if (other := _row(item)) is not None]
    variants = [
        other.variant
        for other in selected
        if other.group == row.group
        and other.comparison.missing(other.variant, measurements.device) is None
    ]
    timings = measurements.of(row.comparison, variants)
    refused = measurements.refused[row.group].get(row.variant)
    if isinstance(refused, WrongResult):
        pytest.fail(str(refused), pytrace=False)
    if refused is not None:
        measurements.keep(row, None, str(refused))
        pytest.skip(str(refused))
    kept = measurements.keep(row, timings[row.variant])
    _replay(timings[row.variant], kept, benchmark, config.stash[CLOCK])


def _replay(timing: Timing, kept: Record, benchmark, clock: ReplayClock) -> None:
    benchmark.name = kept.variant
    benchmark.extra_info.update(
        bytes=kept.bytes,
        flops=kept.flops,
        ceiling=kept.ceiling,
        share=kept.share,
        peak_memory_bytes=kept.peak_memory_bytes,
        **kept.extra,
    )
    rounds = list(timing.seconds)
    benchmark.pedantic(clock.replay, args=(rounds,), rounds=timing.repeats)


def pytest_terminal_summary(terminalreporter, config):
    measurements = config.stash[MEASUREMENTS]
    records = [kept for part in measurements.records.values() for kept in part]
    for line in tables(records):
        terminalreporter.write_line(line)
    folder = config.getoption("--record")
    if folder is not None:
        settings = [f"{name}={os.environ[name]}" for name in SETTINGS if name in os.environ]
        command = shlex.join([*settings, "pytest", *map(str, config.invocation_params.args)])
        for path in measurements.write(folder, command):
            terminalreporter.write_line(f"records: {path}")
