"""kill -9 at random moments, the same command again: the same bits as the undisturbed run.

pytest -m kills -s kills every kind of run 20 times, longer ones, and prints after how many steps;
without it three kinds are killed twice.
"""

import os
import random
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mmalign.config import LoraConfig, ParallelConfig, TrainConfig
from mmalign.files import read_json_lines
from tests.conftest import is_asked_for
from tests.training.helpers import exported_weights, small_config
from tests.training.train_processes import Running, start

pytestmark = pytest.mark.kills
# stage, rank of LoRA, processes, sharding
KINDS = [
    ("finetune", 4, 1, "none"),
    ("finetune", 0, 2, "full"),
    ("pretrain", 0, 2, "none"),
    ("pretrain", 0, 1, "none"),
    ("finetune", 0, 1, "none"),
    ("finetune", 4, 2, "full"),
    ("finetune", 0, 2, "none"),
    ("pretrain", 0, 2, "full"),
]


def pytest_generate_tests(metafunc):
    kinds = KINDS if is_asked_for(metafunc.config, "kills") else KINDS[:3]
    metafunc.parametrize("kind", kinds, ids=lambda kind: "-".join(map(str, kind)))


def steps_of(num_moments: int) -> int:
    """Long enough for each moment to find steps of its own."""
    return max(10, 3 * num_moments)


def test_kill_9_changes_no_bit(small_world, tmp_path, kind, num_moments):
    """Shuffled, with dropout in the adapters, several micro-batches a step, bf16 weights."""
    (stage, lora_rank, world_size, sharding), num_steps = kind, steps_of(num_moments)
    tokens = 310 if stage == "finetune" else 100  # the header has no rows
    whole = small_config(
        small_world, tmp_path / "whole", stage, micro_batch_tokens=tokens, num_steps=num_steps
    )
    whole = replace(
        whole,
        precision="bf16",
        lora=LoraConfig(rank=lora_rank),
        parallel=ParallelConfig(sharding=sharding),
        data=replace(whole.data, shuffle=True),
        checkpoint=replace(whole.checkpoint, every=2),
    )
    began = time.monotonic()
    start(whole, world_size).succeed()
    seconds = time.monotonic() - began
    killed = replace(whole, run_dir=tmp_path / "killed")
    rng = random.Random(f"{stage} {lora_rank} {world_size} {sharding}")
    moments = []
    for left in reversed(range(num_moments)):
        running = start(killed, world_size)
        wait_for_a_moment(running, killed, seconds, left, rng)
        victims = running.processes if rng.random() < 0.7 else [rng.choice(running.processes)]
        moments.append(num_lines(killed.run_dir) if victims[0].is_alive() else "over")
        for process in victims:
            if process.is_alive():
                os.kill(process.pid, signal.SIGKILL)
        running.wait(seconds=30)  # the others notice
    print(f"\n{stage}, LoRA {lora_rank}, {world_size} processes, {sharding}: lines at", *moments)
    start(killed, world_size).succeed()
    assert_same_lines(whole.run_dir, killed.run_dir, num_moments)
    ours, theirs = exported_weights(whole.run_dir), exported_weights(killed.run_dir)
    assert ours.keys() == theirs.keys() and ours
    assert all(torch.equal(weight, theirs[name]) for name, weight in ours.items())


def assert_same_lines(whole: Path, killed: Path, num_moments: int) -> None:
    """Where the main process is killed the others may save a step that it has not logged yet."""
    expected, found = losses_by_step(whole), losses_by_step(killed)
    assert found.items() <= expected.items()
    assert len(expected) - len(found) <= num_moments // 2


def losses_by_step(run_dir: Path) -> dict[int, float]:
    records = read_json_lines(run_dir / "metrics.jsonl")
    return {record["step"]: record["loss"] for record in records}


def num_lines(run_dir: Path) -> int:
    metrics = run_dir / "metrics.jsonl"
    return metrics.read_text().count("\n") if metrics.exists() else 0


def wait_for_a_moment(
    running: Running, config: TrainConfig, seconds: float, left: int, rng: random.Random
) -> None:
    """Half of them any time, mostly before the first step; half after a random step or in it.

    seconds: of the whole run; left: kills that follow, which are to find some steps, too.
    """
    assert config.num_steps
    run_dir, last, begin = config.run_dir, config.num_steps - 1, time.monotonic()
    done = num_lines(run_dir)
    farthest = max(done + 1, done + 2 * (config.num_steps - done) // (left + 2))
    limit, wanted = rng.uniform(0, seconds / 3), min(last, farthest)
    if rng.random() < 0.5:
        limit, wanted = 60.0, min(last, rng.randint(done + 1, farthest))
    while time.monotonic() - begin < limit and running.processes[0].is_alive():
        if num_lines(run_dir) >= wanted:
            time.sleep(rng.uniform(0, 0.05))
            return
        time.sleep(0.005)
