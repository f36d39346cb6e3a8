"""Sharded runs against one process: the same losses, the same weights, whole ones exported."""

import shutil
from dataclasses import replace

import pytest
import torch

from mmalign.config import LoraConfig, ParallelConfig
from mmalign.training.trainer import train
from tests.training.processes import start
from tests.training.runs import exported_weights, losses, small_config

FULL = ParallelConfig(sharding="full")
CASES = {
    "finetune": ("finetune", 2, FULL, {}),
    "pretrain": (
        "pretrain",
        2,
        replace(FULL, reshard_after_forward=False, prefetch=2),
        {"micro_batch_tokens": 100},  # the header has no rows
    ),
    "hybrid": ("finetune", 4, ParallelConfig(sharding="hybrid", shard_size=2), {}),
    "lora": (
        "finetune",
        4,
        replace(FULL, reduce_once=False),
        {"lora": LoraConfig(rank=2, dropout=0.0)},  # 2 rows on 4 processes: some hold none
    ),
    "text-only": (
        "finetune",
        2,
        FULL,
        {"data": {"text_only": True, "template": "llama_2"}, "micro_batch_tokens": 610},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_one_process(small_world, tmp_path, case):
    """Several micro-batches a step, some of them without an image."""
    stage, world_size, parallel, changes = CASES[case]
    settings = {"micro_batch_tokens": 310, "num_steps": 4, **changes}
    alone = small_config(small_world, tmp_path / "one", stage, **settings)
    train(alone)
    sharded = replace(alone, run_dir=tmp_path / "sharded", parallel=parallel)
    start(sharded, world_size).succeed()
    if case == "hybrid":  # the same command again: nothing to train, everything to gather
        shutil.rmtree(sharded.run_dir / "export")
        start(sharded, world_size).succeed()
    torch.testing.assert_close(
        torch.tensor(losses(alone.run_dir)),
        torch.tensor(losses(sharded.run_dir)),
        atol=2e-5,
        rtol=0,
    )
    ours, theirs = exported_weights(alone.run_dir), exported_weights(sharded.run_dir)
    assert ours.keys() == theirs.keys() and ours
    for name, weight in ours.items():
        torch.testing.assert_close(weight, theirs[name], atol=1e-4, rtol=1e-3, msg=name)
