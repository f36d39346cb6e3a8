"""--profile: which steps, what is left, and that every instant of a step has one category."""

import gzip
import json
import re
import time
from dataclasses import replace

import pytest
import torch
from mmalign_kernels.operation import Operation

from mmalign.batch import PackedBatch
from mmalign.data.dataset import ConversationDataset
from mmalign.errors import UserError
from mmalign.files import read_json_lines
from mmalign.training.loop import train
from mmalign.training.optimizer import AdamW
from mmalign.training.profile import ranges, steps_to_profile
from mmalign.training.profile.timeline import (
    ATTENTION,
    CATEGORIES,
    COMMUNICATION,
    DATA_WAIT,
    ELEMENTWISE,
    IDLE,
    LOSS,
    MATRIX,
    NORMS,
    OPTIMIZER,
    read_timeline,
)
from mmalign.training.trainer import Trainer
from tests.model import tiny
from tests.training.helpers import CPU, exported_weights, losses, small_config


def trace_ranges(run_dir) -> list[dict]:
    with gzip.open(run_dir / "profile" / "trace.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    found = [event for event in events if event.get("cat") == "user_annotation"]
    return sorted(found, key=lambda event: event["ts"])


def table(run_dir) -> dict[str, list[float | None]]:
    """category -> [ms per step, share in %, bound ...] of profile.md."""
    rows = re.findall(r"^\| (.+?) \| ([^a-z|][^|]*\|.*)\|$", profile_md(run_dir), re.MULTILINE)
    return {
        name.strip("*"): [
            None if cell.strip() == "-" else float(cell.strip(" %").replace(",", ""))
            for cell in cells.split("|")[:3]
        ]
        for name, cells in rows
        if name.strip("*") in (*CATEGORIES, "step")
    }


def profile_md(run_dir) -> str:
    return (run_dir / "profile" / "profile.md").read_text()


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_profile_changes_nothing_and_adds_up(small_world, tmp_path, stage):
    settings = dict(global_batch_size=32, micro_batch_tokens=700)
    plain = small_config(small_world, tmp_path / "plain", stage, **settings)
    profiled = replace(plain, run_dir=tmp_path / "profiled", profile="3:5")
    train(plain)
    train(profiled)
    assert losses(plain.run_dir) == losses(profiled.run_dir)
    ours, theirs = exported_weights(plain.run_dir), exported_weights(profiled.run_dir)
    assert all(torch.equal(weight, theirs[name]) for name, weight in ours.items())

    assert not (plain.run_dir / "profile").exists()
    measured = read_timeline(profiled.run_dir / "profile" / "trace.json.gz")
    assert measured.num_steps == 2 and tuple(measured.seconds) == CATEGORIES
    ranges_found = trace_ranges(profiled.run_dir)
    steps = [e for e in ranges_found if re.fullmatch(r"step \d+", e["name"])]
    assert [event["name"] for event in steps] == ["step 3", "step 4"]
    phases = ("data wait", "forward", "backward", "gradient norm", "optimizer")
    for phase in phases:  # all that a step waits for and does is inside of it
        found = [event for event in ranges_found if event["name"] == phase]
        assert len(found) >= len(steps), phase
        assert all(any(inside(event, step) for step in steps) for event in found), phase
    assert sum(measured.seconds.values()) == pytest.approx(sum(e["dur"] for e in steps) / 1e6)
    assert min(measured.seconds.values()) >= 0
    for category in (MATRIX, ATTENTION, NORMS, ELEMENTWISE, LOSS, OPTIMIZER, DATA_WAIT, IDLE):
        assert measured.seconds[category] > 0, category
    assert measured.seconds[COMMUNICATION] == 0

    rows = table(profiled.run_dir)
    assert set(rows) == {*CATEGORIES, "step"}
    assert sum(row[0] for name, row in rows.items() if name != "step") == pytest.approx(
        rows["step"][0], abs=0.01 * len(CATEGORIES)
    )
    assert rows["step"][0] == pytest.approx(measured.wall / 2 * 1e3, abs=0.01)
    assert "No memory snapshot" in profile_md(profiled.run_dir)


def test_a_slow_category_shows_up(small_world, tmp_path, monkeypatch):
    update, load_pixels = AdamW.step, ConversationDataset.load_pixels

    def slow_update(optimizer, *args):
        time.sleep(0.15)
        update(optimizer, *args)

    def slow_load(dataset, index):
        time.sleep(0.05)  # longer than the step beside which the next one is loaded
        return load_pixels(dataset, index)

    monkeypatch.setattr(AdamW, "step", slow_update)
    monkeypatch.setattr(ConversationDataset, "load_pixels", slow_load)
    config = small_config(small_world, tmp_path, "pretrain", num_steps=3, profile="2:4")
    train(config)
    rows = table(tmp_path)
    assert rows[OPTIMIZER][0] >= 150 and rows[DATA_WAIT][0] >= 8 * 20
    assert rows[OPTIMIZER][2] < 1 and rows[DATA_WAIT][2] == 0  # their bounds


def test_ranges_by_phase_and_layer(small_world, tmp_path):
    config = small_config(small_world, tmp_path, micro_batch_tokens=700, num_steps=3, profile="2:3")
    train(config)
    found = trace_ranges(tmp_path)
    names = [event["name"] for event in found]
    micro_batches = read_json_lines(tmp_path / "metrics.jsonl")[1]["micro_batches"]
    assert micro_batches > 1
    for name in ("forward", "backward", "vision tower", "projector", "vision layer 1"):
        assert names.count(name) == micro_batches, name
    assert names.count("data wait") == names.count("optimizer") == 1
    layers = [name for name in names if re.fullmatch(r"layer \d( backward)?", name)]
    assert (
        layers
        == [
            *("layer 0", "layer 1", "layer 1 backward", "layer 0 backward"),
        ]
        * micro_batches
    )
    inner = {"layer 0": "forward", "layer 1 backward": "backward", "forward": "step 2"}
    for name, outer in inner.items():
        assert inside(first(found, name), first(found, outer)), name
    attention = first(found, "mmalign::rotary_attention_bwd")  # the last layer's
    assert inside(attention, first(found, "layer 1 backward"))


def first(events: list[dict], name: str) -> dict:
    return next(event for event in events if event["name"] == name)


def inside(event: dict, outer: dict) -> bool:
    begin, end = outer["ts"], outer["ts"] + outer["dur"]
    return begin <= event["ts"] and event["ts"] + event["dur"] <= end


def test_nothing_is_left_when_no_profile_runs(tmp_path):
    model = tiny.ours(tiny.hf_llava(**tiny.GROUPED_QUERY), tmp_path)
    config = tiny.stage("finetune")
    model.set_trainable(config.stage, config.lora, train_image_tokens=False)
    trainer = Trainer(config, CPU, model, num_steps=1)
    before = wrapped(trainer)
    with ranges.ranges_of(trainer):
        assert all(now != was for now, was in zip(wrapped(trainer), before, strict=True))
        assert any(module._forward_hooks for module in model.modules())
    assert wrapped(trainer) == before and "step" not in vars(trainer.optimizer)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def wrapped(trainer) -> list:
    optimizer = trainer.optimizer
    functions = Operation.run, PackedBatch.to, torch.Tensor.backward
    return [*functions, optimizer.step, optimizer.gradient_norm]


def test_steps_are_counted_as_in_the_metrics():
    assert list(steps_to_profile("10:13", 20)) == [10, 11, 12]
    assert list(steps_to_profile("1:2", 1)) == [1]
    assert not steps_to_profile("", 5)
    for wrong in ("10", "3:3", "0:2", "4:2", "a:b", "1:2:3", "5:7"):
        with pytest.raises(UserError, match=f"--profile {wrong}: expected"):
            steps_to_profile(wrong, 5)


def test_a_continued_run_profiles_what_is_left(small_world, tmp_path):
    config = small_config(small_world, tmp_path, num_steps=4, profile="2:5")
    config = replace(config, checkpoint=replace(config.checkpoint, every=1))
    stopped, run = AdamW.step, Operation.run

    def interrupt(optimizer, *args):
        if optimizer.step_count == 2:
            raise KeyboardInterrupt
        stopped(optimizer, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AdamW, "step", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    assert not (tmp_path / "profile" / "profile.md").exists()
    assert Operation.run is run  # the ranges were removed
    train(config)
    assert profile_md(tmp_path).startswith("# Profile of steps 3, 4\n")
    assert "Step 3 was the first of this process" in profile_md(tmp_path)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_profile_of_a_gpu(small_world, tmp_path):
    """Kernels are found, belong to what launched them, and add up; the snapshot is there."""
    train(small_config(small_world, tmp_path, device="cuda", precision="bf16", profile="4:6"))
    measured = read_timeline(tmp_path / "profile" / "trace.json.gz")
    assert sum(measured.seconds.values()) == pytest.approx(measured.wall)
    assert min(measured.seconds.values()) >= 0
    for category in (MATRIX, ATTENTION, NORMS, ELEMENTWISE, LOSS, OPTIMIZER):
        assert measured.seconds[category] > 0, category
    assert not any(name.startswith(("aten::", "mmalign::")) for _, name, *_ in measured.operations)
    assert (tmp_path / "profile" / "memory_snapshot.pickle").stat().st_size > 0
    assert set(table(tmp_path)) == {*CATEGORIES, "step"}
    record = read_json_lines(tmp_path / "metrics.jsonl")[-1]
    assert 0 < record["memory_allocated_bytes"] <= record["memory_peak_bytes"]
