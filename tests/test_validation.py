"""Every number of the settings has a range, and what lies outside is refused by the flag's name."""

import dataclasses
import math
import runpy
import sys
import typing
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from mmalign.config import TrainConfig
from mmalign.errors import UserError
from mmalign.recipes import RECIPES
from mmalign.study.plan import Settings, Variant
from mmalign.training.loop import train
from mmalign.validation import RANGES, validate

ROOT = Path(__file__).resolve().parents[1]
CONFIG = RECIPES["finetune-7b-lora"][1]
NEVER = (math.nan, math.inf, -math.inf, -1, -0.5, 10**30, 1e30)
MAY_BE_ZERO = {
    *("lora.rank", "lora.dropout", "data.num_workers", "optimizer.beta1", "optimizer.beta2"),
    *("optimizer.weight_decay", "optimizer.warmup_ratio", "optimizer.max_grad_norm", "seed"),
    *("checkpoint.every", "evaluation.every", "parallel.shard_size", "recompute_layers"),
}


def numeric_fields(kind: type, prefix: str = "") -> list[str]:
    """By the annotations, so that a field whose default is None is among them."""
    names = []
    for name, hint in typing.get_type_hints(kind).items():
        if is_dataclass(hint):
            names += numeric_fields(hint, f"{prefix}{name}.")
        elif {int, float} & {hint, *typing.get_args(hint)}:
            names.append(prefix + name)
    return names


def with_field(config: Any, name: str, value: object) -> Any:
    first, _, rest = name.partition(".")
    value = with_field(getattr(config, first), rest, value) if rest else value
    return replace(config, **{first: value})


def test_every_numeric_field_has_a_range_and_every_range_a_field():
    names = [x for kind in (TrainConfig, Settings, Variant) for x in numeric_fields(kind)]
    plan = runpy.run_path(str(ROOT / "scripts/plan_memory.py"))["PlanMemory"]
    names += [name for name in numeric_fields(plan) if not name.startswith("config.")]
    names += ["batch_tokens", "corruption_seed", "workers"]  # arguments of scripts/evaluate.py
    assert sorted(names) == sorted([*RANGES, "seeds"])  # each run's `seed` is checked


def test_a_new_field_is_found():
    fields = [("speed", float | None), ("size", int | typing.Literal["auto"])]
    inner = dataclasses.make_dataclass("Inner", [*fields, ("name", str), ("switch", bool)])
    assert numeric_fields(dataclasses.make_dataclass("Outer", [("part", inner)])) == [
        "part.speed",
        "part.size",
    ]


@pytest.mark.parametrize("name", numeric_fields(TrainConfig))
def test_what_no_number_may_be_is_refused_by_name(name):
    flag = "--" + name.replace("_", "-")
    for value in NEVER if name in MAY_BE_ZERO else (*NEVER, 0, 0.0):
        with pytest.raises(UserError) as caught:
            validate(with_field(CONFIG, name, value))
        assert str(caught.value) == f"{flag} is {value}, expected a number that is {RANGES[name]}"
    if name in MAY_BE_ZERO:
        validate(with_field(CONFIG, name, 0))


@pytest.mark.parametrize(
    "name, inside, outside, text",
    [
        ("num_steps", (1, 10**7), (0, 10**7 + 1), "at least 1 and at most 10,000,000"),
        ("seed", (0, 2**32 - 1), (2**32,), "at least 0 and at most 4,294,967,295"),
        ("optimizer.beta2", (0, 0.9999), (1,), "at least 0 and below 1"),
        ("optimizer.learning_rate", (1e-30, 1), (0,), "above 0 and at most 10"),
        ("optimizer.warmup_ratio", (0, 1), (1.0001,), "at least 0 and at most 1"),
        ("loss_spike_factor", (1.01,), (1,), "above 1 and at most 1,000,000,000"),
        ("global_batch_size", (1, 4096), (10**9,), "at least 1 and at most 1,048,576"),
    ],
)
def test_both_ends_of_a_range(name, inside, outside, text):
    for value in inside:
        validate(with_field(CONFIG, name, value))
    for value in outside:
        with pytest.raises(UserError, match=text):
            validate(with_field(CONFIG, name, value))


def test_recipes_are_in_range_and_unset_is_not_a_number():
    for _, config in RECIPES.values():
        validate(config)
    validate(replace(CONFIG, num_steps=None, peak_tflops=None, micro_batch_tokens="auto"))


@pytest.mark.parametrize("script", ["check_data", "preview_batch"])
def test_other_commands_refuse_the_same(monkeypatch, script):
    command = [script, "--model.tokenizer", "none", "--data.path", "none", "--data.max-length", "0"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit, match="error: --data.max-length is 0, expected a number"):
        runpy.run_path(str(ROOT / "scripts" / f"{script}.py"), run_name="__main__")


@pytest.mark.parametrize(
    "command",
    [
        "evaluate --limit 0",
        "evaluate --batch-tokens -1",
        "evaluate --limit -1 --tasks pope",
        "evaluate --corruption-seed -1 --tasks pope",
        "plan_memory finetune-7b --world-size 0",
        "plan_memory finetune-7b --optimizer.beta1 2",
    ],
)
def test_commands_without_a_run_refuse_the_same(monkeypatch, tmp_path, command):
    script, *arguments = command.split()
    if script == "evaluate":
        output = str(tmp_path / "out")
        arguments += ["--model", "none", "--data-root", "none", "--output", output]
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    flag = next(x for x in arguments if x.startswith("--"))
    with pytest.raises(SystemExit, match=f"error: {flag} is -?[0-9.]+, expected a number that is"):
        runpy.run_path(str(ROOT / "scripts" / f"{script}.py"), run_name="__main__")
    assert not (tmp_path / "out").exists()


EVALUATE = "evaluate --model none --data-root none --output none"
PREVIEW = "preview_batch --model.tokenizer none --data.path none"


@pytest.mark.parametrize(
    "command, said",
    [
        (f"{EVALUATE} --tasks pope --corruption-seed 3", "--corruption-seed has no effect without"),
        (
            f"{EVALUATE} --tasks pope --batch-tokens 99",
            "--batch-tokens is for tasks that",
        ),
        (f"{EVALUATE} --corruption-seed 3", "for tasks about pictures, not for truthfulqa and"),
        (f"{PREVIEW} --json --figure a.png", "--json prints the samples, --figure"),
        ("study none --dry-run --slurm", "--dry-run and --slurm are different commands"),
        ("study none --report --seeds 0", "--report covers the whole study. Leave out"),
        ("plan_memory finetune-7b --lora.alpha 3", "--lora.alpha would have no effect"),
        ("plan_memory finetune-7b --optimizer.update-in-backward True", "update-in-backward"),
        ("compare none other --output ./other", "--output other is an evaluation"),
    ],
)
def test_options_without_effect_are_refused(monkeypatch, command, said):
    script, *arguments = command.split()
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    with pytest.raises(SystemExit, match=f"error: .*{said}"):
        runpy.run_path(str(ROOT / "scripts" / f"{script}.py"), run_name="__main__")


def test_an_unknown_template_is_named_with_the_known_ones():
    with pytest.raises(UserError, match="unknown template 'v9': --data.template takes plain, v0"):
        validate(with_field(CONFIG, "data.template", "v9"))


def test_a_run_is_refused_before_it_writes_anything(tmp_path):
    config = replace(RECIPES["tiny-finetune"][1], run_dir=tmp_path / "run", num_steps=0)
    with pytest.raises(UserError, match="--num-steps is 0, expected a number that is at least 1"):
        train(config)
    assert not (tmp_path / "run").exists()
