"""The sections of report.md about scores, each a list of Markdown blocks."""

from mmalign.evaluation.caveats import percent, percent_interval
from mmalign.evaluation.metrics import task_results
from mmalign.evaluation.report.markdown import bullets, cell, markdown_table
from mmalign.evaluation.report.tables import (
    COMPARISON_HEADINGS,
    comparison_row,
    first_flipped,
    is_resolved,
)
from mmalign.evaluation.statistics import wilson_interval

_FLIPPED_SHOWN = 2  # documents of each task that turned wrong, and as many that turned right


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
        rows.append([task, n, *cells, percent(first[task]["chance"]), _constant(first[task])])
    headings = ["task", "n", *results, "chance", "constant answers"]
    blocks.append(markdown_table(headings, rows))
    blocks.append(
        "Percent, 95% interval in brackets. *constant answers*: the score on the same documents of "
        "a model that gives this one answer, or the shortest choice, to every document."
    )
    blocks += _by_label(results)
    blocks += _answers(results, first)
    blocks += _lengths(results)
    blocks += _notes(results)
    return blocks


def _constant(summary: dict) -> str:
    baselines = summary.get("baselines", {})
    return ", ".join(f"{name} {percent(value)}" for name, value in baselines.items())


def _by_label(results: dict[str, dict]) -> list[str]:
    found = {name: r["truthfulqa_mc2"] for name, r in results.items() if "truthfulqa_mc2" in r}
    if not found:
        return []
    scores = [f"{name} {percent(summary['acc_by_label'])}" for name, summary in found.items()]
    chance = percent(next(iter(found.values()))["chance_by_label"])
    return [
        "*truthfulqa_mc2* takes the choices before the first false one as the true ones, as the "
        "harness of 2023 did. By label, as lm-eval has done since its version 3: "
        f"{', '.join(scores)}, chance {chance}."
    ]


def _lengths(results: dict[str, dict]) -> list[str]:
    """Mean tokens of the choices: a sum of log-probabilities falls with every further token."""
    found: dict[tuple, list[str]] = {}  # models whose tokenizers agree share a column
    for name, result in results.items():
        lengths = tuple(
            (task, ", ".join(f"{what} {mean:.1f}" for what, mean in s["choice_tokens"].items()))
            for task, s in task_results(result).items()
            if "choice_tokens" in s
        )
        found.setdefault(lengths, []).append(name)
    tasks = list(dict.fromkeys(task for lengths in found for task, _ in lengths))
    columns = [dict(lengths) for lengths in found]
    rows = [[task, *(column.get(task, "") for column in columns)] for task in tasks]
    note = (
        "Mean length of the choices. A score is a sum over tokens, not divided by their number: "
        "where one answer is longer, a model that knows nothing prefers the other."
    )
    headings = ["tokens of a choice", *(", ".join(names) for names in found.values())]
    return [markdown_table(headings, rows, ":---"), note]


def _notes(results: dict[str, dict]) -> list[str]:
    """The remarks of every evaluation, under the model's name."""
    blocks = []
    for name, result in results.items():
        sentences = [s for found in task_results(result).values() for s in found["remarks"]]
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
    return ["## Differences", *blocks, note, *_settings_differ(base, comparisons)]


def _settings_differ(base: str, comparisons: dict[str, dict]) -> list[str]:
    sentences = [
        f"{key}: {base} {a}, {name} {b}"
        for name, comparison in comparisons.items()
        for key, (a, b) in comparison["settings"].items()
    ]
    return ["Not the same in both evaluations:", bullets(sentences)] if sentences else []


def flipped(base: str, comparisons: dict[str, dict], files: dict[str, str]) -> list[str]:
    """Some documents that turned wrong or right, of each task; files: name -> the whole list."""
    blocks = []
    for name, comparison in comparisons.items():
        rows = [_flipped_row(doc) for doc in first_flipped(comparison["flipped"], _FLIPPED_SHOWN)]
        if rows:
            total = len(comparison["flipped"])
            headings = ["task", "document", "text", "right answer", f"{base} said", f"{name} said"]
            blocks.append(
                f"{total:,} documents turned wrong or right from {base} to {name}; the first ones "
                f"of each task (all, with their whole text: [{files[name]}]({files[name]})):"
            )
            blocks.append(markdown_table(headings, rows, ":---"))
    return ["## Documents that flipped", *blocks] if blocks else []


def _flipped_row(document: dict) -> list[object]:
    choices = [cell(choice, 120) for choice in document["choices"]]
    said = [choices[document[key]] for key in ("gold", "prediction_a", "prediction_b")]
    question = document["context"].rpartition("\n\n")[2]  # few-shot questions stand before it
    return [document["task"], document["doc_id"], cell(question, 240), *said]


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
