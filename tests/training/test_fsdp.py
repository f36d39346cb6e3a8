"""Sharded runs against one process: the same losses, the same weights, whole ones exported."""

import shutil
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mmalign.config import LoraConfig, ParallelConfig
from mmalign.training.loop import train
from mmalign.training.trainer import Trainer
from tests.model.kinds import hf_decoder
from tests.training.helpers import exported_weights, losses, small_config
from tests.training.train_processes import start

FULL = ParallelConfig(sharding="full")
CASES = {
    "finetune": ("finetune", 2, FULL, {}),
    "pretrain": (
        "pretrain",
        2,
        FULL,
        {"micro_batch_tokens": 100},  # the header has no rows
    ),
    "hybrid": ("finetune", 4, ParallelConfig(sharding="hybrid", shard_size=2), {}),
    "lora": (
        "finetune",
        4,
        FULL,
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


@pytest.mark.parametrize("kind", ("qwen2", "qwen3"))
def test_biases_and_norms_of_heads_are_sharded_too(small_world, tmp_path, kind):
    folder = tmp_path / "decoder"
    hf_decoder(kind, vocab_size=330, max_position_embeddings=512).save_pretrained(folder)
    shutil.copy(small_world.decoder / "tokenizer.model", folder)
    settings = {"model": {"decoder": str(folder), "projector": ""}, "num_steps": 3}
    alone = small_config(small_world, tmp_path / "one", micro_batch_tokens=310, **settings)
    train(alone)
    sharded = replace(alone, run_dir=tmp_path / "sharded", parallel=FULL)
    start(sharded, 2).succeed()
    ours, theirs = losses(alone.run_dir), losses(sharded.run_dir)
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), atol=1e-4, rtol=1e-5)
    ours, theirs = exported_weights(alone.run_dir), exported_weights(sharded.run_dir)
    assert ours.keys() == theirs.keys()
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
    train_step, seen = Trainer.train_step, Reductions()

    def watched(self, step, *flags):
        with seen:
            result = train_step(self, step, *flags)
        print("micro-batches", len(step.batches), "reduced in", *seen.dtypes)
        seen.dtypes.clear()
        return result

    Trainer.train_step = watched


def test_gradients_are_reduced_once_per_step_in_fp32(small_world, tmp_path):
    """Each FSDP unit (two layers and the root), however many micro-batches a step has."""
    alone = small_config(small_world, tmp_path / "one", micro_batch_tokens=310, num_steps=3)
    train(alone)
    sharded = replace(alone, run_dir=tmp_path / "sharded", parallel=FULL)
    running = start(sharded, 2, print_reductions)
    running.succeed()
    lines = [x for x in running.outputs()[1].splitlines() if x.startswith("micro-batches")]
    assert len(lines) == 3 and max(int(line.split()[1]) for line in lines) > 1
    for line in lines:
        assert line.count("torch.") == line.count("torch.float32") == 3
    expected, found = torch.tensor(losses(alone.run_dir)), torch.tensor(losses(sharded.run_dir))
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
