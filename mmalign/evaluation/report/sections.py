"""The sections of report.md, each a list of Markdown blocks."""

import statistics
from collections.abc import Mapping
from pathlib import Path

from mmalign.evaluation.items import Items
from mmalign.evaluation.metrics import percent, percent_interval
from mmalign.evaluation.report.tables import (
    COMPARISON_HEADINGS,
    bullets,
    cell,
    comparison_row,
    config_rows,
    first_flipped,
    is_resolved,
    shortened,
    stage_rows,
)
from mmalign.evaluation.tasks import ENTRIES, TASKS, score_rows
from mmalign.files import markdown_table

_FLIPPED_SHOWN = 2  # documents of each task that became wrong, and as many that became right
_LONGEST = 1200  # characters of an example

Results = Mapping[str, dict]  # name of the model -> results.json


def summary(base: str, comparisons: Mapping[str, dict]) -> list[str]:
    """The outcome in sentences."""
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
                f"No difference between {name} and {base} can be distinguished from zero on "
                f"{', '.join(unresolved)}."
            )
    return [bullets(sentences)] if sentences else []


# ---- scores ----


def scores(results: Results, figure: str) -> list[str]:
    rows = {name: score_rows(result) for name, result in results.items()}
    first: dict[str, dict] = {}  # what belongs to the documents is the same for all models
    for found in rows.values():
        first = found | first
    order = [row for row in _all_rows(results) if row in first]
    lines = []
    for task in order:
        cells = [_score(found.get(task)) for found in rows.values()]
        n = f"{first[task]['n']:,}" if "n" in first[task] else ""
        chance = percent(first[task]["chance"]) if "chance" in first[task] else ""
        lines.append([task, n, *cells, chance, _constant(first[task])])
    return [
        "## Scores",
        f"![Scores with chance levels and constant answers]({figure})",
        markdown_table(["task", "n", *results, "chance", "constant answers and rules"], lines),
        "Percent, 95% interval in brackets. *constant answers*: the score on the same documents of "
        "a model that gives this one answer, or the shortest choice, to every document; *rules* "
        "read the choices but not the question (see below).",
        *_answers(rows, {task: first[task] for task in order}),
        *_lengths(rows),
        *_caveats(results),
    ]


def _all_rows(results: Results) -> list[str]:
    """Rows of all models in the order of tables."""
    rows = {}
    for name, entry in ENTRIES.items():
        for result in results.values():
            if name in result:
                rows |= entry.rows(result[name])
    return list(rows)


def _score(row: dict | None) -> str:
    if row is None:
        return ""
    return f"**{percent(row['acc'])}** ({percent_interval(row['interval'])})"


def _constant(row: dict) -> str:
    baselines = row.get("baselines", {})
    rules = {name: x["acc"] for name, x in row.get("rules", {}).items() if x["n"] == row["n"]}
    return ", ".join(f"{name} {percent(value)}" for name, value in (baselines | rules).items())


def _answers(rows: Mapping[str, dict], first: dict[str, dict]) -> list[str]:
    """How often each model says yes, and grouped exact match."""
    lines = []
    shown = [task for task in first if "gold_yes_rate" in first[task]]
    for task in shown:
        found = [model.get(task, {}) for model in rows.values()]
        em_chance = first[task].get("em_chance")
        lines.append(
            [task, percent(first[task]["gold_yes_rate"])]
            + [percent(row["yes_rate"]) if row else "" for row in found]
            + [percent(row["em"]) if row.get("em") is not None else "" for row in found]
            + ["" if em_chance is None else percent(em_chance)]
        )
    if not lines:
        return []
    headings = ["answers", "yes is right", *(f"{name} says yes" for name in rows)]
    headings += [*(f"{name} em" for name in rows), "em by chance"]
    grouped = (task for task in shown if task in TASKS and TASKS[task].group_size)
    sizes = [f"{TASKS[task].group_size} in {task}" for task in grouped]
    blocks = [markdown_table(headings, lines)]
    if sizes:
        every = f"documents right ({', '.join(sizes)})"
        blocks.append(f"*em*: percent of scenarios with all of their {every}.")
    return blocks


def _lengths(rows: Mapping[str, dict]) -> list[str]:
    """Mean tokens per choice: a sum of log-probabilities falls with every further token."""
    found: dict[tuple, list[str]] = {}  # models whose tokenizers agree share a column
    for name, model in rows.items():
        lengths = tuple(
            (task, ", ".join(f"{what} {mean:.1f}" for what, mean in row["choice_tokens"].items()))
            for task, row in model.items()
            if "choice_tokens" in row
        )
        found.setdefault(lengths, []).append(name)
    tasks = list(dict.fromkeys(task for lengths in found for task, _ in lengths))
    if not tasks:
        return []
    columns = [dict(lengths) for lengths in found]
    lines = [[task, *(column.get(task, "") for column in columns)] for task in tasks]
    note = (
        "Mean length of the choices. A score is a sum over tokens, not divided by their number: "
        "where one answer is longer, a model that knows nothing prefers the other."
    )
    headings = ["tokens per choice", *(", ".join(names) for names in found.values())]
    return [markdown_table(headings, lines, ":---"), note]


def _caveats(results: Results) -> list[str]:
    blocks = []
    for name, result in results.items():
        sentences = [x for task in ENTRIES if task in result for x in result[task]["caveats"]]
        if sentences:
            blocks += [f"Scores of **{name}** to read with care:", bullets(sentences)]
    return blocks


# ---- differences ----


def differences(base: str, comparisons: Mapping[str, dict]) -> list[str]:
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
    how = next(iter(comparisons.values()))["method"]
    note = (
        "Points, bold where the interval excludes zero. *lost, gained*: documents that became "
        f"wrong, became right. Intervals: {how}."
    )
    settings = [
        f"{key}: {base} {a}, {name} {b}"
        for name, comparison in comparisons.items()
        for key, (a, b) in comparison["settings"].items()
    ]
    differ = ["Settings that differ between the evaluations:", bullets(settings)]
    return ["## Differences", *blocks, note, *(differ if settings else [])]


def flipped(base: str, comparisons: Mapping[str, dict], files: Mapping[str, str]) -> list[str]:
    """Some documents of each task that became wrong or right; files: name -> the whole list."""
    blocks = []
    for name, comparison in comparisons.items():
        rows = [_flipped_row(doc) for doc in first_flipped(comparison["flipped"], _FLIPPED_SHOWN)]
        if rows:
            total = len(comparison["flipped"])
            headings = ["task", "document", "text", "right answer", f"{base} said", f"{name} said"]
            blocks.append(
                f"{total:,} documents became wrong or right from {base} to {name}; the first ones "
                f"of each task (all, with their full text: [{files[name]}]({files[name]})):"
            )
            blocks.append(markdown_table(headings, rows, ":---"))
    return ["## Documents that flipped", *blocks] if blocks else []


def _flipped_row(document: dict) -> list[object]:
    choices = [cell(choice, 120) for choice in document["choices"]]
    said = [choices[document[key]] for key in ("gold", "prediction_a", "prediction_b")]
    question = document["context"].rpartition("\n\n")[2]  # few-shot questions precede it
    return [document["task"], document["doc_id"], cell(question, 240), *said]


# ---- training ----


def training(runs: Mapping[str, dict], figure: str) -> list[str]:
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


def score_curve(name: str, run: dict, curve: Mapping[int, dict], figure: str) -> list[str]:
    """Scores of a run at each step that was evaluated."""
    scored = {step: score_rows(results) for step, results in curve.items()}
    first, last = next(iter(scored.values())), list(scored.values())[-1]
    rows = [["documents", *(f"{row['n']:,}" if "n" in row else "" for row in first.values())]]
    rows.append(["chance", *(percent(row["chance"]) for row in first.values())])
    for step, found in scored.items():
        label = f"step {step:,}" if step else "base model"
        rows.append([label, *(percent(found[task]["acc"]) for task in first)])
    for i, task in enumerate(first, start=1):
        rows[-1][i] = f"**{rows[-1][i]}** ({percent_interval(last[task]['interval'])})"
    return [
        f"## Scores during {name}",
        f"![Score against step; dashed: the base model]({figure})",
        markdown_table(["", *first], rows),
        _cost(run, curve, next(iter(curve.values()))["config"]["limit"]),
    ]


def _cost(run: dict, curve: Mapping[int, dict], limit: int) -> str:
    seconds = [m["evaluation_seconds"] for m in run["metrics"] if "evaluation_seconds" in m]
    spent = sum(seconds) + curve.get(0, {"seconds": {"score": 0}})["seconds"]["score"]
    trained = sum(m.get("seconds", 0) for m in run["metrics"])
    share = percent(spent / (spent + trained))
    return (
        f"The first {limit:,} documents of each task; band: 95% interval. Base model: before the "
        f"first step, in the precision of training. Evaluation took {spent:,.1f} s, {share}% of "
        "the time of training and evaluation, including all documents at the end."
    )


def settings(stages: Mapping[str, Path], runs: Mapping[str, dict]) -> list[str]:
    rows = stage_rows({name: run["config"] for name, run in runs.items()})
    rows.append(["run folder", *(f"`{folder}`" for folder in stages.values())])
    return ["## Settings of training", markdown_table(["training", *runs], rows, ":---")]


# ---- how the scores were computed ----


def method(results: Results, items: Items) -> list[str]:
    """items: of any of the models, for the examples."""
    configs = {name: result["config"] for name, result in results.items()}
    scored = [name for name in ENTRIES if any(name in result for result in results.values())]
    rows = [row for result in results.values() for row in score_rows(result).values()]
    definitions = [f"**{name}**: {ENTRIES[name].definition}" for name in scored]
    definitions.append(
        "**ties**: the first of the most likely choices; of two fixed answers, no or unreasonable"
    )
    definitions.append(f"**intervals**: {'; '.join(sorted({x['interval_method'] for x in rows}))}")
    return [
        "## How the scores were computed",
        bullets(definitions),
        markdown_table(["evaluation", "value"], config_rows(configs), ":---"),
        "One document of each prompt, with the choices that are scored after it, or the model's "
        "own answer:",
        *_examples(items),
    ]


def _examples(items: Items) -> list[str]:
    """The shortest prompt of each task, once where several tasks share it."""
    blocks: dict[str, str] = {}
    for task, rows in items.items():
        item = min(rows, key=lambda item: len(TASKS[task].example(item)[0]))
        prompt, answers = TASKS[task].example(item)
        shown = "\n".join(map(repr, answers))
        text = f"~~~~\n{shortened(prompt, _LONGEST)}\n\n{shown}\n~~~~"
        blocks.setdefault(prompt, f"{task}, document {item['doc_id']}:\n\n{text}")
    return list(blocks.values())
