"""pictures.md: scores with the pictures as they are, beside blind, exchanged and corrupted ones."""

from collections.abc import Mapping
from pathlib import Path

from mmalign.evaluation.items import Items, read_items, read_results
from mmalign.evaluation.metrics import percent, percent_interval
from mmalign.evaluation.report.plots import COLORS, drawing
from mmalign.evaluation.report.tables import make_table, open_console
from mmalign.evaluation.tasks import TASKS, score_rows
from mmalign.files import markdown_table, write_text

_HEADINGS = ("task", "pictures", "n", "score", "95% interval", "best constant", "kept", "lost")
_HEADINGS += ("gained", "yes", "words")
_IN_TERMINAL = ("task", "pictures", "score", "95% interval", "best constant", "lost", "gained")
_NOTES = """\
kept: what is left of the score's distance to the best constant answer, of the pictures as they are;
lost and gained: answers that score less or more than with the pictures as they are. Intervals count
the questions about one picture as one draw. yes: share of yes among the answers that hold yes or
no; words: mean length of an answer. blind: without a picture; mismatched: with another one."""


def write_shown_report(output: Path, folders: Mapping[str, Path]) -> Path:
    """Writes output/pictures.md and, with corruptions, corruptions.png; prints the table.

    folders: name of the way of showing -> its evaluation; "" are the pictures as they are.
    """
    results = {name: read_results(folder) for name, folder in folders.items()}
    items = {name: read_items(folder) for name, folder in folders.items()}
    lines = table_lines(results, items)
    config = results[""]["config"]
    blocks = [
        f"# Questions about pictures: {config['model']}",
        markdown_table(_HEADINGS, lines),
        _NOTES,
        *(f"- {sentence}" for name in results[""] for sentence in _caveats(results[""], name)),
        *(f"- {sentence}" for sentence in ours(results[""])),
        f"template {config['template']}, {config['precision']}; tasks: "
        + "; ".join(f"{name}: {TASKS[name].definition}" for name in items[""]),
    ]
    if any("-" in name for name in folders):
        plot_corruptions(results, output / "corruptions.png")
        blocks.append("![Score against severity](corruptions.png)")
    write_text(output / "pictures.md", "\n\n".join(blocks) + "\n")
    _print(lines, results[""], output)
    return output / "pictures.md"


def table_lines(results: Mapping[str, dict], items: Mapping[str, Items]) -> list[list[str]]:
    """A line for every row of every way of showing."""
    lines, clean = [], score_rows(results[""])
    for name in clean:
        for shown, found in results.items():
            row = score_rows(found)[name]
            best = max(row.get("baselines", {"": 0.0}).values())
            lost, gained = (
                _flips(items[""].get(name), items[shown].get(name)) if shown else ("", "")
            )
            lines.append(
                [
                    name,
                    shown or "own",
                    f"{row['n']:,}",
                    percent(row["acc"]),
                    percent_interval(row["interval"]),
                    percent(best),
                    _kept(row["acc"], clean[name]["acc"], best) if shown else "",
                    *(str(lost), str(gained)),
                    percent(row["yes_rate"]) if "yes_rate" in row else "",
                    f"{row['mean_words']:.1f}" if "mean_words" in row else "",
                ]
            )
    return lines


def _kept(score: float, clean: float, constant: float) -> str:
    """Share of the distance above the constant answer; empty where there was none."""
    return percent((score - constant) / (clean - constant)) if clean > constant else ""


def _flips(clean: list[dict] | None, changed: list[dict] | None) -> tuple[int | str, int | str]:
    """Documents whose score fell, and rose; rows of a part of a task have no items of their own."""
    if clean is None or changed is None:
        return "", ""
    pairs = [(a["score"], b["score"]) for a, b in zip(clean, changed, strict=True)]
    return sum(a > b for a, b in pairs), sum(a < b for a, b in pairs)


def ours(results: dict) -> list[str]:
    """Sentences about log-odds, which are not the benchmarks' own metrics."""
    sentences = []
    for name, row in score_rows(results).items():
        if found := row.get("ours"):
            auroc = "undefined" if found["auroc"] is None else f"{found['auroc']:.3f}"
            sentences.append(
                f"{name}, our own metric: area under the ROC curve of the first word's log-odds of "
                f"yes against no: {auroc} (0.5: no sight, whatever the share of yes)."
            )
    return sentences


def plot_corruptions(results: Mapping[str, dict], path: Path) -> None:
    """Score against severity, a panel for each task and a line for each corruption."""
    clean = {name: score_rows(results[""])[name] for name in results[""] if name in TASKS}
    curves: dict[str, dict[int, dict]] = {}
    for name, found in results.items():
        corruption, _, severity = name.rpartition("-")
        if corruption:
            curves.setdefault(corruption, {})[int(severity)] = score_rows(found)
    size = (4.6 * len(clean) + 1.6, 3.6)
    with drawing(path, size, columns=len(clean)) as (figure, axes):
        for axis, (task, row) in zip(axes[0], clean.items(), strict=True):
            for number, (corruption, rows) in enumerate(curves.items()):
                severities = sorted(rows)
                scores = [100 * x["acc"] for x in (row, *(rows[s][task] for s in severities))]
                style = {"marker": "osD^v"[number // len(COLORS) % 5], "markersize": 4}
                color = COLORS[number % len(COLORS)]
                axis.plot([0, *severities], scores, color=color, label=corruption, **style)
            if constant := row.get("baselines"):
                best = 100 * max(constant.values())
                axis.axhline(best, color="black", linestyle=":", label="best constant answer")
            axis.set_title(task.replace("_", " "))
            axis.set_xlabel("severity")
            axis.set_xticks(range(6))
        axes[0, 0].set_ylabel("score (%)")
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right center", fontsize=8, frameon=False)


def _caveats(results: dict, name: str) -> list[str]:
    return results[name]["caveats"] if name in TASKS else []


def _print(lines: list[list[str]], results: dict, output: Path) -> None:
    console = open_console()
    shown = [_HEADINGS.index(x) for x in _IN_TERMINAL]
    table = make_table(f"[bold]{results['config']['model']}[/bold]", *_IN_TERMINAL)
    for line in lines:
        table.add_row(*(line[i] for i in shown))
    console.print(table)
    for sentence in (x for name in results for x in _caveats(results, name)):
        console.print(f"- {sentence}")
    for sentence in ours(results):
        console.print(f"- {sentence}")
    console.print(f"results: {output / 'results.json'}\nreport:  {output / 'pictures.md'}")
