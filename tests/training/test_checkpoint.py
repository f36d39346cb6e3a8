"""Checkpoints: corrupt ones are detected, shards fit any number of processes, writing is atomic."""

import os
import pickle
import re
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mmalign.config import LoraConfig, ParallelConfig
from mmalign.distributed import DistributedContext
from mmalign.errors import UserError
from mmalign.training import checkpoint
from mmalign.training.checkpoint import CheckpointError, Checkpoints
from mmalign.training.loop import train
from tests.training.helpers import exported_weights, losses, small_config
from tests.training.train_processes import start

ALONE = DistributedContext(0, 1, torch.device("cpu"))


def state(value: float = 0.0) -> dict[str, torch.Tensor]:
    return {"weight": torch.full((300, 7), value), "moment": torch.full((5,), value).bfloat16()}


def opened(folder: Path, keep: int = 3, run: str = "ours") -> Checkpoints:
    return Checkpoints(folder, keep, ALONE, collective=False, facts={"run": run})


def saved(folder: Path, *steps: int, keep: int = 3) -> Checkpoints:
    checkpoints = opened(folder, keep)
    for step in steps:
        checkpoints.start(step, state(float(step)))
    checkpoints.wait()
    return checkpoints


def one_file(folder: Path) -> Path:
    return next(path for path in folder.iterdir() if path.suffix == ".distcp")


def change_manifest(folder: Path, old: str, new: str) -> None:
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace(old, new))


CORRUPTIONS = {
    "flipped": lambda folder: one_file(folder).write_bytes(
        (data := one_file(folder).read_bytes())[:99] + bytes([data[99] ^ 1]) + data[100:]
    ),
    "truncated": lambda folder: one_file(folder).write_bytes(one_file(folder).read_bytes()[:-1]),
    "emptied": lambda folder: one_file(folder).write_bytes(b""),
    "file lost": lambda folder: one_file(folder).unlink(),
    "metadata lost": lambda folder: (folder / ".metadata").unlink(),
    "manifest lost": lambda folder: (folder / "manifest.json").unlink(),
    "file added": lambda folder: (folder / "__9_0.distcp").touch(),
    "key of the manifest damaged": lambda folder: change_manifest(folder, "crc32", "crc33"),
    "value of the manifest damaged": lambda folder: change_manifest(
        folder, '"bytes": ', '"bytes": -'
    ),
    "manifest of another step": lambda folder: change_manifest(folder, '"step": 6', '"step": 2'),
    "manifest of another run": lambda folder: change_manifest(folder, '"ours"', '"theirs"'),
    "manifest incomplete": lambda folder: (folder / "manifest.json").write_text('{"step": 6, "fil'),
}


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_a_corrupt_checkpoint_is_seen_and_the_one_before_taken(tmp_path, caplog, corruption):
    saved(tmp_path, 2, 4, 6)
    CORRUPTIONS[corruption](tmp_path / "step_6")
    checkpoints = opened(tmp_path)
    assert checkpoints.latest_step() == 4
    assert re.search("checkpoint of step 6 is (corrupt|of another run)", caplog.text)
    assert "Resuming from step 4" in caplog.text
    read = state()
    checkpoints.load(4, read)
    assert all(torch.equal(tensor, state(4.0)[name]) for name, tensor in read.items())
    checkpoints.start(6, state(6.0))  # the corrupt one is not in the way
    checkpoints.wait()
    assert opened(tmp_path).latest_step() == 6


def test_no_intact_checkpoint_is_an_error(tmp_path):
    saved(tmp_path, 2)
    CORRUPTIONS["flipped"](tmp_path / "step_2")
    with pytest.raises(UserError, match="step 2 is corrupt.*No intact checkpoint is left"):
        opened(tmp_path).latest_step()


def test_checkpoints_of_another_run_or_under_another_step_are_put_aside(tmp_path, caplog):
    saved(tmp_path, 1, 2)
    (tmp_path / "step_1").rename(tmp_path / "step_4")
    (tmp_path / "step_\u00b2").mkdir()  # a digit, but no number
    assert opened(tmp_path).latest_step() == 2
    assert "step 4 is of another run or step: its manifest.json says step 1, not 4" in caplog.text
    with pytest.raises(UserError, match="says run 'ours', not 'theirs'.*No intact"):
        opened(tmp_path, run="theirs").latest_step()
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"corrupt_step_2", "corrupt_step_4", "step_\u00b2"}  # nothing is lost


class Touch:
    """Runs a command when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch '{self.path}'",)


def test_nothing_in_a_checkpoint_is_executed(tmp_path):
    checkpoints = saved(tmp_path, 1)
    metadata = tmp_path / "step_1" / ".metadata"
    whole = metadata.read_bytes()
    for foreign in (Touch(tmp_path / "EXECUTED"), {"planner_data": 1}, getattr, Path.unlink):
        metadata.write_bytes(pickle.dumps(foreign))
        with pytest.raises(UserError, match="checkpoint .*step_1 is not one.*Nothing in it was"):
            checkpoints.load(1, state())
    metadata.write_bytes(whole[:99])
    with pytest.raises(UserError, match="step_1"):
        checkpoints.load(1, state())
    outside = pickle.loads(whole)
    for info in outside.storage_data.values():
        info.relative_path = f"../{info.relative_path}"
    metadata.write_bytes(pickle.dumps(outside))
    with pytest.raises(UserError, match="outside of the checkpoint"):
        checkpoints.load(1, state())
    assert not (tmp_path / "EXECUTED").exists()
    metadata.write_bytes(whole)
    with pytest.raises(UserError, match="step_1 does not fit this run"):
        checkpoints.load(1, state() | {"another": torch.zeros(3)})


def test_the_last_k_are_kept(tmp_path):
    assert saved(tmp_path, 1, 2, 3, 4, keep=2).steps() == [3, 4]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_3", "step_4"]


def test_writing_goes_on_while_the_state_changes(tmp_path, monkeypatch):
    """The copy is written, one at a time; the name appears when everything is there."""
    go, describe = threading.Event(), checkpoint.manifest.describe
    monkeypatch.setattr(
        checkpoint.manifest, "describe", lambda *args: go.wait(30) and describe(*args)
    )
    checkpoints = Checkpoints(tmp_path, 3, ALONE, collective=False)
    tensors = state(1.0)
    checkpoints.start(1, tensors)
    for tensor in tensors.values():
        tensor.fill_(9.0)  # the next step
    assert not (tmp_path / "step_1").exists()
    go.set()
    checkpoints.start(2, tensors)
    assert (tmp_path / "step_1").exists()  # it was waited for
    checkpoints.wait()
    read = state()
    checkpoints.load(1, read)
    assert all(torch.equal(tensor, state(1.0)[name]) for name, tensor in read.items())


def test_an_error_while_writing_surfaces_and_says_what_remains(tmp_path, monkeypatch):
    checkpoints = saved(tmp_path, 1)

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.manifest, "describe", fail)
    checkpoints.start(2, state(2.0))
    checkpoints.thread.join()
    assert checkpoints.failed
    with pytest.raises(CheckpointError, match="step 2.*No space left.*Step 1 is safe"):
        checkpoints.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["step_1"]


def test_the_disk_is_checked_for_all_that_the_run_keeps(tmp_path, monkeypatch):
    needed = sum(tensor.nbytes for tensor in state().values())
    free = type("Usage", (), {"free": 2 * needed + 2**20})
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: free)
    Checkpoints(tmp_path, 1, ALONE, collective=False).check_disk({"x": state()["moment"]})
    with pytest.raises(UserError, match="3 checkpoints need"):
        Checkpoints(tmp_path, 2, ALONE, collective=False).check_disk(state())


@pytest.mark.parametrize("stage", ["finetune", "pretrain"])
def test_four_processes_continue_on_two_and_on_one(small_world, tmp_path, stage):
    """Weights and moments change hands; with LoRA of rank 2 some of four hold no rows."""
    whole = small_config(small_world, tmp_path / "whole", stage, num_steps=4)
    hybrid = ParallelConfig(sharding="hybrid", shard_size=2)
    whole = replace(
        whole,
        parallel=hybrid if stage == "pretrain" else ParallelConfig(sharding="full"),
        lora=LoraConfig(rank=2 if stage == "finetune" else 0, dropout=0.0),
        data=replace(whole.data, shuffle=True),
        checkpoint=replace(whole.checkpoint, every=2, keep=2),
    )
    start(whole, 4).succeed()
    expected = torch.tensor(losses(whole.run_dir))
    for world_size in (2, 1):
        continued = replace(whole, run_dir=tmp_path / f"on_{world_size}")
        shutil.copytree(whole.run_dir, continued.run_dir)
        shutil.rmtree(continued.run_dir / "checkpoints" / "step_4")
        shutil.rmtree(continued.run_dir / "export")
        if world_size == 1:
            train(continued)
        else:
            start(continued, world_size).succeed()
        found = torch.tensor(losses(continued.run_dir))
        assert torch.equal(found[:2], expected[:2])  # those lines were kept
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)
        ours, theirs = exported_weights(whole.run_dir), exported_weights(continued.run_dir)
        for name, weight in ours.items():
            torch.testing.assert_close(weight, theirs[name], atol=1e-4, rtol=1e-3, msg=name)
