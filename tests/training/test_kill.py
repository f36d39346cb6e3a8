"""kill -9 at random moments, the same command again: the same bits as the undisturbed run.

MMALIGN_KILLS=20 kills every kind of run 20 times; without it a few kinds are killed a few times.
"""

import os
import random
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mmalign.config import LoraConfig, ParallelConfig
from tests.training.processes import Running, start
from tests.training.runs import exported_weights, losses, small_config

NUM_KILLS = int(os.environ.get("MMALIGN_KILLS", 0))
NUM_STEPS = 10
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


@pytest.mark.parametrize(
    "stage, lora_rank, world_size, sharding", KINDS if NUM_KILLS else KINDS[:3]
)
def test_kill_9_changes_no_bit(small_world, tmp_path, stage, lora_rank, world_size, sharding):
    """Shuffled, with dropout in the adapters, several micro-batches a step, bf16 weights."""
    tokens = 310 if stage == "finetune" else 100  # the header has no rows
    whole = small_config(
        small_world, tmp_path / "whole", stage, micro_batch_tokens=tokens, num_steps=NUM_STEPS
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
    for _ in range(NUM_KILLS or 3):
        running = start(killed, world_size)
        wait_for_a_moment(running, killed.run_dir, seconds, rng)
        victims = running.processes if rng.random() < 0.7 else [rng.choice(running.processes)]
        for process in victims:
            if process.is_alive():
                os.kill(process.pid, signal.SIGKILL)
        running.wait(seconds=30)  # the others notice
    start(killed, world_size).succeed()
    assert losses(whole.run_dir) == losses(killed.run_dir)
    ours, theirs = exported_weights(whole.run_dir), exported_weights(killed.run_dir)
    assert ours.keys() == theirs.keys() and ours
    assert all(torch.equal(weight, theirs[name]) for name, weight in ours.items())


def wait_for_a_moment(running: Running, run_dir: Path, seconds: float, rng: random.Random) -> None:
    """Half of them anywhere in the run, half when a random step has been logged, or just after."""
    begin, limit, wanted = time.monotonic(), rng.uniform(0, seconds), NUM_STEPS + 1
    metrics = run_dir / "metrics.jsonl"
    if rng.random() < 0.5:
        done = metrics.read_text().count("\n") if metrics.exists() else 0
        limit, wanted = 60.0, rng.randint(min(done + 1, NUM_STEPS), NUM_STEPS)
    while time.monotonic() - begin < limit and running.processes[0].is_alive():
        if metrics.exists() and metrics.read_text().count("\n") >= wanted:
            time.sleep(rng.uniform(0, 0.05))
            return
        time.sleep(0.005)
