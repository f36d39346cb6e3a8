"""The report on a data file: its facts as one JSON object, and as sections to read.

What is listed is the first NUM_LISTED of each kind, by id.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mmalign.data.check import NUM_LISTED, CheckReport
from mmalign.data.dataset import ConversationDataset
from mmalign.data.lengths import histogram_rows, kolmogorov_smirnov, summary, wasserstein
from mmalign.data.overlap import FEWEST_WORDS, WORDS
from mmalign.data.samples import Samples
from mmalign.data.survey import Survey
from mmalign.errors import readable
from mmalign.files import markdown_table

Questions = Mapping[str, Sequence[str]]  # by task
_QUESTION_CHARACTERS = 100


@dataclass(frozen=True)
class Section:
    title: str
    headings: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    notes: Sequence[str] = ()


# ---- facts ----


def facts_of(
    dataset: ConversationDataset,
    report: CheckReport,
    survey: Survey,
    questions: Questions,
    not_looked_for: Sequence[str] = (),
) -> dict[str, Any]:
    """questions: by task, those of the survey's index in their order.

    not_looked_for: why there are no others, in sentences.
    """
    tokens, supervised = report.lengths, report.num_loss_tokens
    return {
        "file": dataset.data.path,
        "samples": len(dataset),
        "usable": len(report.kept),
        "forms": dict(dataset.samples.forms) if isinstance(dataset.samples, Samples) else {},
        "types": {kind or "none": count for kind, count in survey.types.most_common()},
        "questions_per_sample": _counts(survey.samples[:, 2]),
        "pictures_per_sample": _counts(report.num_images),
        "different_pictures": survey.num_different_pictures,
        "tokens": summary(tokens),
        "supervised_tokens": summary(supervised),
        "supervised_share": int(supervised.sum(dtype=np.int64)) / int(tokens.sum(dtype=np.int64)),
        "unusable": [
            {"id": x.sample_id, "problem": x.problem, "remedy": x.remedy} for x in report.skipped
        ],
        "duplicates": _duplicates(dataset, survey),
        "overlap": _overlap(dataset, survey, questions),
        "not_looked_for": list(not_looked_for),
    }


def _counts(values: np.ndarray) -> dict[str, int]:
    return {str(value): count for value, count in sorted(Counter(values.tolist()).items())}


def _duplicates(dataset: ConversationDataset, survey: Survey) -> dict[str, Any]:
    samples, pictures = survey.repeated_samples(), survey.repeated_pictures()
    names = [[dataset.samples[i].images[place] for i, place in x[:NUM_LISTED]] for x in pictures]
    ids = [[dataset.samples[i].id for i in group[:NUM_LISTED]] for group in samples[:NUM_LISTED]]
    return {
        "samples": sum(len(group) - 1 for group in samples),
        "first_samples": ids,
        "pictures": sum(len(group) - 1 for group in pictures),
        "first_pictures": names[:NUM_LISTED],
        "pictures_not_compared": survey.num_unread_pictures,
    }


def _overlap(dataset: ConversationDataset, survey: Survey, questions: Questions) -> dict[str, Any]:
    """By task, how many questions are found to which part in the sample that has most of each."""
    if survey.questions is None:
        return {}
    samples, found_in, found = survey.overlap.T
    num_runs = survey.questions.num_runs
    share = found / num_runs[found_in]
    best = np.zeros(len(num_runs))
    np.maximum.at(best, found_in, share)
    tasks, begin = {}, 0
    for task, texts in questions.items():
        part = slice(begin, begin := begin + len(texts))
        tasks[task] = {
            "questions": len(texts),
            "too_short": int((num_runs[part] == 0).sum()),
            "whole": int((best[part] == 1).sum()),
            "half": int((best[part] >= 0.5).sum()),
            "any": int((best[part] > 0).sum()),
        }
    names = [(task, text) for task, texts in questions.items() for text in texts]
    first = []
    for question in np.lexsort((-num_runs, -best))[:NUM_LISTED].tolist():
        if best[question] < 0.5:
            break
        where = samples[(found_in == question) & (share == best[question])]
        task, text = names[question]
        first.append(
            {
                "task": task,
                "question": readable(text, _QUESTION_CHARACTERS),
                "share": float(best[question]),
                "samples": [dataset.samples[i].id for i in where[:NUM_LISTED].tolist()],
                "num_samples": len(where),
            }
        )
    return {"tasks": tasks, "first": first}


# ---- sections ----


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
                *((f"of type {name}", f"{n:,}") for name, n in facts["types"].items()),
                *_numbered(facts["questions_per_sample"], "question"),
                *_numbered(facts["pictures_per_sample"], "picture"),
            ],
            [*images.splitlines(), f"{facts['different_pictures']:,} different pictures by name"],
        ),
        Section(
            "Tokens per sample",
            ("", "pictures expanded", "supervised"),
            [*histogram_rows((report.lengths, report.num_loss_tokens)), *lengths],
            [f"{facts['supervised_share']:.1%} of the tokens are supervised"],
        ),
        _duplicate_section(facts["duplicates"]),
        *_overlap_section(facts["overlap"], facts["not_looked_for"]),
        Section("Unusable samples", (), (), [*listed, *_more(len(unusable))] or ["none"]),
    ]


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
    """What comes from the file is no Markdown."""
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
