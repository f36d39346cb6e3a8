"""The sections of report.md about training: losses, scores at each step, settings."""

import statistics
from collections.abc import Mapping
from pathlib import Path

from mmalign.errors import UserError
from mmalign.evaluation.caveats import percent, percent_interval
from mmalign.evaluation.items import read_results
from mmalign.evaluation.metrics import task_results
from mmalign.evaluation.report.markdown import markdown_table


def training(runs: dict[str, dict], figure: str) -> list[str]:
    rows = []
    for name, run in runs.items():
        metrics = run["metrics"]
        tail = metrics[-max(1, len(metrics) // 20) :]  # the last 5% of the steps
        rows.append(
            [
                name,
                f"{metrics[-1]['step']:,}",
                f"{sum(m['samples'] for m in metrics):,}",
                f"{sum(m['tokens'] for m in metrics):,}",
                f"{metrics[0]['loss']:.3f}",
                f"{statistics.fmean(m['loss'] for m in tail):.3f}",
                f"{statistics.median(m['tokens_per_second'] for m in metrics):,.0f}",
            ]
        )
    headings = ["stage", "steps", "samples", "tokens", "first loss", "last loss", "tokens/s"]
    note = "Last loss: mean of the last 5% of the steps. Tokens/s: median over the steps."
    return ["## Training", f"![Loss and speed]({figure})", markdown_table(headings, rows), note]


def read_curve(folder: Path) -> dict[int, dict]:
    """Step -> results.json of the run's evaluations on its fixed documents; {} without any."""
    found = {}
    for path in (folder / "evaluation").glob("step_*"):
        if (path / "results.json").exists():  # a killed run can leave one without
            found[int(path.name[5:])] = read_results(path)
    curve = dict(sorted(found.items()))
    asked = {(x["config"]["limit"], *task_results(x)) for x in curve.values()}
    if len(asked) > 1:
        raise UserError(f"{folder / 'evaluation'}: the steps were scored on different documents")
    return curve


def score_curve(name: str, run: dict, curve: Mapping[int, dict], figure: str) -> list[str]:
    """Scores of a run at each step that was evaluated."""
    first, last = next(iter(curve.values())), list(curve.values())[-1]
    tasks = task_results(first)
    rows = [["documents", *(f"{x['n']:,}" if "n" in x else "" for x in tasks.values())]]
    rows.append(["chance", *(percent(summary["chance"]) for summary in tasks.values())])
    for step, results in curve.items():
        label = f"step {step:,}" if step else "base model"
        rows.append([label, *(percent(results[task]["acc"]) for task in tasks)])
    for i, task in enumerate(tasks, start=1):
        rows[-1][i] = f"**{rows[-1][i]}** ({percent_interval(last[task]['interval'])})"
    blocks = [
        f"## Scores during {name}",
        f"![Score against step; dashed: the base model]({figure})",
        markdown_table(["", *tasks], rows),
    ]
    return blocks + [_cost(run, curve, first["config"]["limit"])]


def _cost(run: dict, curve: Mapping[int, dict], limit: int) -> str:
    seconds = [m["evaluation_seconds"] for m in run["metrics"] if "evaluation_seconds" in m]
    spent = sum(seconds) + curve.get(0, {"seconds": {"score": 0}})["seconds"]["score"]
    trained = sum(m.get("seconds", 0) for m in run["metrics"])
    share = percent(spent / (spent + trained))
    return (
        f"The first {limit:,} documents of each task; band: 95% interval. Base model: before the "
        f"first step, in the precision of training. Evaluation took {spent:,.1f} s, {share}% of "
        "the time of training and evaluation, all documents at the end included."
    )


_STAGE_SETTINGS = {
    "decoder": "model.decoder",
    "vision tower": "model.vision_tower",
    "projector": "model.projector",
    "data": "data.path",
    "template": "data.template",
    "image tokens wrapped": "data.use_im_start_end",
    "text only": "data.text_only",
    "LoRA rank": "lora.rank",
    "global batch": "global_batch_size",
    "learning rate": "optimizer.learning_rate",
    "warm-up ratio": "optimizer.warmup_ratio",
    "precision": "precision",
    "seed": "seed",
    "git commit": "versions.git_commit",
    "PyTorch": "versions.torch",
    "device": "versions.device",
}


def settings(stages: dict[str, Path], runs: dict[str, dict]) -> list[str]:
    rows = [
        [label, *(_lookup(run["config"], key) for run in runs.values())]
        for label, key in _STAGE_SETTINGS.items()
    ]
    rows.append(["run folder", *(f"`{folder}`" for folder in stages.values())])
    return ["## Settings of training", markdown_table(["training", *runs], rows, ":---")]


def _lookup(config: dict, key: str) -> object:
    for name in key.split("."):
        config = config.get(name) if isinstance(config, dict) else None
    return "" if config is None else config
