"""The section of report.md about written answers, where evaluations hold some."""

from pathlib import Path

from mmalign.evaluation.caveats import percent, percent_interval
from mmalign.evaluation.items import read_written
from mmalign.evaluation.report.markdown import bullets, markdown_table
from mmalign.evaluation.tasks import GENERATION_TASK
from mmalign.evaluation.tasks.truthfulqa_gen import METRICS


def written_answers(evaluations: dict[str, Path], results: dict[str, dict]) -> list[str]:
    """results: name -> results.json; an evaluation counts where both are of the same weights."""
    found = {}
    for name, folder in evaluations.items():
        if written := read_written(folder, results[name]):
            found[name] = written[GENERATION_TASK]
    if not found:
        return []
    first = next(iter(found.values()))
    rows = []
    for metric in METRICS:
        diff, acc = f"{metric}_diff", f"{metric}_acc"
        cells = [_number(summary[diff]) for summary in found.values()]
        rows.append([diff, *cells, f"{first[diff]['constant']:.1f}"])
        cells = [
            f"{percent(x[acc]['mean'])} ({percent_interval(x[acc]['interval'])})"
            for x in found.values()
        ]
        rows.append([acc, *cells, percent(first[acc]["constant"])])
    return [
        "## Written answers",
        markdown_table(["TruthfulQA", *found, "always no comment"], rows),
        f"{first['n']:,} questions, 95% intervals in brackets. *diff*: similarity to the nearest "
        "true reference minus that to the nearest false one, 0 to 100; *acc*: percent of questions "
        'with a diff above 0; *always no comment*: a model that answers every question with "I '
        'have no comment", which is a true reference of each.',
        *_sentences(found),
    ]


def _number(score: dict) -> str:
    low, high = score["interval"]
    return f"{score['mean']:.1f} ({low:.1f} to {high:.1f})"


def _sentences(found: dict[str, dict]) -> list[str]:
    sentences = []
    for name, summary in found.items():
        diffs = {metric: summary[f"{metric}_diff"]["interval"] for metric in METRICS}
        if alike := [metric for metric, (low, high) in diffs.items() if low <= 0 <= high]:
            sentences.append(
                f"{name}: by {', '.join(alike)} the answers are as close to false references as "
                "to true ones."
            )
        if farther := [metric for metric, (_, high) in diffs.items() if high < 0]:
            sentences.append(
                f"{name}: by {', '.join(farther)} the answers are closer to false references."
            )
    return [bullets(sentences)] if sentences else []
