"""SIGTERM and a full disk at random moments of a run that also evaluates and exports.

Nothing but the step or the evaluation in flight is lost, and the same command ends with the same
bits. MMALIGN_KILLS=20 pytest -s makes 20 moments of each.
"""

import os
import random
import re
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
from tests.training.test_kill import NUM_KILLS, NUM_STEPS, wait_for_a_moment
from tests.training.train_processes import start


@pytest.fixture(scope="module")
def whole(small_world, data_root, tmp_path_factory):  # noqa: F811
    """(config of an undisturbed run, its seconds)."""
    config = small_config(
        small_world, tmp_path_factory.mktemp("whole") / "run", num_steps=NUM_STEPS, precision="bf16"
    )
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


def test_sigterm_loses_no_step(whole, tmp_path):
    config, seconds = whole
    config, rng, moments = replace(config, run_dir=tmp_path / "run"), random.Random(0), []
    config = replace(config, checkpoint=replace(config.checkpoint, every=0))
    for left in reversed(range(NUM_KILLS or 2)):
        running = start(config)
        wait_for_a_moment(running, config.run_dir, seconds, left, rng)
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


def test_a_full_disk_costs_what_is_in_flight(whole, small_disk, tmp_path):
    config, seconds = whole
    (small_disk / "run").mkdir()
    run_dir = tmp_path / "linked"  # beside it what the run prints, which is not on the full disk
    run_dir.symlink_to(small_disk / "run")
    config, rng, moments = replace(config, run_dir=run_dir), random.Random(1), []
    config = replace(config, checkpoint=replace(config.checkpoint, every=2))
    for left in reversed(range(NUM_KILLS or 2)):
        running = start(config)
        wait_for_a_moment(running, config.run_dir, seconds, left, rng)
        with open(small_disk / "fill", "wb", buffering=0) as file:
            for size in (2**20, 2**12, 1):
                fill(file, size)
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


def fill(file, size: int) -> None:
    try:
        while file.write(b"x" * size) == size:
            pass
    except OSError:
        pass
