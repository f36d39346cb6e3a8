"""bench/gpu.py without a GPU: its commands, and what it records of them."""

import json
import os
import subprocess
import sys

import pytest
import torch

from bench import gpu, measured_peaks
from bench.gpu import Options


def gpu_verify(*words: str) -> subprocess.CompletedProcess:
    command, env = (
        ["bash", "scripts/gpu_verify.sh", *words],
        dict(os.environ, PYTHON=sys.executable),
    )
    return subprocess.run(
        command, cwd=gpu.REPOSITORY, env=env, capture_output=True, text=True, check=False
    )


def test_a_dry_run_shows_every_benchmark_once():
    done = gpu_verify("--dry-run")
    assert done.returncode == 0, done.stderr
    for path in (gpu.REPOSITORY / "bench").glob("bench_*.py"):
        assert done.stdout.count(f"bench/{path.name} ") == 1
    assert "-m gpu" in done.stdout and "compute-sanitizer" in done.stdout


def test_a_part_is_selected():
    done = gpu_verify("--dry-run", "--part", "build")
    first, *_ = done.stdout.splitlines()
    assert first.startswith("==== build: ") and first.endswith("setup.py build_ext --inplace")
    assert "bench/" not in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_without_a_gpu_it_says_what_can_be_done():
    done = gpu_verify("--part", "build")
    assert done.returncode == 1 and "--dry-run" in done.stderr


def test_every_command_is_recorded_when_it_ends(tmp_path, monkeypatch):
    path = tmp_path / measured_peaks.machine()["name"] / "verification.json"
    before = []

    def commands(part, folder):
        before.append(path.exists())
        script = "import sys; print('3 passed'); print(); sys.exit(0)"
        return [(sys.executable, "-c", script), ("a-command-that-is-absent",)]

    monkeypatch.setattr(gpu, "commands", commands)
    failed = gpu.verify(Options(part=("build", "train"), results=tmp_path))
    assert failed == ["a-command-that-is-absent"] * 2 and before == [False, True]
    records = json.loads(path.read_text())["commands"]
    assert [(x["part"], x["exit_code"]) for x in records] == [
        *(("build", 0), ("build", 127)),
        *(("train", 0), ("train", 127)),
    ]
    assert records[0]["last_line"] == "3 passed"
    gpu.verify(Options(part=("train",), results=tmp_path))  # replaces its part's records only
    parts = [x["part"] for x in json.loads(path.read_text())["commands"]]
    assert parts == ["build", "build", "train", "train"]


def test_measured_peaks_of_a_cpu():
    found = measured_peaks.measured_peaks(torch.device("cpu"))
    assert found["copy_bytes_per_second"] > 0 and found["matmul_flops_per_second"] > 0
    assert found["matmul"].startswith("fp32 2048x2048x2048")
