"""Read all samples and images of a data file as training would, and count the unusable ones.

python scripts/check_data.py --data.path chat.json --data.image-root images --data.template v1
--model.tokenizer llama-7b [--model.vision-tower clip-vit-large-patch14] [--against alpaca.json]

--against prints the supervised tokens per sample of both files, and how far they lie apart.
Exits with status 1 if a sample is unusable, and names the first 10.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import tyro
from rich.console import Console

from mmalign.command import command_line
from mmalign.config import DataConfig
from mmalign.data.check import check_samples
from mmalign.data.lengths import histogram_table
from mmalign.data.preview import PreviewModel, open_dataset, show_report
from mmalign.validation import validate


@dataclass(frozen=True)
class CheckData(DataConfig):
    shuffle: tyro.conf.Suppress[bool] = False
    on_bad_sample: tyro.conf.Suppress[str] = "skip"


@dataclass(frozen=True)
class Check:
    model: PreviewModel
    data: tyro.conf.FlagConversionOff[CheckData] = CheckData()
    against: str = ""
    """Second file in LLaVA's format, to compare lengths with; all of it, in the same template."""


if __name__ == "__main__":
    with command_line():
        config = tyro.cli(Check, description=__doc__)
        validate(config)
        dataset, images = open_dataset(config.data, config.model)
        print(images)
        report = check_samples(dataset)
        show_report(report, dataset, Console())
        reports = [report]
        if config.against:
            against = replace(config.data, path=config.against, types=(), num_samples=None)
            other, _ = open_dataset(against, config.model)
            reports.append(check_samples(other))
            show_report(reports[1], other, Console())
            names = (Path(config.data.path).name, Path(config.against).name)
            lengths = (report.num_loss_tokens, reports[1].num_loss_tokens)
            Console().print(histogram_table(names, lengths))
    sys.exit(1 if any(x.skipped for x in reports) else 0)
