"""bench/gpu.py without a GPU: its dry run, and how it runs, ends and records parts."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import gpu, measured_peaks
from bench.gpu import Options, Run
from bench.gpu_parts import LIMITS, PYTEST, Part, parts
from bench.records import BROKEN, read_records

PYTHON = dict(os.environ, PYTHON=sys.executable)


def gpu_verify(*words: str) -> subprocess.CompletedProcess:
    command = ["bash", "scripts/gpu_verify.sh", *words]
    return subprocess.run(
        command, cwd=gpu.REPOSITORY, env=PYTHON, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("more", [False, True])
def test_a_dry_run_walks_through_all_parts_within_the_limit(more):
    done = gpu_verify("--dry-run", *(["--more"] if more else []))
    assert done.returncode == 0, done.stderr
    for part in parts(more, rehearsal=False):
        assert f"  {part.name}: about {part.expected:.0f} s" in done.stdout
    [(end, limit)] = re.findall(r"^ *(\d+) s  end, of (\d+) s$", done.stdout, re.M)
    assert int(end) <= int(limit) == LIMITS[more] <= (240 if more else 480) - 15
    items = re.findall(r"- (.+)", done.stdout)
    predicted = json.loads((gpu.REPOSITORY / "bench/predictions.json").read_text())["seconds"]
    unpredicted = [x for x in items if x not in predicted["h200"]]
    names, known = ({x.partition(",")[0] for x in found} for found in (items, predicted["h200"]))
    assert more or known <= names  # every operation, at the shapes of production
    assert all("recomputation" in x or x.startswith("shortcuts") for x in unpredicted)


def test_predictions_are_current():
    command = [sys.executable, "-m", "bench.predict", "--check"]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = f"{gpu.REPOSITORY}:{gpu.REPOSITORY}/kernels"
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_first_result_comes_early():
    first = next(part for part in parts(False, False) if not part.behind)
    assert first.name == "peaks" and first.most <= 60


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_without_a_gpu_it_says_what_can_be_done():
    done = gpu_verify("--part", "build")
    assert done.returncode == 1 and "--dry-run" in done.stderr


def test_it_names_every_package_that_is_absent(tmp_path, monkeypatch):
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')  # without site-packages
    bare.chmod(0o755)
    monkeypatch.setitem(PYTHON, "PYTHON", str(bare))
    done = gpu_verify("--dry-run")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "has no torch triton" in done.stderr and "--wheels DIR" in done.stderr


# ---- running parts ----


def script(text: str) -> tuple[str, ...]:
    return ("-c", text)


def run(folder: Path, *chosen: Part) -> list[dict]:
    (folder / "verification.jsonl").touch()
    Run(Options(limit=60), folder).all(chosen)
    return read_records(folder / "verification.jsonl")


def statuses(records: list[dict]) -> dict[str, str]:
    return {x["what"]: x["status"] for x in records if x["kind"] == "part"}


def test_a_failure_does_not_stop_the_others(tmp_path):
    failing = Part(
        "failing", 1, 20, script("print('FAILED tests/x.py::test_y'); raise SystemExit(2)")
    )
    absent = Part("sanitizer", 1, 20, ("compute-sanitizer", "--version"))
    passing = Part("passing", 1, 20, script("print('3 passed'); print('-- Docs: there')"))
    records = run(tmp_path, failing, absent, passing)
    assert statuses(records) == {"failing": "failed", "sanitizer": "failed", "passing": "done"}
    reasons = [x["reason"] for x in records if x["kind"] == "failed"]
    assert "FAILED tests/x.py::test_y" in reasons and any("compute-sanitizer" in x for x in reasons)
    [done] = [x for x in records if x["kind"] == "part" and x["what"] == "passing"]
    assert done["note"] == "3 passed"


def test_the_last_line_of_the_tests_counts_them(tmp_path):
    none_of_them = (*PYTEST, "tests/test_files.py", "-k", "no_such_name")
    run(tmp_path, Part("tests", 1, 60, none_of_them))
    assert " deselected in " in (tmp_path / "tests.log").read_text().splitlines()[-1]


def test_a_part_that_takes_too_long_is_ended_with_what_it_started(tmp_path):
    child = "import subprocess as s; s.run(['sleep', '60'])"
    begin = time.monotonic()
    records = run(tmp_path, Part("slow", 1, 0.5, script(child)), Part("next", 1, 20, script("")))
    assert statuses(records) == {"slow": "cut short", "next": "done"}
    assert time.monotonic() - begin < 20


def test_a_part_that_would_exceed_the_limit_is_skipped_with_a_sentence(tmp_path):
    records = run(tmp_path, Part("long", 90, 99, script("")), Part("short", 1, 20, script("")))
    assert statuses(records) == {"long": "skipped", "short": "done"}
    assert records[0]["note"] == "takes about 90 s, 60 of 60 are left"


def test_a_part_behind_others_ends_before_what_needs_it(tmp_path):
    behind = Part("build", 1, 20, script("import time; time.sleep(1)"), behind=True)
    beside = Part("peaks", 1, 20, script(""))
    after = Part("kernels", 1, 20, script(""), needs=("build",))
    order = [x["what"] for x in run(tmp_path, behind, beside, after)]
    assert order == ["peaks", "build", "kernels"]


WORK = """
import os, sys, time
from pathlib import Path
from bench.records import BROKEN, Records, read_records
path = Path(sys.argv[1])
begun = [x["what"] for x in read_records(path) if x["kind"] == "begin"]
records = Records(path, "kernels")
if "{how}" not in begun:
    records.write("begin", what="{how}")
    if "{how}" == "stalls":
        time.sleep(60)
    os._exit({code})
records.write("end", what="{how}")
"""


@pytest.mark.parametrize(("how", "code"), [("breaks", BROKEN), ("crashes", 139), ("stalls", 0)])
def test_measuring_goes_on_after_a_kernel_breaks_its_process(tmp_path, monkeypatch, how, code):
    path = tmp_path / "verification.jsonl"
    command = [sys.executable, "-c", WORK.format(how=how, code=code), str(path)]
    monkeypatch.setattr(Run, "_command", lambda self, part: command)
    monkeypatch.setattr(gpu, "STALLED", 3)
    records = run(tmp_path, Part("kernels", 1, 30))
    assert statuses(records) == {"kernels": "done"}
    assert [x["kind"] for x in records] == ["begin", "end", "part"]


def test_a_part_that_raises_is_not_started_again(tmp_path, monkeypatch):
    counter = tmp_path / "starts"
    text = f"open({str(counter)!r}, 'a').write('x'); raise ValueError"
    monkeypatch.setattr(Run, "_command", lambda self, part: [sys.executable, "-c", text])
    assert statuses(run(tmp_path, Part("kernels", 1, 30))) == {"kernels": "failed"}
    assert counter.read_text() == "x"


# ---- the whole command ----

WHOLE = """
import sys
from bench import gpu, gpu_parts
parts = [
    gpu_parts.Part("first", 1, 20, ("-c", "print('1 passed')")),
    gpu_parts.Part("second", 1, 60, ("-c", {second!r})),
]
gpu.parts = lambda more, rehearsal: parts
sys.argv = ["gpu_verify.sh", "--cpu-rehearsal", "--results", {results!r}]
gpu.main()
"""


def start(results: Path, second: str) -> subprocess.Popen:
    command = [sys.executable, "-c", WHOLE.format(second=second, results=str(results))]
    environment = dict(PYTHON, PYTHONPATH=f"{gpu.REPOSITORY}:{gpu.REPOSITORY}/kernels")
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def in_file(results: Path) -> dict[str, str]:
    return statuses(read_records(results / measured_peaks.machine()["name"] / "verification.jsonl"))


@pytest.mark.parametrize(
    ("second", "code"), [("", 0), ("raise SystemExit(1)", 1), ("import time; time.sleep(60)", 3)]
)
def test_exit_code_and_verdict(tmp_path, second, code):
    process = start(tmp_path, second)
    if code == 3:  # stopped, once the first part has ended
        while in_file(tmp_path) == {}:
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == code
    assert "| first | done |" in output
    folder = tmp_path / measured_peaks.machine()["name"]
    assert "| first | done |" in (folder / "verdict.md").read_text()


def test_what_was_measured_survives_a_kill(tmp_path):
    process = start(tmp_path, "import time; time.sleep(8)")
    while in_file(tmp_path) == {}:
        time.sleep(0.1)
    process.kill()
    process.wait()
    assert in_file(tmp_path) == {"first": "done"}


def test_measured_peaks_of_a_cpu():
    found = measured_peaks.measured_peaks(torch.device("cpu"))
    assert found["copy_bytes_per_second"] > 0 and found["matmul_flops_per_second"] > 0
    assert found["matmul"].startswith("fp32 2048x2048x2048")
