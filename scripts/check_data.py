"""Read all samples and images of a data file as training would, and report on them.

python scripts/check_data.py --data.path chat.json --data.image-root images --data.template v1
--model.tokenizer llama-7b [--model.vision-tower clip-vit-large-patch14] [--output DIR] [--json]

Counts, lengths, duplicates, the first unusable samples by id and, with --data-root, questions of
TruthfulQA and ETHICS that stand in the training text. --against prints the supervised tokens per
sample of both files, and how far they lie apart. Exits with status 1 if a sample is unusable.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from rich.console import Console

from mmalign.command import command_line
from mmalign.config import DataConfig
from mmalign.data.check import CheckReport, check_samples
from mmalign.data.dataset import ConversationDataset
from mmalign.data.facts import Questions, facts_of
from mmalign.data.figure import contact_sheet, plot_lengths
from mmalign.data.overlap import QuestionIndex
from mmalign.data.preview import PreviewModel, open_dataset
from mmalign.data.report import (
    Section,
    comparison,
    markdown,
    sections_of,
    show,
)
from mmalign.data.survey import Survey
from mmalign.evaluation.items import make_folder
from mmalign.evaluation.questions import read_questions
from mmalign.files import naming, write_json, write_text
from mmalign.ownership import require_names
from mmalign.validation import validate

NUM_PICTURES = 24  # of the contact sheet


@dataclass(frozen=True)
class CheckData(DataConfig):
    shuffle: tyro.conf.Suppress[bool] = False
    on_bad_sample: tyro.conf.Suppress[str] = "skip"


@dataclass(frozen=True)
class Check:
    model: PreviewModel
    data: tyro.conf.FlagConversionOff[CheckData] = CheckData()
    data_root: str = ""
    """Folder of the evaluation data (truthfulqa/, ethics/), whose questions are looked for."""
    against: str = ""
    """Second file in LLaVA's format, to compare lengths with; all of it, in the same template."""
    output: Path | None = None
    """Folder for report.md, report.json, lengths.png and, a contact sheet, pictures.png."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print the report as one JSON object."""


@dataclass(frozen=True)
class Checked:
    dataset: ConversationDataset
    report: CheckReport
    facts: dict[str, Any]
    sections: list[Section]


def check(
    config: Check, data: DataConfig, questions: Questions, problems: Sequence[str]
) -> Checked:
    dataset, images = open_dataset(data, config.model)
    texts = [text for task in questions.values() for text in task]
    survey = Survey(QuestionIndex(texts) if texts else None)
    report = check_samples(dataset, observer=survey)
    facts = facts_of(dataset, report, survey, questions, problems)
    return Checked(dataset, report, facts, sections_of(facts, report, images))


def draw(checked: Checked, folder: Path) -> list[str]:
    """The names of the figures."""
    report = checked.report
    lengths = {"pictures expanded": report.lengths, "supervised": report.num_loss_tokens}
    with naming(folder / "lengths.png"):
        plot_lengths(lengths, folder / "lengths.png")
    shown = report.kept[report.num_images > 0]
    if not len(shown):
        return ["lengths.png"]
    places = np.linspace(0, len(shown) - 1, min(NUM_PICTURES, len(shown))).astype(int)
    with naming(folder / "pictures.png"):
        contact_sheet(checked.dataset, shown[places].tolist(), folder / "pictures.png")
    return ["lengths.png", "pictures.png"]


def main(config: Check) -> bool:
    """Whether all samples are usable."""
    validate(config)
    if config.output:
        make_folder(config.output)
        require_names(config.output, ("report.json", "report.md", "lengths.png", "pictures.png"))
    questions, problems = {}, ["evaluation questions were not looked for: give --data-root"]
    if config.data_root:
        questions, problems = read_questions(config.data_root)
    checked = [check(config, config.data, questions, problems)]
    facts, sections = checked[0].facts, [*checked[0].sections]
    if config.against:
        against = replace(config.data, path=config.against, types=(), num_samples=None)
        checked.append(check(config, against, {}, ()))
        names = (Path(config.data.path).name, Path(config.against).name)
        lengths = (checked[0].report.num_loss_tokens, checked[1].report.num_loss_tokens)
        section, distances = comparison(names, lengths)
        sections += [*checked[1].sections, section]
        facts["against"] = checked[1].facts | distances
    if config.json:
        print(json.dumps(facts))
    else:
        show(sections, Console())
    if config.output:
        write_json(config.output / "report.json", facts)
        write_text(config.output / "report.md", markdown(sections, draw(checked[0], config.output)))
        print(f"report: {config.output / 'report.md'}", file=sys.stderr)
    return not any(x.facts["unusable"] for x in checked)


if __name__ == "__main__":
    with command_line():
        is_usable = main(tyro.cli(Check, description=__doc__))
    sys.exit(0 if is_usable else 1)
