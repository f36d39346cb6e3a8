"""The sections of report.md, each a list of Markdown blocks."""

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

from mmalign.evaluation.intervals import wilson_interval
from mmalign.evaluation.metrics import task_results
from mmalign.evaluation.remarks import percent, percent_interval
from mmalign.evaluation.tables import (
    COMPARISON_HEADINGS,
    comparison_row,
    constant_answers,
    is_resolved,
)


def markdown_table(
    headings: Sequence[str], rows: Iterable[Sequence[object]], rest: str = "---:"
) -> str:
    """First column to the left, the rest to the right unless said otherwise."""
    lines = [headings, [":---"] + [rest] * (len(headings) - 1), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def bullets(sentences: Iterable[str]) -> str:
    return "\n".join(f"- {sentence}" for sentence in sentences)


def summary(base: str, comparisons: dict[str, dict], visual: dict | None) -> list[str]:
    """What came out, in sentences."""
    sentences = []
    for name, comparison in comparisons.items():
        rows = comparison["tasks"]
        for task in filter(lambda task: is_resolved(rows[task]), rows):
            low, high = (100 * bound for bound in rows[task]["interval"])
            sentences.append(
                f"**{task}**: {name} {percent(rows[task]['acc_b'])} against {base} "
                f"{percent(rows[task]['acc_a'])}, a difference of "
                f"{100 * rows[task]['difference']:+.1f} points (95% {low:+.1f} to {high:+.1f})."
            )
        if unresolved := [task for task in rows if not is_resolved(rows[task])]:
            sentences.append(
                f"No difference between {name} and {base} can be told from zero on "
                f"{', '.join(unresolved)}."
            )
    if visual:
        sentences.append(
            f"Questions about images never seen in training: {percent(visual['tuned'])}% right "
            f"with the picture, {percent(visual['blind'])}% without it (blind), "
            f"{percent(visual['chance'])}% by chance ({visual['n']:,} questions)."
        )
    return [bullets(sentences)] if sentences else []


def scores(results: dict[str, dict], figure: str) -> list[str]:
    blocks = ["## Scores", f"![Scores with chance levels and constant answers]({figure})"]
    tasks = list(dict.fromkeys(t for r in results.values() for t in task_results(r)))
    first = {task: next(r[task] for r in results.values() if task in r) for task in tasks}
    rows = []
    for task in tasks:
        cells = [_score(result.get(task)) for result in results.values()]
        n = f"{first[task]['n']:,}" if "n" in first[task] else ""
        rows.append(
            [task, n, *cells, percent(first[task]["chance"]), constant_answers(first[task])]
        )
    headings = ["task", "n", *results, "chance", "always yes / no"]
    blocks.append(markdown_table(headings, rows))
    blocks.append(
        "Percent, 95% interval in brackets. *always yes / no*: the score of a model that gives "
        "this one answer to every document (in deontology and justice: reasonable / unreasonable)."
    )
    blocks += _answers(results, first)
    blocks += _notes(results)
    return blocks


def _notes(results: dict[str, dict]) -> list[str]:
    """The remarks of every evaluation, under the model's name."""
    blocks = []
    for name, result in results.items():
        sentences = [s for task in result for s in result[task].get("remarks", ())]
        if sentences:
            blocks += [f"Scores of **{name}** to read with care:", bullets(sentences)]
    return blocks


def _score(result: dict | None) -> str:
    if result is None:
        return ""
    return f"**{percent(result['acc'])}** ({percent_interval(result['interval'])})"


def _answers(results: dict[str, dict], first: dict[str, dict]) -> list[str]:
    """How often each model says yes, and grouped exact match."""
    rows = []
    for task in (task for task in first if "gold_yes_rate" in first[task]):
        shown = [result.get(task, {}) for result in results.values()]
        em_chance = first[task].get("em_chance")
        rows.append(
            [task, percent(first[task]["gold_yes_rate"])]
            + [percent(s["yes_rate"]) if s else "" for s in shown]
            + [percent(s["em"]) if s.get("em") is not None else "" for s in shown]
            + ["" if em_chance is None else percent(em_chance)]
        )
    if not rows:
        return []
    headings = ["answers", "yes is right", *(f"{name} says yes" for name in results)]
    headings += [*(f"{name} em" for name in results), "em by chance"]
    note = (
        "*em*: percent of scenarios with all of their 4 (deontology, justice) or 5 (virtue) "
        "documents right."
    )
    return [markdown_table(headings, rows), note]


def differences(base: str, comparisons: dict[str, dict]) -> list[str]:
    blocks = []
    for name, comparison in comparisons.items():
        headings = ["task", base, name, f"{name} - {base}", *COMPARISON_HEADINGS[3:]]
        rows = [comparison_row(task, row) for task, row in comparison["tasks"].items()]
        for cells, row in zip(rows, comparison["tasks"].values(), strict=True):
            if is_resolved(row):
                cells[3] = f"**{cells[3]}**"
        blocks.append(markdown_table(headings, rows))
    if not blocks:
        return []
    method = next(iter(comparisons.values()))["method"]
    note = (
        f"Points, bold where the interval leaves out zero. *lost, gained*: documents that turned "
        f"wrong, turned right. Intervals: {method}."
    )
    return ["## Differences", *blocks, note]


_SIGHT = {
    "tuned": "with the picture",
    "blind": "without it (blind)",
    "misled": "with another picture",
    "majority": "most frequent answer",
    "chance": "chance",
}


def visual_questions(visual: dict) -> list[str]:
    columns = {key: label for key, label in _SIGHT.items() if key in visual}
    rows = []
    for kind, found in {"all": visual, **visual.get("kinds", {})}.items():
        cells = {key: percent(found[key]) for key in columns}
        if kind == "all":
            for key in ("tuned", "blind", "misled"):  # the model's own answers
                if key in cells:
                    interval = wilson_interval(visual[key], visual["n"])
                    cells[key] = f"**{cells[key]}** ({percent_interval(interval)})"
        rows.append([kind, f"{found['n']:,}", *cells.values()])
    return [
        "## Seeing",
        "Held-out questions about images that training never showed; percent right, 95% Wilson "
        "interval in brackets. A model that has only learned how answers are spread does as well "
        "without the picture.",
        markdown_table(["questions", "n", *columns.values()], rows),
    ]


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


def settings(stages: dict[str, Path], runs: dict[str, dict], results: dict[str, dict]) -> list[str]:
    blocks = ["## Settings"]
    if runs:
        rows = [
            [label, *(_lookup(run["config"], key) for run in runs.values())]
            for label, key in _STAGE_SETTINGS.items()
        ]
        rows.append(["run folder", *(f"`{folder}`" for folder in stages.values())])
        blocks.append(markdown_table(["training", *runs], rows, ":---"))
    if results:
        configs = {name: result["config"] for name, result in results.items()}
        blocks.append(markdown_table(["evaluation", "value"], _evaluation_rows(configs), ":---"))
    return blocks


def _evaluation_rows(configs: dict[str, dict]) -> list[list[object]]:
    """One row a setting; where the evaluations differ, each value with the model's name."""
    keys = ("model", "prompts", "bos", "score", "limit", "precision", "max_length", "num_requests")
    values = {key: [config[key] for config in configs.values()] for key in keys}
    for file in dict.fromkeys(f for config in configs.values() for f in config["data_files"]):
        facts = [config["data_files"].get(file, {}) for config in configs.values()]
        values[file] = [
            f"sha256 `{fact['sha256'][:16]}` {fact.get('variant', '')}".strip()
            if fact
            else "not scored"
            for fact in facts
        ]
    rows = []
    for key, found in values.items():
        if all(value == found[0] for value in found):
            rows.append([key, "all documents" if found[0] is None else found[0]])
        else:
            named = zip(configs, found, strict=True)
            rows.append([key, "; ".join(f"{name}: {value}" for name, value in named)])
    return rows


def _lookup(config: dict, key: str) -> object:
    for name in key.split("."):
        config = config.get(name) if isinstance(config, dict) else None
    return "" if config is None else config
