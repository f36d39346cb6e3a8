"""A run of pytest over a small benchmark: what pytest-benchmark's options and JSON make of it."""

import json

import pytest

from bench import session, timing

pytest_plugins = ["pytester"]

BENCHMARK = """
from bench import timing
from bench.comparison import Calls, CannotRun, WrongResult, each

SLEEP = timing.time.sleep


class Sleeping:
    benchmark, direction, rounds = "sleep", "forward", 3
    variants = ("mmalign", "slow", "wrong", "absent", "picky")

    def __init__(self, case):
        self.case, self.called = case, 0

    def missing(self, variant):
        return "absent is not installed" if variant == "absent" else None

    def calls(self, variants):
        assert "absent" not in variants
        if "wrong" in variants:
            raise WrongResult("wrong", "output 0 is off by 0.5")
        if "picky" in variants:
            raise CannotRun("picky", "head_dim 100 is not supported")
        return Calls({name: lambda name=name: self.sleep(name) for name in variants})

    def sleep(self, name):  # each round takes a second longer
        self.called += 1
        SLEEP(self.called if name == "slow" else 0.25)

    def figures(self, variant, seconds):
        info = {"samples_per_second": 2 / seconds, "flops": 10**8, "bound": "matmul"}
        return info | {"mfu": None}


test_sleep = each([Sleeping("64 x"), Sleeping("128 x")])
"""
PEAKS = {"copy_bytes_per_second": 1e9, "matmul_flops_per_second": 1e9, "matmul": "fp32"}


@pytest.fixture
def run(pytester, monkeypatch, fake_time):
    def profiled(clock, name, call) -> int:  # pytester's fresh modules break torch's profiler
        call()
        return 8000

    monkeypatch.setattr(timing, "peak_bytes", profiled)
    monkeypatch.setattr(session, "measured_peaks", lambda device: PEAKS)
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # pytest-benchmark looks at it
    pytester.makepyfile(bench_sleep=BENCHMARK)
    options = ("-p", "bench.conftest", "-o", "python_files=bench_*.py", "-p", "no:cacheprovider")
    return lambda *more: pytester.runpytest_inprocess(*options, *more)


def read(path) -> tuple[dict, dict[str, dict]]:
    """(the file, its entries of case "64 x" by variant)."""
    content = json.loads(path.read_text())
    rows = [row for row in content["benchmarks"] if row["params"]["case"] == "64 x"]
    return content, {row["name"]: row for row in rows}


def test_json_holds_what_was_measured(run, tmp_path):
    path = tmp_path / "b.json"
    run("--benchmark-json", str(path), "-k", "64").assert_outcomes(failed=1, deselected=1)
    content, rows = read(path)
    assert set(rows) == {"mmalign", "slow"}  # a wrong result has no entry
    # the profiled call and a warm-up round come first: slow is called 2nd, 4th; then 6th, 8th, 10th
    assert rows["slow"]["stats"]["data"] == [6, 8, 10]
    assert rows["mmalign"]["stats"]["data"] == [0.25] * 3
    stats = rows["slow"]["stats"]
    assert [stats[name] for name in ("min", "median", "max", "rounds")] == [6, 8, 10, 3]
    names = {"benchmark": "sleep", "case": "64 x", "direction": "forward"}
    assert rows["slow"]["params"] == names | {"variant": "slow"}
    assert rows["slow"]["group"] == "sleep | 64 x | forward"

    info = rows["mmalign"]["extra_info"]
    assert info["samples_per_second"] == 8
    assert info["share_of_peak"] == pytest.approx(1e8 / 0.25 / 1e9)
    assert info["over_best_peer"] == pytest.approx(8 / 0.25)
    assert "mfu" not in info and info["peak_memory_bytes"] == 8000
    assert "over_best_peer" not in rows["slow"]["extra_info"]

    assert content["measured_peaks"] == PEAKS
    assert "node" not in content["machine_info"] and content["machine_info"]["torch"]
    assert content["command"].startswith("pytest ") and "--benchmark-json" in content["command"]
    assert content["not_measured"] == {
        "absent": {"absent is not installed": ["sleep"]},
        "picky": {"head_dim 100 is not supported": ["sleep"]},
    }


def test_a_wrong_variant_fails_its_test_and_the_others_are_timed(run):
    result = run("--benchmark-group-by=param:case")
    result.assert_outcomes(failed=2)
    result.stdout.fnmatch_lines(["wrong: output 0 is off by 0.5"])
    result.stdout.fnmatch_lines(["*benchmark 'case=64 x': 2 tests*"])
    result.stdout.fnmatch_lines(["not measured: absent (sleep): absent is not installed"])


def test_two_runs_are_compared(run):
    run("--benchmark-save=before", "-k", "64", "--variants", "mmalign*")
    result = run(
        "--benchmark-compare", "-k", "64", "--variants=mmalign", "--benchmark-compare-fail=min:5%"
    )
    result.assert_outcomes(passed=1, deselected=1)
    result.stdout.fnmatch_lines(["mmalign (0001_before)*", "mmalign (NOW)*"])


def test_variants_select_and_benchmark_disable_only_verifies(run, pytester):
    result = run("--benchmark-disable", "--variants", "mmalign, slow", "-k", "128")
    result.assert_outcomes(passed=1, deselected=1)
    result.stdout.no_fnmatch_line("*Median*")
    run("--benchmark-disable", "--variants", "wrong", "-k", "128").assert_outcomes(
        failed=1, deselected=1
    )
    assert not list(pytester.path.glob("**/*.json"))
