"""Read all samples and images of a data file as training would, and count what cannot be used.

python scripts/check_data.py --data.path chat.json --data.image-root images --data.template v1
--model.tokenizer llama-7b

Ends with status 1 where a sample cannot be used, and names the first 10.
"""

import sys
from dataclasses import dataclass

import tyro
from rich.console import Console

from mmalign.config import DataConfig
from mmalign.data.check import check_samples
from mmalign.data.dataset import ConversationDataset
from mmalign.data.preview import TokenizerConfig, show_report
from mmalign.errors import UserError


@dataclass(frozen=True)
class CheckData(DataConfig):
    shuffle: tyro.conf.Suppress[bool] = False
    on_bad_sample: tyro.conf.Suppress[str] = "skip"


@dataclass(frozen=True)
class Check:
    model: TokenizerConfig
    data: tyro.conf.FlagConversionOff[CheckData] = CheckData()
    image_size: int = 224
    patch_size: int = 14


if __name__ == "__main__":
    config = tyro.cli(Check, description=__doc__)
    sizes = config.image_size, config.patch_size
    try:
        dataset = ConversationDataset.open(config.data, config.model.tokenizer, *sizes)
        report = check_samples(dataset)
    except UserError as error:
        sys.exit(f"error: {error}")
    show_report(report, dataset, Console())
    sys.exit(1 if report.skipped else 0)
