"""Interruptions at random moments of a run that also evaluates, and of its export.

Nothing but the step, the evaluation or the folder in flight is lost, and the same command ends with
the same bits. pytest -m kills -s makes 20 moments of each and prints them.
"""

import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mmalign.evaluation.items import is_finished, read_items
from tests.evaluation.test_during_training import (  # noqa: F401  data_root: a fixture
    data_root,
    evaluated,
    newest_step,
)
from tests.training.helpers import exported_weights, losses, small_config
from tests.training.test_kill import steps_of, wait_for_a_moment
from tests.training.train_processes import Running, start

pytestmark = pytest.mark.kills


@pytest.fixture(scope="module")
def whole(small_world, data_root, tmp_path_factory, num_moments):  # noqa: F811
    """(config of an undisturbed run, its seconds)."""
    run_dir, num_steps = tmp_path_factory.mktemp("whole") / "run", steps_of(num_moments)
    config = small_config(small_world, run_dir, num_steps=num_steps, precision="bf16")
    config = evaluated(config, data_root, every=3)
    began = time.monotonic()
    start(config).succeed()
    return config, time.monotonic() - began


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of its own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def assert_same_run(one: Path, other: Path) -> None:
    assert losses(one) == losses(other)
    ours, theirs = exported_weights(one), exported_weights(other)
    assert ours.keys() == theirs.keys() and ours
    assert all(torch.equal(weight, theirs[name]) for name, weight in ours.items())
    for folder in (one / "evaluation").iterdir():
        assert read_items(folder) == read_items(other / "evaluation" / folder.name)


def test_sigterm_loses_no_step(whole, tmp_path, num_moments):
    config, seconds = whole
    config, rng, moments = replace(config, run_dir=tmp_path / "run"), random.Random(0), []
    config = replace(config, checkpoint=replace(config.checkpoint, every=0))
    for left in reversed(range(num_moments)):
        running = start(config)
        wait_for_a_moment(running, config, seconds, left, rng)
        running.send(signal.SIGTERM)
        (code,), (text,) = running.wait(60), running.outputs()
        done = losses(config.run_dir) if (config.run_dir / "metrics.jsonl").exists() else []
        moments.append((code, len(done)))
        assert code in (0, 1, -signal.SIGTERM), text  # the last: before a handler is there
        assert "Traceback" not in text and (code != 1 or "stopped by a signal" in text)
        if code == 1:
            assert newest_step(config.run_dir) == len(done), text
    print("\nSIGTERM, (exit code, steps):", *moments)
    start(config).succeed()
    assert_same_run(whole[0].run_dir, config.run_dir)


def test_a_full_disk_costs_what_is_in_flight(whole, small_disk, tmp_path, num_moments):
    config, seconds = whole
    (small_disk / "run").mkdir()
    run_dir = tmp_path / "linked"  # beside it what the run prints, which is not on the full disk
    run_dir.symlink_to(small_disk / "run")
    config, rng, moments = replace(config, run_dir=run_dir), random.Random(1), []
    config = replace(config, checkpoint=replace(config.checkpoint, every=2))
    for left in reversed(range(num_moments)):
        running = start(config)
        wait_for_a_moment(running, config, seconds, left, rng)
        fill(small_disk)
        safe = [path for path in (config.run_dir / "evaluation").glob("*") if is_finished(path)]
        step = newest_step(config.run_dir)
        running.processes[0].join(60)
        (code,), (text,) = running.wait(60), running.outputs()
        moments.append((code, newest_step(config.run_dir)))
        assert code in (0, 1) and "Traceback" not in text, text
        if code == 1:
            assert re.search(r"(?i)error: .*(no space left|GiB free)", text), text
        assert newest_step(config.run_dir) >= step and all(map(is_finished, safe))
        os.unlink(small_disk / "fill")
    print("\nfull disk, (exit code, newest checkpoint):", *moments)
    start(config).succeed()
    assert_same_run(whole[0].run_dir, config.run_dir)


def fill(disk: Path) -> None:
    with open(disk / "fill", "wb", buffering=0) as file:
        for size in (2**20, 2**12, 1):
            try:
                while file.write(b"x" * size) == size:
                    pass
            except OSError:
                pass


# ---- the export ----

EXPORTED = ("llama", "llava")


@pytest.fixture
def finished(whole, small_disk, tmp_path):
    """The undisturbed run, on a disk of its own, without its export."""
    shutil.copytree(whole[0].run_dir, small_disk / "run")
    shutil.rmtree(small_disk / "run/export")
    shutil.rmtree(small_disk / "run/evaluation")  # not what is interrupted here
    (tmp_path / "linked").symlink_to(small_disk / "run")
    config = replace(whole[0], run_dir=tmp_path / "linked")
    return replace(config, evaluation=replace(config.evaluation, every=0))


@pytest.mark.parametrize("way", [signal.SIGKILL, signal.SIGTERM, "full disk"], ids=str)
def test_an_interrupted_export_is_complete_or_absent(whole, finished, small_disk, way, num_moments):
    rng, moments, export = random.Random(str(way)), [], finished.run_dir / "export"
    expected = exported_weights(whole[0].run_dir)
    for _ in range(num_moments):
        shutil.rmtree(export, ignore_errors=True)
        if way == "full disk":  # nearly, so that the rest is filled at once
            free = shutil.disk_usage(small_disk).free
            (small_disk / "ballast").write_bytes(bytes(max(0, free - 4 * 2**20)))
        running = start(finished)
        wait_for_an_export(running, export, rng)
        if way == "full disk":
            fill(small_disk)
            running.processes[0].join(60)
        else:
            running.send(way)
        (code,), (text,) = running.wait(60), running.outputs()
        for name in ("fill", "ballast"):
            (small_disk / name).unlink(missing_ok=True)
        whole_folders = [name for name in EXPORTED if (export / name).exists()]
        moments.append((code, *whole_folders))
        assert "Traceback" not in text and code in (0, 1, -signal.SIGKILL, -signal.SIGTERM), text
        assert code != 1 or re.search("a signal|o space left|GiB free", text), text
        assert newest_step(finished.run_dir) == finished.num_steps
        found = {x: y for x, y in exported_weights(finished.run_dir).items() if "/." not in x}
        for name in whole_folders:
            assert any(key.startswith(f"export/{name}/") for key in found)
        assert all(torch.equal(weight, expected[name]) for name, weight in found.items())
    print(f"\nexport, {way}, (exit code, complete folders):", *moments)
    start(finished).succeed()
    found = exported_weights(finished.run_dir)
    assert found.keys() == expected.keys()
    assert all(torch.equal(weight, expected[name]) for name, weight in found.items())


def wait_for_an_export(running: Running, export: Path, rng: random.Random) -> None:
    """Half of them from its first file on, half before it."""
    begin, limit = time.monotonic(), 60 if rng.random() < 0.6 else rng.uniform(0, 1)
    while running.processes[0].is_alive() and time.monotonic() - begin < limit:
        if export.exists():
            time.sleep(rng.uniform(0, 0.12))
            return
        time.sleep(0.002)
