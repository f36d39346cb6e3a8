"""Show what the model is trained on: supervised tokens marked, image spans, packing map.

python scripts/preview_batch.py --data.path chat.json --data.image-root images --data.template v1
--model.tokenizer llama-7b [--model.vision-tower clip-vit-large-patch14] [--json]

Samples come in file order. --json prints one object per sample, {"id", "input_ids", "labels"}:
labels unshifted (-100: no loss), image tokens expanded.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import tyro
from rich.console import Console

from mmalign.command import command_line
from mmalign.config import DataConfig
from mmalign.data.preview import PreviewModel, open_dataset, show, write_json
from mmalign.errors import UserError
from mmalign.validation import validate


@dataclass(frozen=True)
class PreviewData(DataConfig):
    shuffle: tyro.conf.Suppress[bool] = False
    num_samples: int | None = None
    """Show the first N samples (after the choice of types), of a mix those of each file; unset: 4,
    or all with --json."""


@dataclass(frozen=True)
class Preview:
    model: PreviewModel
    data: tyro.conf.FlagConversionOff[PreviewData] = PreviewData()
    micro_batch_tokens: int = 8192
    """Most tokens in one micro-batch of the packing map."""
    figure: Path | None = None
    """Also draw the first micro-batch: a PNG file."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print one JSON object per sample instead of coloured text."""


if __name__ == "__main__":
    with command_line():
        config = tyro.cli(Preview, description=__doc__)
        validate(config)
        if config.json and config.figure:
            raise UserError("--json prints the samples, --figure draws them. Leave one of them out")
        data = config.data
        if data.num_samples is None and not config.json:
            data = replace(data, num_samples=4)
        dataset, images = open_dataset(data, config.model)
        print(images, file=sys.stderr if config.json else sys.stdout)
        if config.json:
            write_json(dataset)
        else:
            show(dataset, config.micro_batch_tokens, Console(), config.figure)
