"""A run of pytest over a small benchmark: rows, pytest-benchmark's groups, records, the table."""

import json

import pytest

from bench import ceilings

pytest_plugins = ["pytester"]

BENCHMARK = """
from bench import timing
from bench.comparison import Calls, CannotRun, Figures, WrongResult, each_row


class Sleeping:
    part, benchmark, case, direction = "kernels", "sleep", "64 x", "forward"
    variants = ("ours", "slow", "wrong", "absent", "picky")

    def missing(self, variant, device):
        return "absent is not installed" if variant == "absent" else None

    def calls(self, variants, device):
        assert "absent" not in variants
        if "wrong" in variants:
            raise WrongResult("wrong", "output 0 is off by 0.5")
        if "picky" in variants:
            raise CannotRun("picky", "head_dim 100 is not supported")
        seconds = {"ours": 0.25, "slow": 1.0}
        sleep = timing.time.sleep
        return Calls({name: lambda name=name: sleep(seconds[name]) for name in variants})

    def figures(self, variant, seconds, ceilings):
        return Figures(bytes=10**5, ceiling="copy", extra={"samples_per_second": 2 / seconds})

    def limits(self):
        return {"budget_seconds": 0.0, "min_rounds": 3}


@each_row([Sleeping()])
def test_sleep(row, compare):
    compare(row)
"""


@pytest.fixture
def run(pytester, monkeypatch, fake_time):
    monkeypatch.setattr(ceilings, "ceilings", lambda device: {"copy_bytes_per_second": 1e9})
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # pytest-benchmark looks at it
    pytester.makepyfile(bench_sleep=BENCHMARK)
    options = ("-p", "bench.conftest", "-o", "python_files=bench_*.py", "-p", "no:cacheprovider")
    return lambda *more: pytester.runpytest_inprocess(*options, *more)


def _records(folder) -> dict[str, dict]:
    [path] = folder.glob("*/kernels.json")
    content = json.loads(path.read_text())
    assert content["ceilings"] == {"copy_bytes_per_second": 1e9}
    return {record["variant"]: record for record in content["records"]}


def test_rows_become_groups_records_and_a_table(run, tmp_path):
    folder, saved = tmp_path / "results", tmp_path / "b.json"
    result = run("--record", str(folder), "--benchmark-json", str(saved))
    result.assert_outcomes(passed=2, skipped=2, failed=1)
    result.stdout.fnmatch_lines(["wrong: output 0 is off by 0.5"])
    result.stdout.fnmatch_lines(
        [
            "sleep, forward: 64 x",
            "*median*over ours*rate*share*",
            "  ours*250 ms*(3)*1*0.0 GB/s*0%",
            "  slow*1 s*(3)*4.00*0.0 GB/s*0%",
        ]
    )
    records = _records(folder)
    assert set(records) == {"ours", "slow", "absent", "picky"}  # a wrong result has no record
    assert records["absent"]["skipped"] == "absent is not installed"
    assert records["picky"]["skipped"] == "head_dim 100 is not supported"
    assert records["absent"]["seconds"] is None

    ours = records["ours"]
    assert (ours["benchmark"], ours["case"], ours["direction"]) == ("sleep", "64 x", "forward")
    assert [ours[name] for name in ("seconds", "fastest", "slowest", "repeats")] == [*[0.25] * 3, 3]
    assert ours["share"] == pytest.approx(1e5 / 0.25 / 1e9)
    assert ours["extra"] == {"samples_per_second": 8}

    rows = json.loads(saved.read_text())["benchmarks"]
    assert {row["group"] for row in rows} == {"sleep | 64 x | forward"}
    for row in rows:
        kept = records[row["name"]]
        assert row["stats"]["rounds"] == 3
        assert row["stats"]["median"] == pytest.approx(kept["seconds"])
        assert row["stats"]["max"] == pytest.approx(kept["slowest"])
        assert row["extra_info"]["share"] == kept["share"]


def test_only_selected_rows_are_measured_and_nothing_is_written_unasked(run, pytester):
    result = run("-k", "slow")
    result.assert_outcomes(passed=1, deselected=4)
    result.stdout.fnmatch_lines(["*over slow*"])
    assert not list(pytester.path.glob("**/*.json"))
