"""--profile: which steps, what is left, and that every instant of a step has one category."""

import gzip
import json
import re
import time
from dataclasses import replace

import pytest
import torch
from mmalign_kernels.operation import Operation

from mmalign.config import LoraConfig
from mmalign.data.dataset import ConversationDataset
from mmalign.errors import UserError
from mmalign.model.config import DecoderConfig
from mmalign.training import ranges
from mmalign.training.floors import Ceilings, floors
from mmalign.training.flops import Workload, step_flops
from mmalign.training.metrics import read_metrics
from mmalign.training.optimizer import AdamW
from mmalign.training.profiler import steps_to_profile
from mmalign.training.timeline import (
    ATTENTION,
    CATEGORIES,
    COMMUNICATION,
    COPIES,
    DATA_WAIT,
    ELEMENTWISE,
    IDLE,
    LOSS,
    MATRIX,
    NORMS,
    OPTIMIZER,
    read_timeline,
    timeline,
)
from mmalign.training.trainer import train
from tests.model import tiny
from tests.training.runs import exported_weights, losses, small_config


def trace_ranges(run_dir) -> list[dict]:
    with gzip.open(run_dir / "profile" / "trace.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    found = [event for event in events if event.get("cat") == "user_annotation"]
    return sorted(found, key=lambda event: event["ts"])


def table(run_dir) -> dict[str, list[float | None]]:
    """category -> [ms a step, share in %, floor ...] of profile.md."""
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
    plain = small_config(small_world, tmp_path / "plain", stage, micro_batch_tokens=700)
    profiled = replace(plain, run_dir=tmp_path / "profiled", profile="3:5")
    train(plain)
    train(profiled)
    assert losses(plain.run_dir) == losses(profiled.run_dir)
    ours, theirs = exported_weights(plain.run_dir), exported_weights(profiled.run_dir)
    assert all(torch.equal(weight, theirs[name]) for name, weight in ours.items())

    assert not (plain.run_dir / "profile").exists()
    measured = read_timeline(profiled.run_dir / "profile" / "trace.json.gz")
    assert measured.num_steps == 2 and tuple(measured.seconds) == CATEGORIES
    steps = [e for e in trace_ranges(profiled.run_dir) if re.fullmatch(r"step \d+", e["name"])]
    assert [event["name"] for event in steps] == ["step 3", "step 4"]
    assert sum(measured.seconds.values()) == pytest.approx(sum(e["dur"] for e in steps) / 1e6)
    records = read_metrics(profiled.run_dir / "metrics.jsonl")[2:4]
    # the loop's own clock sees the same steps; between them it writes the metrics
    assert measured.wall > 0.98 * sum(record["seconds"] for record in records)
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
        time.sleep(0.02)
        return load_pixels(dataset, index)

    monkeypatch.setattr(AdamW, "step", slow_update)
    monkeypatch.setattr(ConversationDataset, "load_pixels", slow_load)
    config = small_config(small_world, tmp_path, "pretrain", num_steps=3, profile="2:4")
    train(config)
    rows = table(tmp_path)
    assert rows[OPTIMIZER][0] >= 150 and rows[DATA_WAIT][0] >= 8 * 20
    assert rows[OPTIMIZER][2] < 1 and rows[DATA_WAIT][2] == 0  # their floors


def test_ranges_by_stage_and_layer(small_world, tmp_path):
    config = small_config(small_world, tmp_path, micro_batch_tokens=700, num_steps=3, profile="2:3")
    train(config)
    found = trace_ranges(tmp_path)
    names = [event["name"] for event in found]
    micro_batches = read_metrics(tmp_path / "metrics.jsonl")[1]["micro_batches"]
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
    run, nothing = Operation.run, ranges.stage("forward")
    assert nothing is ranges.stage("backward")  # one object, which does nothing
    with ranges.ranges_of(model):
        assert Operation.run is not run and ranges.stage("forward") is not nothing
        assert any(module._forward_hooks for module in model.modules())
    assert Operation.run is run and ranges.stage("forward") is nothing
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


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
    stopped = AdamW.step

    def interrupt(optimizer, *args):
        if optimizer.step_count == 2:
            raise KeyboardInterrupt
        stopped(optimizer, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AdamW, "step", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    assert not (tmp_path / "profile" / "profile.md").exists()
    assert ranges.stage("forward") is ranges.stage("backward")  # the profile was taken down
    train(config)
    assert profile_md(tmp_path).startswith("# Profile of steps 3, 4\n")
    assert "Step 3 was this process's first" in profile_md(tmp_path)


STEP = {"ph": "X", "cat": "user_annotation", "name": "step 7", "ts": 0, "dur": 100, "tid": 1}


def event(cat: str, name: str, ts: float, dur: float, tid: int = 1, **args) -> dict:
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "tid": tid, "args": args}


def microseconds(events: list[dict]) -> dict[str, float]:
    measured = timeline([STEP, *events])
    assert measured.wall == pytest.approx(100e-6)
    return {name: round(t * 1e6, 6) for name, t in measured.seconds.items() if t > 1e-12}


def test_on_a_cpu_the_innermost_operation_has_the_instant():
    operations = [
        event("user_annotation", "data wait", 0, 10),
        event("cpu_op", "aten::mm", 2, 5),  # the loader's own work
        event("user_annotation", "forward", 10, 50),
        event("user_annotation", "layer 0", 11, 48),
        event("cpu_op", "aten::linear", 12, 10),
        event("cpu_op", "aten::addmm", 13, 8),
        event("cpu_op", "aten::add", 22, 3),
        event("user_annotation", "mmalign::rotary_attention_fwd", 25, 15),
        event("cpu_op", "aten::bmm", 26, 5),
        event("user_annotation", "mmalign::add_rms_norm_fwd", 40, 6),
        event("user_annotation", "mmalign::linear_cross_entropy_fwd", 46, 4),
        event("cpu_op", "aten::mm", 47, 2),
        event("cpu_op", "aten::clone", 50, 3),
        event("cpu_op", "aten::copy_", 51, 1),
        event("user_annotation", "optimizer", 60, 20),
        event("user_annotation", "mmalign::adamw_step", 61, 10),
        event("cpu_op", "aten::mm", 0, 100, tid=2),  # another thread
        event("cpu_op", "aten::mm", 120, 10),  # after the step
    ]
    assert microseconds(operations) == {
        DATA_WAIT: 10,
        MATRIX: 8,
        ELEMENTWISE: 2 + 3,  # what aten::linear does around the product, and the addition
        ATTENTION: 15,
        NORMS: 6,
        LOSS: 4,
        COPIES: 3,
        OPTIMIZER: 20,
        IDLE: 100 - 71,
    }


def test_on_a_gpu_kernels_belong_to_what_launched_them():
    launch, kernel = "cuda_runtime", "kernel"
    host = [
        event("user_annotation", "data wait", 0, 12),
        event("user_annotation", "mmalign::rms_norm_fwd", 12, 4),
        event("cuda_driver", "cuLaunchKernelEx", 13, 1, correlation=1),
        event("cpu_op", "aten::mm", 16, 4),
        event(launch, "cudaLaunchKernelExC", 17, 1, correlation=2),
        event("user_annotation", "mmalign::linear_cross_entropy_fwd", 20, 4),
        event("cpu_op", "aten::mm", 20.5, 3),
        event(launch, "cudaLaunchKernel", 21, 1, correlation=3),
        event("user_annotation", "mmalign::rotary_attention_bwd", 30, 4, tid=9),  # autograd
        event("cuda_driver", "cuLaunchKernelEx", 31, 1, tid=9, correlation=4),
        event("cpu_op", "aten::add", 34, 4, tid=9),
        event(launch, "cudaLaunchKernel", 35, 1, tid=9, correlation=5),
        event("cpu_op", "aten::item", 40, 60),  # waits for the device
    ]
    device = [
        event(kernel, "_rms_norm_kernel", 5, 15, 7, correlation=1),  # over the data wait: ahead
        event(kernel, "nvjet_tst_128x256", 20, 20, 7, correlation=2),
        event(kernel, "nvjet_tst_64x256", 40, 10, 7, correlation=3),
        event(kernel, "_attention_bwd_kernel", 52, 20, 7, correlation=4),
        event(kernel, "vectorized_elementwise_kernel", 72, 3, 7, correlation=5),
        event(kernel, "ncclDevKernel_AllReduce_Sum_bf16_RING_LL", 60, 30, 20, correlation=6),
        event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 85, 10, 21, correlation=8),
    ]
    assert microseconds(host + device) == {
        DATA_WAIT: 5,
        NORMS: 15,
        MATRIX: 20,
        LOSS: 10,
        ATTENTION: 20,
        ELEMENTWISE: 3,
        COMMUNICATION: 15,  # what the attention and the addition do not hide
        COPIES: 5,
        IDLE: 100 - 93,
    }


def test_floors_are_flops_and_bytes_over_the_ceilings(small_world):
    samples = tiny.text_samples()
    batch = tiny.pack(samples)
    step = type("Step", (), {"batches": [batch, batch]})
    decoder = DecoderConfig(103, 64, 96, 2, 4, 2, 16)
    workload = Workload(decoder, None, "finetune", LoraConfig())
    parameter = torch.nn.Parameter(torch.zeros(10, 10))
    least = floors(workload, [step], {"p": parameter}, torch.float32, Ceilings(1.0, 1e12))
    flops, tokens = step_flops(workload, step), 2 * 50
    assert least[MATRIX] == flops.projections / 1e12 and least[LOSS] == flops.lm_head / 1e12
    # rms_norm: 2 of x forward, 3 backward; four add_rms_norms: 4 and 4; weights and their gradients
    norm_rows = 5 + 4 * 8
    weights = 2 * (3 + 4 * 3)  # of 2 micro-batches: read forward and backward, gradient written
    assert least[NORMS] == 4 * 64 * (norm_rows * tokens + weights)
    assert least[ELEMENTWISE] == 4 * tokens * (2 * 8 * 96 + 2 * 64)  # SwiGLU 3 + 5; embeddings
    # parameter and two moments read and written, gradient read twice (its norm)
    assert least[OPTIMIZER] == 100 * 4 * 8
    assert least[DATA_WAIT] == least[IDLE] == 0 and least[COMMUNICATION] is None
