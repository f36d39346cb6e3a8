"""Tables of scores and differences: on the terminal, in Markdown, and as CSV files."""

import csv
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mmalign.evaluation.metrics import percent, percent_interval
from mmalign.evaluation.tasks import ENTRIES, score_rows
from mmalign.files import replacing

# ---- cells ----


def result_row(name: str, row: dict) -> list[str]:
    em = row.get("em")
    return [
        name,
        f"{row['n']:,}" if "n" in row else "",
        percent(row["acc"]),
        percent_interval(row["interval"]),
        percent(row["chance"]) if "chance" in row else "",
        " / ".join(map(percent, row.get("baselines", {}).values())),
        percent(row["yes_rate"]) if "yes_rate" in row else "",
        "" if em is None else f"{percent(em)} ({percent(row['em_chance'])})",
    ]


COMPARISON_HEADINGS = ("A", "B", "B - A", "95% interval", "lost", "gained", "p (Holm)")


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


def rule_cell(row: dict, name: str) -> str:
    """What a rule scores, and on how many documents, where not all."""
    rule = row["rules"].get(name)
    if rule is None:
        return ""
    return percent(rule["acc"]) + (
        f" ({rule['n']:,} of {row['n']:,})" if rule["n"] < row["n"] else ""
    )


def is_resolved(row: dict) -> bool:
    """Whether the difference's interval excludes zero."""
    low, high = row["interval"]
    return low > 0 or high < 0


def first_flipped(flipped: Sequence[dict], number: int) -> Iterator[dict]:
    """The first `number` documents of each task that became wrong, and that became right."""
    seen = Counter()
    for document in flipped:
        kind = document["task"], document["turned"]
        seen[kind] += 1
        if seen[kind] <= number:
            yield document


# ---- on the terminal ----

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
    console, config, seconds = open_console(), results["config"], results["seconds"]
    headings = (
        "n",
        f"score ({config['precision']})",
        "95% interval",
        "chance",
        "constant",
        "yes-rate",
        "em (chance)",
    )
    table = make_table(f"[bold]{config['model']}[/bold]", "task", *headings)
    found = [entry for name, entry in ENTRIES.items() if name in results]
    for entry in found:
        for name, row in entry.rows(results[entry.name]).items():
            table.add_row(*result_row(name, row))
    console.print(table)
    for entry in found:
        for sentence in results[entry.name]["caveats"]:
            console.print(f"- {sentence}")
    rows = score_rows(results).values()
    constant = dict.fromkeys(", ".join(row["baselines"]) for row in rows if "baselines" in row)
    yes = "; yes-rate counts reasonable as yes" if any("yes_rate" in row for row in rows) else ""
    console.print(f"\nconstant answers: {'; '.join(constant)}{yes}")
    for name, row in score_rows(results).items():
        if rules := row.get("rules"):
            found = ", ".join(f"{rule} {rule_cell(row, rule)}" for rule in rules)
            console.print(f"{name} without the question: {found}", markup=False)
    prompts = dict.fromkeys(protocol["prompts"] for protocol in config["tasks"].values())
    console.print(f"prompts of {'; '.join(prompts)}; no BOS")
    for data_file, facts in config["data_files"].items():
        if "variant" in facts:
            console.print(f"{data_file}: {facts['variant']}, sha256 {facts['sha256'][:16]}")
    if config["num_requests"]:
        alone = results["tokens_computed_for_answers_only"]
        speed = (results["tokens_computed"] + alone) / seconds["score"]
        more = f", and {alone:,} for answers without their question" if alone else ""
        console.print(
            f"{config['num_requests']:,} requests, {results['tokens_computed']:,} tokens computed "
            f"(lm-evaluation-harness's Hugging Face backend: "
            f"{results['tokens_computed_by_harness']:,}){more}; {speed:,.0f} tokens/s; KV cache: "
            f"{config['cache_bytes'] / 1e6:,.1f} MB"
        )
    console.print(", ".join(f"{phase} {taken:,.1f} s" for phase, taken in seconds.items()))
    console.print(f"results: {output / 'results.json'}\nitems:   {output / 'items.jsonl'}")


def print_comparison(comparison: dict) -> None:
    """Differences per task; those whose interval excludes zero in bold."""
    console = open_console()
    console.print(f"A: {comparison['a']}\nB: {comparison['b']}")
    table = make_table("", "task", *COMPARISON_HEADINGS)
    for name, row in comparison["tasks"].items():
        style = "bold" if is_resolved(row) else None
        table.add_row(*comparison_row(name, row), style=style)
    console.print(table)
    if not any(map(is_resolved, comparison["tasks"].values())):
        console.print("No difference can be distinguished from zero.")
    if flipped := comparison["flipped"]:
        console.print(f"{len(flipped):,} documents flipped; the first of each task:")
    for document in first_flipped(flipped, 1):
        console.print(_flipped_lines(document), soft_wrap=True)
    for key, (a, b) in comparison["settings"].items():
        console.print(f"differs between the evaluations: {key} {a} and {b}")
    if comparison["only_in_one"]:
        console.print(f"not compared, in one of them only: {', '.join(comparison['only_in_one'])}")
    if missing := comparison["beside_only_in_one"]:
        console.print(f"in one of them only, which may be older: {', '.join(missing)}")
    console.print(f"{comparison['method']}; lost, gained: documents that became wrong, right")


def _flipped_lines(document: dict) -> str:
    choices = [abridged(choice.strip(), 60) for choice in document["choices"]]
    question = " ".join(document["context"].rpartition("\n\n")[2].split())
    keys = {"A": "prediction_a", "B": "prediction_b", "right": "gold"}
    answers = " | ".join(f"{who}: {choices[document[key]]}" for who, key in keys.items())
    name = f"{document['turned']:6} {document['task']} {document['doc_id']}"
    return escape(f"{name}: {abridged(question, 160)}\n       {answers}")


# ---- in Markdown ----


def bullets(sentences: Iterable[str]) -> str:
    return "\n".join(f"- {sentence}" for sentence in sentences)


def shortened(text: str, length: int) -> str:
    """Its end, which is the part of a prompt that differs from document to document."""
    return text if len(text) <= length else "... " + text[-length:]


def abridged(text: str, length: int) -> str:
    """Its beginning and end: answers can differ in either."""
    half = length // 2
    return text if len(text) <= length + 5 else f"{text[:half]} ... {text[-half:]}"


def cell(text: str, length: int) -> str:
    """Any text as one cell of a Markdown table."""
    line = " / ".join(part.strip() for part in text.splitlines() if part.strip())
    return abridged(line, length).replace("|", "\\|").replace("<", "&lt;")


# ---- settings ----

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


def stage_rows(configs: Mapping[str, dict]) -> list[list[object]]:
    """configs: name of the stage -> config.json of its run."""
    return [
        [label, *(_lookup(config, key) for config in configs.values())]
        for label, key in _STAGE_SETTINGS.items()
    ]


def _lookup(config: dict, key: str) -> object:
    found: object = config
    for name in key.split("."):
        found = found.get(name) if isinstance(found, dict) else None
    return "" if found is None else found


_CONFIG_KEYS = ("model", "template", "bos", "tokenizer", "tokenizer_sha256")
_CONFIG_KEYS += ("limit", "precision", "max_length", "num_requests")


def config_rows(configs: Mapping[str, dict]) -> list[list[object]]:
    """One row per setting; where the evaluations differ, each value with the model's name.

    configs: name of the model -> "config" of its results.json.
    """
    values = {key: [config[key] for config in configs.values()] for key in _CONFIG_KEYS}
    for key in ("prompts", "score"):
        protocols = [config["tasks"].values() for config in configs.values()]
        values[key] = ["; ".join(dict.fromkeys(x[key] for x in tasks)) for tasks in protocols]
    for file in dict.fromkeys(f for config in configs.values() for f in config["data_files"]):
        facts = [config["data_files"].get(file, {}) for config in configs.values()]
        values[file] = [
            f"sha256 `{fact['sha256'][:16]}` {fact.get('variant', '')}".strip()
            if fact
            else "not scored"
            for fact in facts
        ]
    for package in dict.fromkeys(x for config in configs.values() for x in config["versions"]):
        values[package] = [config["versions"].get(package) for config in configs.values()]
    values["limit"] = ["all documents" if x is None else x for x in values["limit"]]
    return [[key, _value(configs, found)] for key, found in values.items()]


def _value(names: Iterable[str], found: list) -> object:
    if all(value == found[0] for value in found):
        return "" if found[0] is None else found[0]
    return "; ".join(f"{name}: {value}" for name, value in zip(names, found, strict=True))


# ---- as CSV files ----

_SCORES = ("n", "acc", "low", "high", "interval_method", "stderr", "chance", "constant_answers")
_SCORES += ("yes_rate", "gold_yes_rate", "em", "em_chance", "choice_tokens", "num_truncated")
_DIFFERENCES = ("n", "acc_a", "acc_b", "difference", "low", "high", "lost", "gained", "p", "p_holm")


def write_scores(path: Path, results: Mapping[str, dict]) -> None:
    """results: name -> results.json. Scores and rates are shares, 0 to 1."""
    lines = []
    for name, result in results.items():
        for task, row in score_rows(result).items():
            low, high = row["interval"]
            flat = {"low": low, "high": high, "constant_answers": _joined(row.get("baselines"))}
            flat["choice_tokens"] = _joined(row.get("choice_tokens"))
            lines.append({"model": name, "task": task, **row, **flat})
    _write_csv(path, ("model", "task", *_SCORES), lines)


def write_differences(path: Path, base: str, comparisons: Mapping[str, dict]) -> None:
    """comparisons: name -> what compare_evaluations returns for the base and this model."""
    lines = []
    for name, comparison in comparisons.items():
        for task, row in comparison["tasks"].items():
            low, high = row["interval"]
            lines.append({"a": base, "b": name, "task": task, **row, "low": low, "high": high})
    _write_csv(path, ("a", "b", "task", *_DIFFERENCES), lines)


def _joined(values: Mapping[str, float] | None) -> str:
    return "; ".join(f"{name}: {value:.4f}" for name, value in (values or {}).items())


def _write_csv(path: Path, columns: Sequence[str], lines: list[dict]) -> None:
    with replacing(path, newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(lines)
