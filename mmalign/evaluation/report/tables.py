"""Results and comparisons on the terminal."""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mmalign.evaluation.caveats import percent, percent_interval
from mmalign.evaluation.metrics import task_results
from mmalign.evaluation.report.markdown import abridged

_PIPE_WIDTH = 108  # columns where the output is not a terminal


def open_console() -> Console:
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=_PIPE_WIDTH)


def make_table(title: str, *headings: str) -> Table:
    """First column to the left, numbers to the right."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1))
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="right" if i else "left", no_wrap=True)
    return table


def print_results(results: dict, output: Path) -> None:
    """Every score with its interval, chance level and constant answers beside it."""
    console, config = open_console(), results["config"]
    headings = ("n", "score", "95% interval", "chance", "always yes/no", "yes-rate", "em (chance)")
    table = make_table(f"[bold]{config['model']}[/bold]", "task", *headings)
    tasks = task_results(results)
    for name, summary in tasks.items():
        table.add_row(*result_row(name, summary), end_section=name == "truthfulqa_mc2")
    console.print(table)
    for summary in tasks.values():
        for sentence in summary.get("remarks", ()):
            console.print(f"- {sentence}")
    console.print(f"\nprompts of {config['prompts']}; no BOS; yes also stands for reasonable")
    for data_file, facts in config["data_files"].items():
        if "variant" in facts:
            console.print(f"{data_file}: {facts['variant']}, sha256 {facts['sha256'][:16]}")
    console.print(
        f"{config['num_requests']:,} requests, {results['tokens_computed']:,} tokens computed "
        f"(lm-evaluation-harness's Hugging Face backend: "
        f"{results['tokens_computed_by_harness']:,}); keys and values kept: "
        f"{config['cache_bytes'] / 1e6:,.1f} MB"
    )
    seconds = results["seconds"]
    console.print(
        f"load {seconds['load']:,.1f} s, tokenise {seconds['tokenise']:,.1f} s, score "
        f"{seconds['score']:,.1f} s ({results['tokens_computed'] / seconds['score']:,.0f} tokens/s)"
    )
    console.print(f"results: {output / 'results.json'}\nitems:   {output / 'items.jsonl'}")


def result_row(name: str, summary: dict) -> list[str]:
    em = summary.get("em")
    return [
        name,
        f"{summary['n']:,}" if "n" in summary else "",
        percent(summary["acc"]),
        percent_interval(summary["interval"]),
        percent(summary["chance"]),
        constant_answers(summary),
        percent(summary["yes_rate"]) if "yes_rate" in summary else "",
        "" if em is None else f"{percent(em)} ({percent(summary['em_chance'])})",
    ]


def constant_answers(summary: dict) -> str:
    """Scores of always answering yes and always no; empty in TruthfulQA."""
    if "yes_rate" not in summary:
        return ""
    return " / ".join(percent(value) for value in summary["baselines"].values())


COMPARISON_HEADINGS = ("A", "B", "B - A", "95% interval", "lost", "gained", "p (Holm)")


def print_comparison(comparison: dict) -> None:
    """Differences per task; those whose interval leaves out 0 in bold."""
    console = open_console()
    console.print(f"A: {comparison['a']}\nB: {comparison['b']}")
    table = make_table("", "task", *COMPARISON_HEADINGS)
    for name, row in comparison["tasks"].items():
        style = "bold" if is_resolved(row) else None
        table.add_row(*comparison_row(name, row), style=style)
    console.print(table)
    if not any(map(is_resolved, comparison["tasks"].values())):
        console.print("No difference can be told from zero.")
    if flipped := comparison["flipped"]:
        console.print(f"{len(flipped):,} documents flipped; the first of each task:")
    for document in first_flipped(flipped, 1):
        console.print(_flipped_lines(document), soft_wrap=True)
    for key, (a, b) in comparison["settings"].items():
        console.print(f"not the same in both evaluations: {key} {a} and {b}")
    if comparison["only_in_one"]:
        console.print(f"not compared, as only one has it: {', '.join(comparison['only_in_one'])}")
    console.print(f"{comparison['method']}; lost, gained: documents that turned wrong, right")


def first_flipped(flipped: Sequence[dict], number: int) -> Iterator[dict]:
    """The first `number` documents of each task that turned wrong, and that turned right."""
    seen = Counter()
    for document in flipped:
        kind = document["task"], document["turned"]
        seen[kind] += 1
        if seen[kind] <= number:
            yield document


def _flipped_lines(document: dict) -> str:
    choices = [abridged(choice.strip(), 60) for choice in document["choices"]]
    question = " ".join(document["context"].rpartition("\n\n")[2].split())
    keys = {"A": "prediction_a", "B": "prediction_b", "right": "gold"}
    answers = " | ".join(f"{who}: {choices[document[key]]}" for who, key in keys.items())
    name = f"{document['turned']:6} {document['task']} {document['doc_id']}"
    return escape(f"{name}: {abridged(question, 160)}\n       {answers}")


def is_resolved(row: dict) -> bool:
    """Whether the difference's interval leaves out zero."""
    low, high = row["interval"]
    return low > 0 or high < 0


def comparison_row(name: str, row: dict) -> list[str]:
    low, high = row["interval"]
    return [
        name,
        percent(row["acc_a"]),
        percent(row["acc_b"]),
        f"{100 * row['difference']:+.1f}",
        f"{100 * low:+.1f} to {100 * high:+.1f}",
        f"{row['lost']:,}" if "lost" in row else "",
        f"{row['gained']:,}" if "gained" in row else "",
        f"{row['p_holm']:.2g}" if "p_holm" in row else "",
    ]
