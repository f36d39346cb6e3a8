"""What the figures should be, once: the targets of the design, by the names that records have.

Patterns are those of fnmatch. A target with `over` bounds a ratio: how many times faster ours is
than the fastest variant that `over` matches, by samples a second where both have them, else by
time. Where several of our variants match, the best one counts.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

OURS = "mmalign*"
GPU, H100, CPU = "nvidia-*", "nvidia-h100-*", "cpu-*"


@dataclass(frozen=True)
class Target:
    text: str  # what is asked, in a few words
    part: str
    benchmark: str
    measure: str  # "ratio", or a field of the record or of its extra: share, seconds, mfu ...
    bound: float  # at least; at most where measure is seconds
    case: str = "*"
    direction: str = "*"
    variant: str = OURS
    over: str = ""  # of a ratio: the variants that are compared with
    machine: str = GPU
    each: bool = False  # every matching case has to meet it; else the best one
    ceiling: str = "*"  # that the record's share refers to

    def asks(self, row: Mapping) -> bool:
        """Whether the target is about this record of ours."""
        names = ("benchmark", "case", "direction", "variant")
        return (
            row["seconds"] is not None
            and all(fnmatchcase(row[name], getattr(self, name)) for name in names)
            and fnmatchcase(row["ceiling"] or "", self.ceiling)
        )

    def value(self, row: Mapping, rows: Iterable[Mapping]) -> float | None:
        """The measured value of a record of ours; None where what it needs was not measured."""
        if self.measure != "ratio":
            return row.get(self.measure, row["extra"].get(self.measure))
        peers = [
            other
            for other in rows
            if fnmatchcase(other["variant"], self.over)
            and other["seconds"] is not None
            and all(other[name] == row[name] for name in ("benchmark", "case", "direction"))
        ]
        return min((speedup(row, peer) for peer in peers), default=None)

    @property
    def at_most(self) -> bool:
        return self.measure in ("seconds", "hours")

    def met(self, value: float) -> bool:
        return value <= self.bound if self.at_most else value >= self.bound

    def shown(self, value: float) -> str:
        """A value or the bound, with its unit."""
        if self.measure == "ratio":
            return f"{value:.2f}x"
        if self.measure in ("share", "mfu"):
            return f"{value:.0%}"
        if self.at_most:
            return f"{value:.3g} {self.measure}"
        return f"{value:,.0f} {self.measure.removesuffix('_per_second')}/s"


def speedup(ours: Mapping, theirs: Mapping) -> float:
    """How many times faster ours is."""
    key = "samples_per_second"
    if key in ours["extra"] and key in theirs["extra"]:
        return ours["extra"][key] / theirs["extra"][key]
    return theirs["seconds"] / ours["seconds"]


@dataclass(frozen=True)
class Verdict:
    target: Target
    where: str  # benchmark, case, direction and variant; empty where nothing was measured
    value: float | None

    @property
    def met(self) -> bool | None:
        return None if self.value is None else self.target.met(self.value)

    @property
    def distance(self) -> str:
        """By how much it is missed."""
        if self.value is None or self.met:
            return ""
        low, high = sorted((self.value, self.target.bound))
        return f"{high / low - 1:.0%}"


def verdicts(machine: str, part: str, rows: Sequence[Mapping]) -> list[Verdict]:
    """Of every target that applies to the machine and the part."""
    found = []
    for target in TARGETS:
        if target.part == part and fnmatchcase(machine, target.machine):
            found += _judge(target, rows)
    return found


def _judge(target: Target, rows: Sequence[Mapping]) -> list[Verdict]:
    best: dict[str, Verdict] = {}  # by case; under one name where not each counts
    for row in rows:
        value = target.value(row, rows) if target.asks(row) else None
        if value is None:
            continue
        where = f"{row['benchmark']}, {row['case']}, {row['direction']}, {row['variant']}"
        case = f"{row['benchmark']}, {row['case']}, {row['direction']}" if target.each else ""
        worse = best[case].value if case in best else None
        if worse is None or (value < worse if target.at_most else value > worse):
            best[case] = Verdict(target, where, value)
    return list(best.values()) or [Verdict(target, "", None)]


def _train(text: str, case: str, measure: str, bound: float) -> Target:
    return Target(text, "train", "train_recipe", measure, bound, case=case, machine=H100)


def _over_transformers(stage: str, model: str, grouped: bool, bound: float) -> Target:
    order = "grouped by length" if grouped else "random order"
    return Target(
        f"{stage}, {model}: over transformers, padded, {order}",
        "train",
        "train_step",
        "ratio",
        bound,
        case=f"{stage}, {model}, *",
        over="transformers, padded" + (", grouped by length" if grouped else ""),
        machine=CPU,
    )


SMALL, LARGE = "4 layers, 256 wide", "12 layers, 768 wide"
TARGETS = (
    Target(
        "memory-bound kernels at 16,384 tokens reach 85% of the copy (goal 90%)",
        *("kernels", "*", "share", 0.85),
        case="*16384 tokens*",
        ceiling="copy",
        each=True,
    ),
    Target(
        "attention of samples of 300 to 900 tokens over torch's varlen",
        *("kernels", "rotary_attention", "ratio", 1.3),
        case="*(finetune)*",
        over="torch varlen_attn",
        each=True,
    ),
    Target(
        "linear cross-entropy takes at most 1.15x the time of its products",
        *("kernels", "linear_cross_entropy", "share", 1 / 1.15),
        each=True,
    ),
    Target(
        "RMSNorm forward in CUDA reaches 90% of the copy",
        *("kernels", "*rms_norm", "share", 0.90),
        case="*16384 tokens*",
        direction="forward",
        variant="mmalign cuda",
        each=True,
    ),
    Target(
        "RMSNorm backward in CUDA reaches 85% of the copy",
        *("kernels", "*rms_norm", "share", 0.85),
        case="*16384 tokens*",
        direction="backward",
        variant="mmalign cuda",
        each=True,
    ),
    Target(
        "projector + RMSNorm in CUDA over product, scatter and norm apart",
        *("kernels", "project_image_features", "ratio", 1.3),
        direction="forward",
        variant="mmalign cuda",
        over="torch eager*",
    ),
    Target(
        "AdamW in CUDA reaches 90% of the copy",
        *("kernels", "adamw*", "share", 0.90),
        variant="mmalign cuda",
        each=True,
    ),
    Target(
        "attention forward in CUDA over torch's varlen",
        *("kernels", "rotary_attention", "ratio", 1.5),
        case="*(finetune)*",
        direction="forward",
        variant="mmalign cuda",
        over="torch varlen_attn",
    ),
    _train("pretrain-7b: tokens", "pretrain-7b, *bf16", "tokens_per_second", 22_000),
    _train("pretrain-7b: 595k pairs in 2.2 h", "pretrain-7b, *", "samples_per_second", 75),
    _train("pretrain-7b: MFU", "pretrain-7b, *bf16", "mfu", 0.60),
    _train("finetune-7b: tokens", "finetune-7b, *bf16", "tokens_per_second", 15_000),
    _train("finetune-7b: 80k samples in 50 min", "finetune-7b, *", "samples_per_second", 26.7),
    _train("finetune-7b: MFU", "finetune-7b, *bf16", "mfu", 0.60),
    _train("pretrain-7b with FP8: tokens", "pretrain-7b, *fp8", "tokens_per_second", 34_000),
    _train("finetune-7b with FP8: tokens", "finetune-7b, *fp8", "tokens_per_second", 21_000),
    Target(
        "the paper's row, both stages and the evaluation, on one card",
        *("train", "paper_row", "hours", 3.2),
        machine=H100,
    ),
    _over_transformers("pretrain", SMALL, False, 2.5),
    _over_transformers("finetune", SMALL, False, 2.5),
    _over_transformers("finetune", SMALL, True, 2.0),
    _over_transformers("pretrain", LARGE, False, 1.25),
    _over_transformers("finetune", LARGE, False, 1.7),
    _over_transformers("finetune", LARGE, True, 1.25),
    Target(
        "TruthfulQA-mc, 7B",
        *("evaluate", "score_7b", "seconds", 3.0),
        case="truthfulqa*",
        machine=H100,
    ),
    Target(
        "all of ETHICS, 7B", "evaluate", "score_7b", "seconds", 45.0, case="ethics*", machine=H100
    ),
    Target(
        "TruthfulQA-mc over lm-evaluation-harness (goal 20x)",
        *("evaluate", "scoring", "ratio", 15.0),
        case=f"truthfulqa*{LARGE}*",
        over="lm-evaluation-harness",
        machine=CPU,
    ),
    Target(
        "ETHICS over lm-evaluation-harness",
        *("evaluate", "scoring", "ratio", 2.0),
        case=f"ethics*{LARGE}*",
        over="lm-evaluation-harness",
        machine=CPU,
    ),
)
