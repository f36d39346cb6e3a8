"""The section of metrics beside the tasks' own, and of rules that never read the question."""

import csv
from collections.abc import Mapping
from pathlib import Path

from mmalign.evaluation.beside import METHOD
from mmalign.evaluation.metrics import percent
from mmalign.evaluation.report.tables import bullets, is_resolved, rule_cell
from mmalign.evaluation.tasks import ENTRIES, MEANS, TASKS, score_rows
from mmalign.files import markdown_table, replacing

# in the order of columns
DEFINITIONS = {
    "length_normalised": "scores are log-probabilities per token, not sums",
    "sharpness_matched": "log-likelihoods divided by the one temperature at which the choices have "
    "the mean entropy that they have under the base model",
    "answers_only": "the choices after the same examples but without the question: style alone",
    "pmi": "scores with the question minus scores without it (pointwise mutual information)",
    "binary": "the best true choice against the first false one; chance 50",
    "auroc": "area under the ROC curve of the log-odds of yes; a constant bias cancels",
    "balanced": "mean of the accuracies on documents where yes and where no is right",
    "shifted": "accuracy with the threshold of the log-odds that fits the other half best",
    "per_token": "accuracy with log-probabilities per token, not sums",
    "ranked": "scenarios whose one true trait has the largest log-odds of yes; chance 20",
    "short": "accuracy on texts of one or two sentences",
    "long": "accuracy on posts of several paragraphs",
}
_ELSEWHERE = {"", "em", "yes_rate"}  # the score itself, and the table of answers
Results = Mapping[str, dict]  # name of the model -> results.json
Comparisons = Mapping[str, dict]  # name of the model -> its comparison with the base


def beside(base: str, results: Results, comparisons: Comparisons) -> list[str]:
    """A table for each group of tasks; under each model its difference to the base."""
    groups: dict[str, list[str]] = {}
    for task in _tasks(results, comparisons):
        groups.setdefault(_group(task), []).append(task)
    blocks, shown = [], set()
    for group, tasks in groups.items():
        lines = [line for task in tasks for line in _lines(task, base, results, comparisons)]
        found = dict.fromkeys(kind for _, _, cells in lines for kind in cells)
        kinds = [x for x in {**DEFINITIONS, **found} if x in found and x not in _ELSEWHERE]
        shown |= set(kinds)
        headings = [group, "", "as scored", *(kind.replace("_", " ") for kind in kinds)]
        rows = [
            [task, who, *(cells.get(kind, "") for kind in ("", *kinds))]
            for task, who, cells in lines
        ]
        blocks.append(markdown_table(headings, rows))
    if not blocks:
        return []
    definitions = [f"*{x.replace('_', ' ')}*: {y}" for x, y in DEFINITIONS.items() if x in shown]
    note = f"Percent; differences in points, bold where the 95% interval excludes zero ({METHOD})."
    return [
        "## Scores that resist artefacts",
        *blocks,
        note,
        bullets(definitions),
        *_missing(base, comparisons),
        *_style(base, comparisons),
        *_rules(results),
    ]


def _tasks(results: Results, comparisons: Comparisons) -> list[str]:
    have = {x for found in results.values() for x in ENTRIES if "beside" in found.get(x, {})}
    have |= {x for comparison in comparisons.values() for x in comparison["beside"]}
    return [x for x in ENTRIES if x in have]


def _group(name: str) -> str:
    return TASKS[MEANS[name].members[0] if name in MEANS else name].group


def _lines(
    task: str, base: str, results: Results, comparisons: Comparisons
) -> list[tuple[str, str, dict[str, str]]]:
    """(task, model or difference, cells by kind); "" is the kind of the score itself."""
    lines = []
    for model, found in results.items():
        if task not in found:
            continue
        rows = {"": found[task]} | found[task].get("beside", {})
        cells = {kind: percent(row["acc"]) for kind, row in rows.items()}
        changes = _changes(task, comparisons.get(model))
        # the comparison also knows what an older version did not write to results.json
        known = changes or _changes(task, *comparisons.values())
        acc = "acc_b" if changes else "acc_a"
        cells = {kind: percent(row[acc]) for kind, row in known.items()} | cells
        lines.append((task, model, cells))
        if changes:
            differences = {kind: _difference(row) for kind, row in changes.items()}
            lines.append((task, f"{model} - {base}", differences))
    return lines


def _changes(task: str, *comparisons: dict | None) -> dict[str, dict]:
    """Rows of the comparisons by kind."""
    rows: dict[str, dict] = {}
    for comparison in filter(None, comparisons):
        own = comparison["tasks"].get(task)
        rows |= ({"": own} if own else {}) | comparison["beside"].get(task, {})
    return rows


def _difference(row: dict) -> str:
    text = f"{100 * row['difference']:+.1f}"
    return f"**{text}**" if is_resolved(row) else text


def _missing(base: str, comparisons: Comparisons) -> list[str]:
    sentences = [
        f"Not compared between {name} and {base}, because one of the evaluations is older or lacks "
        f"documents of both answers: {', '.join(comparison['beside_only_in_one'])}. Evaluate again "
        "to have them."
        for name, comparison in comparisons.items()
        if comparison["beside_only_in_one"]
    ]
    return [bullets(sentences)] if sentences else []


def _style(base: str, comparisons: Comparisons) -> list[str]:
    rows = [
        [name, style, *("" if r is None else f"{r:+.2f}" for r in found.values())]
        for name, comparison in comparisons.items()
        for style, found in comparison["gain_and_style"].items()
    ]
    if not rows:
        return []
    return [
        markdown_table(["model", "style", "r over documents", "r over choices"], rows),
        f"Correlation of TruthfulQA-mc2's gain over {base} with style. *over documents*: gain in "
        "score against how much longer (in tokens) the true choices are than the false ones, or "
        'how many more of them hedge (open with a denial, "It depends" or "I have no comment"). '
        "*over choices*: gain in log-probability against the choice's length or hedging, both "
        "relative to the document's mean.",
    ]


def _rules(results: Results) -> list[str]:
    """The rules depend on the documents and the tokenizer only, so on one model's evaluation."""
    rows: dict[str, dict] = {}
    for found in results.values():
        rows = {task: row for task, row in score_rows(found).items() if row.get("rules")} | rows
    if not rows:
        return []
    names = dict.fromkeys(name for row in rows.values() for name in row["rules"])
    lines = [["uniform", *(percent(row["chance"]) for row in rows.values())]]
    lines += [[name, *(rule_cell(row, name) for row in rows.values())] for name in names]
    return [
        markdown_table(["rule without the question", *rows], lines),
        "What rules score that read the choices but not the question; in brackets how many "
        "documents a rule answers, where not all. *least overlap*: the choice that shares the "
        "fewest words with the others; *only negation*: the only choice with a negation; *per "
        "token*: the score of a choice is this number times its tokens. Ties are shared.",
    ]


def write_beside(path: Path, results: Results) -> None:
    """One line for each model, task and kind; shares, 0 to 1."""
    with replacing(path, newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("model", "task", "metric", "n", "acc", "low", "high"))
        for model, found in results.items():
            for task in (x for x in ENTRIES if "beside" in found.get(x, {})):
                for kind, row in found[task]["beside"].items():
                    numbers = (row.get("n", ""), row["acc"], *row["interval"])
                    writer.writerow((model, task, kind, *numbers))
                for name, row in found[task].get("rules", {}).items():
                    writer.writerow((model, task, f"rule: {name}", row["n"], row["acc"], "", ""))
