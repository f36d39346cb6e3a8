"""Sharded runs against one process: the same losses, the same weights, whole ones exported."""

import shutil
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mmalign.config import LoraConfig, ParallelConfig
from mmalign.training.sharding import ParallelModel
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


class Reductions(TorchDispatchMode):
    """Precision of every reduction of gradients over the processes, in order."""

    def __init__(self):
        super().__init__()
        self.dtypes = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if "reduce_scatter" in str(operation):
            self.dtypes.append(str(args[0].dtype))
        return operation(*args, **(kwargs or {}))


def print_reductions(rank: int) -> None:
    backward, seen = ParallelModel.backward, Reductions()

    def watched(self, batch, num_loss_tokens, last):
        with seen:
            share = backward(self, batch, num_loss_tokens, last)
        print("reduced in", *seen.dtypes, "last" if last else "")
        seen.dtypes.clear()
        return share

    ParallelModel.backward = watched


@pytest.mark.parametrize("reduce_dtype, reduce_once", [("fp32", True), ("bf16", False)])
def test_gradients_are_reduced_as_asked(small_world, tmp_path, reduce_dtype, reduce_once):
    """Each unit (two layers and the rest) once a step or once a micro-batch, in this precision."""
    alone = small_config(small_world, tmp_path / "one", micro_batch_tokens=310, num_steps=3)
    train(alone)
    parallel = replace(FULL, reduce_dtype=reduce_dtype, reduce_once=reduce_once)
    sharded = replace(alone, run_dir=tmp_path / "sharded", parallel=parallel)
    running = start(sharded, 2, print_reductions)
    running.succeed()
    lines = [x for x in running.outputs()[1].splitlines() if x.startswith("reduced in")]
    lasts = [line.endswith("last") for line in lines]
    assert sum(lasts) == 3 and len(lines) > 3  # steps of several micro-batches
    dtype = {"fp32": "torch.float32", "bf16": "torch.bfloat16"}[reduce_dtype]
    for line, last in zip(lines, lasts, strict=True):
        assert line.count("torch.") == line.count(dtype) == (3 if last or not reduce_once else 0)
    expected, found = torch.tensor(losses(alone.run_dir)), torch.tensor(losses(sharded.run_dir))
    exact = reduce_dtype == "fp32"
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5 if exact else 2e-2)
    assert exact or (found - expected).abs().max() > 2e-5
