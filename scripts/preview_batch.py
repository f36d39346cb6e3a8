"""Show what is trained on: supervised tokens marked, image spans, packing map.

python scripts/preview_batch.py --data.path chat.json --data.image-root images --data.template v1
--model.tokenizer llama-7b [--num-samples 8] [--json]

Samples come in file order. --json prints one object a sample, {"id", "input_ids", "labels"}: labels
unshifted (-100: no loss), image tokens expanded.
"""

import signal
import sys
from dataclasses import dataclass, replace

import tyro
from rich.console import Console

from mmalign.config import DataConfig
from mmalign.data.dataset import ConversationDataset
from mmalign.data.preview import TokenizerConfig, show, write_json
from mmalign.errors import UserError


@dataclass(frozen=True)
class PreviewData(DataConfig):
    shuffle: tyro.conf.Suppress[bool] = False


@dataclass(frozen=True)
class Preview:
    model: TokenizerConfig
    data: tyro.conf.FlagConversionOff[PreviewData] = PreviewData()
    num_samples: int | None = None
    """Show only the first N samples; without it 4, or all with --json."""
    image_size: int = 224
    patch_size: int = 14
    micro_batch_tokens: int = 8192
    """Most tokens in one micro-batch of the packing map."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print one JSON object a sample instead of the view for people."""


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # "| head" ends it quietly
    config = tyro.cli(Preview, description=__doc__)
    limits = [n for n in (config.num_samples, config.data.num_samples) if n is not None]
    data = replace(config.data, num_samples=min(limits, default=None if config.json else 4))
    sizes = config.image_size, config.patch_size
    try:
        dataset = ConversationDataset.open(data, config.model.tokenizer, *sizes)
        if config.json:
            write_json(dataset)
        else:
            show(dataset, config.micro_batch_tokens, Console())
    except UserError as error:
        sys.exit(f"error: {error}")
