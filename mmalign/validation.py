"""The settings of a run against their ranges, before anything is read."""

from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from mmalign.data.templates import find_template
from mmalign.errors import UserError


@dataclass(frozen=True)
class Range:
    """The numbers from `low` to `high`; `above`, `below`: without that end."""

    low: float
    high: float
    above: bool = False
    below: bool = False

    def __contains__(self, value: float) -> bool:
        is_high_enough = value > self.low if self.above else value >= self.low
        return is_high_enough and (value < self.high if self.below else value <= self.high)

    def __str__(self) -> str:
        low = f"above {self.low:g}" if self.above else f"at least {self.low:g}"
        return f"{low} and {'below' if self.below else 'at most'} {self.high:,.10g}"


_COUNT, _COUNT_OR_NONE = Range(1, 10**9), Range(0, 10**9)  # 0: none, or never
_TOKENS = Range(1, 2**24)
RANGES = {
    "lora.rank": Range(0, 2**16),
    "lora.alpha": Range(0, 1e6, above=True),
    "lora.dropout": Range(0, 1, below=True),
    "data.num_samples": _COUNT,
    "data.max_length": _TOKENS,
    "data.num_workers": Range(0, 1024),
    "optimizer.learning_rate": Range(0, 10, above=True),
    "optimizer.beta1": Range(0, 1, below=True),
    "optimizer.beta2": Range(0, 1, below=True),
    "optimizer.eps": Range(0, 1, above=True),
    "optimizer.weight_decay": Range(0, 10),
    "optimizer.warmup_ratio": Range(0, 1),
    "optimizer.max_grad_norm": Range(0, 1e9),
    "checkpoint.every": _COUNT_OR_NONE,
    "checkpoint.keep": _COUNT,
    "parallel.shard_size": Range(0, 2**20),
    "parallel.timeout_minutes": Range(0, 60 * 24 * 365, above=True),
    "evaluation.every": _COUNT_OR_NONE,
    "limit": _COUNT,  # this one and the two below it: of a study file
    "samples": _COUNT,
    "supervised_tokens": _COUNT,
    "batch_tokens": _TOKENS,  # of scripts/evaluate.py, as limit and the two below it
    "corruption_seed": Range(0, 2**32 - 1),
    "workers": Range(0, 1024),
    "evaluation.limit": _COUNT,
    "evaluation.batch_tokens": _TOKENS,
    "global_batch_size": Range(1, 2**20),
    "micro_batch_tokens": _TOKENS,
    "recompute_layers": _COUNT_OR_NONE,
    "num_epochs": Range(0, 10**4, above=True),
    "num_steps": Range(1, 10**7),
    "seed": Range(0, 2**32 - 1),
    "peak_tflops": Range(0, 1e6, above=True),
    "loss_spike_factor": Range(1, 1e9, above=True),
    "world_size": Range(1, 2**20),  # of scripts/plan_memory.py
}


def validate(settings: Any) -> None:
    """Raises UserError for the first number out of its range, and for an unknown template.

    settings: a TrainConfig, or a dataclass of another command whose fields have these names.
    """
    for name, value in walk(settings):
        if name == "data.template":
            find_template(value)
        check(name, value)


def check(name: str, value: object) -> None:
    """Raises UserError for a number out of the range that this name has in RANGES."""
    if name not in RANGES or not isinstance(value, (int, float)) or isinstance(value, bool):
        return
    if value not in RANGES[name]:
        flag = name.replace("_", "-")
        raise UserError(f"--{flag} is {value}, expected a number that is {RANGES[name]}")


def walk(settings: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The fields by the names of their flags, with underscores: "data.max_length"."""
    for field in fields(settings):
        value = getattr(settings, field.name)
        if is_dataclass(value):
            yield from walk(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, value
