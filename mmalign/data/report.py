"""The facts of a data file (facts.py) as sections to read, in a terminal or as Markdown.

What is listed is the first NUM_LISTED of each kind, by id.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mmalign.data.check import NUM_LISTED, CheckReport
from mmalign.data.lengths import histogram_rows, kolmogorov_smirnov, wasserstein
from mmalign.data.overlap import FEWEST_WORDS, WORDS
from mmalign.errors import readable
from mmalign.files import markdown_table

_QUESTION_CHARACTERS = 100


@dataclass(frozen=True)
class Section:
    title: str
    headings: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    notes: Sequence[str] = ()


def sections_of(facts: Mapping[str, Any], report: CheckReport, images: str) -> list[Section]:
    """images: the line that says what pictures become."""
    unusable = facts["unusable"]
    listed = [f"sample {x['id']!r}: {x['problem']}. {x['remedy']}" for x in unusable[:NUM_LISTED]]
    tokens, supervised = facts["tokens"], facts["supervised_tokens"]
    names = {"mean": "mean", "median": "median", "percentile_95": "95th percentile"}
    names |= {"longest": "longest", "together": "together"}
    lengths = [(name, f"{tokens[x]:,.0f}", f"{supervised[x]:,.0f}") for x, name in names.items()]
    return [
        Section(
            facts["file"],
            ("", "samples"),
            [
                ("samples", f"{facts['samples']:,}"),
                *((f"in {name} form", f"{n:,}") for name, n in facts["forms"].items()),
                ("usable", f"{facts['usable']:,}"),
                *(_type_row(name, n) for name, n in facts["types"].items()),
                *_numbered(facts["questions_per_sample"], "question"),
                *_numbered(facts["pictures_per_sample"], "picture"),
            ],
            [*images.splitlines(), f"{facts['different_pictures']:,} different pictures by name"],
        ),
        *_mix_section(facts["mix"]),
        Section(
            "Tokens per sample",
            ("", "pictures expanded", "supervised"),
            [*histogram_rows((report.lengths, report.num_loss_tokens)), *lengths],
            [f"{facts['supervised_share']:.1%} of the tokens are supervised"],
        ),
        _duplicate_section(facts["duplicates"]),
        *_overlap_section(facts["overlap"], facts["not_looked_for"]),
        *_long_sections(facts),
        Section("Unusable samples", (), (), [*listed, *_more(len(unusable))] or ["none"]),
    ]


def _type_row(name: str, number: int) -> tuple[str, str]:
    return ("without a type" if name == "none" else f"of type {name}"), f"{number:,}"


def _mix_section(rows: Sequence[Mapping[str, Any]]) -> Iterator[Section]:
    headings = ("", "in the file", "chosen", "usable", "weight", "in an epoch")
    counts = ("in_file", "samples", "usable", "weight", "in_epoch")
    lines = [(x["name"], *(f"{x[name]:,.10g}" for name in counts)) for x in rows]
    if rows:
        total = sum(x["in_epoch"] for x in rows)
        yield Section("Files of the mix", headings, lines, [f"{total:,} samples make an epoch"])


def _long_sections(facts: Mapping[str, Any]) -> Iterator[Section]:
    long, cut = facts["left_out_as_too_long"], facts["truncated"]
    if long:
        listed = [f"sample {x['id']!r}: {x['problem']}" for x in long[:NUM_LISTED]]
        title = f"Left out as too long: {len(long):,} samples"
        yield Section(title, (), (), [*listed, *_more(len(long))])
    if cut:
        listed = [f"sample {x['id']!r}: {x['tokens_cut']:,} tokens" for x in cut[:NUM_LISTED]]
        total = sum(x["tokens_cut"] for x in cut)
        title = f"Truncated: {len(cut):,} samples, by {total:,} tokens"
        yield Section(title, (), (), [*listed, *_more(len(cut))])


def _numbered(counts: Mapping[str, int], noun: str) -> list[tuple[str, str]]:
    return [
        (f"with {number} {noun}{'' if number == '1' else 's'}", f"{count:,}")
        for number, count in counts.items()
    ]


def _more(count: int) -> list[str]:
    return [f"and {count - NUM_LISTED:,} more"] if count > NUM_LISTED else []


def _duplicate_section(found: Mapping[str, Any]) -> Section:
    notes = [f"same sample: {_list(ids)}" for ids in found["first_samples"]]
    notes += [f"same picture: {_list(names)}" for names in found["first_pictures"]]
    if found["pictures_not_compared"]:
        notes.append("pictures whose bytes the check does not read are compared by name alone")
    rows = [
        (
            "samples with the conversation and the picture of an earlier one",
            f"{found['samples']:,}",
        ),
        ("pictures with the bytes of another name's", f"{found['pictures']:,}"),
    ]
    return Section("Duplicates", ("", "repeated"), rows, notes)


def _overlap_section(found: Mapping[str, Any], problems: Sequence[str]) -> Iterator[Section]:
    title = "Evaluation questions in the training text"
    if not found:
        if problems:
            yield Section(title, (), (), problems)
        return
    rows = [
        (name, *(f"{task[x]:,}" for x in ("questions", "whole", "half", "any", "too_short")))
        for name, task in found["tasks"].items()
    ]
    notes = [
        f"of their runs of {WORDS} words (a shorter question is one run), as many as one sample "
        f"has; left out: questions of fewer than {FEWEST_WORDS} words"
    ]
    for x in found["first"]:
        more = (
            f" and {x['num_samples'] - NUM_LISTED:,} more" if x["num_samples"] > NUM_LISTED else ""
        )
        where = ", ".join(map(repr, x["samples"]))
        notes.append(f"{x['share']:.0%} of {x['task']} {x['question']!r}: in {where}{more}")
    headings = ("", "questions", "whole", "half or more", "any part", "left out")
    yield Section(title, headings, rows, [*notes, *problems])


def _list(names: Sequence[str]) -> str:
    return ", ".join(readable(repr(name), _QUESTION_CHARACTERS) for name in names)


def comparison(
    names: tuple[str, str], supervised: tuple[np.ndarray, np.ndarray]
) -> tuple[Section, dict[str, float]]:
    """Supervised tokens per sample of two files, and their distances for JSON."""
    distances = {
        "wasserstein": wasserstein(*supervised),
        "kolmogorov_smirnov": kolmogorov_smirnov(*supervised),
    }
    note = (
        f"Wasserstein distance {distances['wasserstein']:.2f} tokens, Kolmogorov-Smirnov "
        f"{distances['kolmogorov_smirnov']:.3f}"
    )
    rows = [*histogram_rows(supervised), ("samples", *(f"{len(x):,}" for x in supervised))]
    return Section("Supervised tokens per sample", ("", *names), rows, [note]), distances


# ---- output ----


def markdown(sections: Sequence[Section], figures: Sequence[str]) -> str:
    """figures: names of the PNG files beside the report."""
    blocks = []
    for level, section in zip("#" + " " * len(sections), sections, strict=False):
        blocks.append(f"{'#' if level == '#' else '##'} {_cell(section.title)}")
        if section.rows:
            rows = [[_cell(cell) for cell in row] for row in section.rows]
            blocks.append(markdown_table([_cell(x) for x in section.headings], rows))
        blocks += ["\n".join(f"- {_cell(note)}" for note in section.notes)] if section.notes else []
    return "\n\n".join(blocks + [f"![{name}]({name})" for name in figures]) + "\n"


def _cell(text: str) -> str:
    """What comes from the file is not taken for Markdown."""
    for character in "\\`*_[]<>|#":
        text = text.replace(character, f"\\{character}")
    return text


def show(sections: Sequence[Section], console: Console) -> None:
    for section in sections:
        console.print(section.title, style="bold", markup=False, highlight=False, soft_wrap=True)
        if section.rows:
            table = Table()
            for heading in section.headings:
                justify = "right" if heading else "left"
                table.add_column(Text(heading), justify=justify, no_wrap=not heading)
            for row in section.rows:
                table.add_row(*map(Text, row))
            console.print(table)
        for note in section.notes:
            console.print(note, markup=False, highlight=False, soft_wrap=True)
