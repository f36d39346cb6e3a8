"""Runs with and without shortcuts: the same losses and weights, step after step."""

import sys
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mmalign.config import LoraConfig, ShortcutConfig
from mmalign.flops import Workload, batch_flops, model_flops, required_flops
from mmalign.model import llava
from mmalign.training.loop import train
from tests.model import tiny
from tests.model.tiny import HEADER, following, without_prefix
from tests.test_flops import CLIP_VIT_L, LLAMA2_7B
from tests.training.helpers import exported_weights, losses, small_config, workload_of

PLAIN = ShortcutConfig(last_layer_rows=False, frozen_prefix=False)


def run(config, shortcuts: ShortcutConfig):
    config = replace(config, shortcuts=shortcuts)
    train(config)
    return torch.tensor(losses(config.run_dir)), exported_weights(config.run_dir)


@pytest.mark.parametrize("kind", ["pretrain", "finetune", "lora", "text-only"])
def test_a_run_with_shortcuts_equals_a_plain_one(small_world, tmp_path, kind):
    lora = LoraConfig(rank=4 if kind == "lora" else 0, dropout=0.0)
    stage, data = "pretrain" if kind == "pretrain" else "finetune", {"shuffle": True}
    data |= {"text_only": True} if kind == "text-only" else {}
    tokens = 250 if stage == "pretrain" else 1200  # several micro-batches, fewer of them in ours
    settings = dict(lora=lora, data=data, micro_batch_tokens=tokens)
    (plain, plain_weights), (ours, weights) = (
        run(small_config(small_world, tmp_path / name, stage, **settings), shortcuts)
        for name, shortcuts in (("plain", PLAIN), ("ours", ShortcutConfig()))
    )
    torch.testing.assert_close(ours, plain, rtol=2e-6, atol=0)
    assert weights.keys() == plain_weights.keys()
    for name, weight in plain_weights.items():
        error = (weights[name] - weight).norm()
        assert error <= 1e-5 * weight.norm(), f"{name}: {error:.1e}"


def test_the_prefix_is_computed_once_per_run(small_world, tmp_path, monkeypatch):
    lengths, compute = [], llava.prefix_key_values

    def counting(decoder, token_ids):
        lengths.append(len(token_ids))
        return compute(decoder, token_ids)

    monkeypatch.setattr(llava, "prefix_key_values", counting)
    train(small_config(small_world, tmp_path, "pretrain"))
    assert len(lengths) == 1 and lengths[0] > 8


@pytest.mark.parametrize(
    "changes",
    [
        {"stage": "finetune"},
        {"data": {"template": "plain"}},
        {"shortcuts": ShortcutConfig(frozen_prefix=False)},
    ],
    ids=["finetune", "plain", "off"],
)
def test_runs_without_a_constant_prefix(small_world, tmp_path, changes, monkeypatch):
    monkeypatch.delattr(llava, "prefix_key_values")
    config = small_config(small_world, tmp_path, **{"stage": "pretrain", "num_steps": 1} | changes)
    train(config)


def products(model, batch) -> int:
    """FLOPs of the matrix products of a step's micro-batch outside attention, counted by torch."""
    with FlopCounterMode(display=False) as counter:
        model(batch).backward()
    counts = counter.get_flop_counts()["Global"]
    return counts[torch.ops.aten.mm] + counts[torch.ops.aten.addmm]


@pytest.mark.parametrize("kind", ["pretrain", "finetune", "lora"])
def test_required_flops_are_those_that_torch_counts(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(
        sys.modules["mmalign_kernels.reference.linear"], "_HAS_ONEDNN", False
    )  # whose products it misses
    config = tiny.stage("pretrain" if kind == "pretrain" else "finetune")
    if kind == "lora":
        config = replace(config, lora=LoraConfig(rank=2, dropout=0.0, targets=("q_proj", "v_proj")))
    hf_model = tiny.hf_llava(**tiny.GROUPED_QUERY)
    model = tiny.ours(hf_model, tmp_path, prefix_ids=HEADER.tolist())
    tiny.set_trainable(model, config)
    samples = following(tiny.mixed_samples())
    whole = ours = tiny.pack(samples)
    if kind == "pretrain":
        ours = without_prefix(samples)
        model(ours)  # computes the prefix
    with_shortcuts = products(model, ours)
    model.shortcuts = PLAIN
    workload = workload_of(model, config)
    sizes = [len(x.input_ids) for x in samples], whole.num_loss_tokens, len(whole.pixel_values)
    required = required_flops(workload, ShortcutConfig(), *sizes, ours.prefix_length)
    saved = model_flops(workload, *sizes) - required
    assert saved.projections > 0 and (saved.adapters > 0) == (kind == "lora")
    assert products(model, whole) - with_shortcuts == saved.projections + saved.adapters
    assert batch_flops(workload, ours) == batch_flops(workload, whole)  # MFU's do not change


def test_flops_that_the_shortcuts_save_at_7b():
    """The figures of mmalign/flops.py."""
    pretrain = Workload(LLAMA2_7B, CLIP_VIT_L, "pretrain")
    finetune = Workload(LLAMA2_7B, CLIP_VIT_L, "finetune")
    rows, both = ShortcutConfig(frozen_prefix=False), ShortcutConfig()

    def saved(workload, shortcuts, *sizes) -> float:
        return (
            1
            - required_flops(workload, shortcuts, *sizes).total
            / model_flops(workload, *sizes[:3]).total
        )

    assert saved(pretrain, rows, [330], 22, 1) == pytest.approx(0.0236, abs=1e-4)
    assert saved(pretrain, both, [330], 22, 1, 37) == pytest.approx(0.1302, abs=1e-4)
    assert saved(finetune, both, [550], 242, 1) == pytest.approx(0.0142, abs=1e-4)
