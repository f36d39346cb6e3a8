"""`pytest bench/`: the fixture `compare`, and what pytest-benchmark's JSON says besides.

pytest-benchmark times one function after another; here the variants of a comparison are timed
interleaved (timing.py), and each gets an entry with its own samples. Its options then speak of
these: --benchmark-json, --benchmark-compare, --benchmark-group-by, --benchmark-min-rounds,
--benchmark-max-time (of a comparison), --benchmark-disable (verify, do not time).
"""

import os
import shlex
from collections.abc import Callable

import pytest

from bench.comparison import Comparison
from bench.measured_peaks import machine
from bench.session import Session
from mmalign.system import choose_device

SETTINGS = ("MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "MMALIGN_BENCH_DOCUMENTS")
SESSION = pytest.StashKey[Session]()


def pytest_addoption(parser):
    parser.addoption(
        "--variants",
        default="*",
        metavar="PATTERNS",
        help="time only these, e.g. 'mmalign*,torch eager*'; all are timed by default",
    )


def pytest_configure(config):
    choose_device("auto")  # on a CPU sets up malloc, which peers profit from as much
    option = config.option
    config.stash[SESSION] = Session(
        option.variants, float(option.benchmark_max_time), option.benchmark_min_rounds
    )
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
