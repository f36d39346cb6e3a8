"""The average sample, which stands for the data in the memory plan and in the cost of a study."""

from dataclasses import dataclass

import numpy as np

from mmalign.config import Stage
from mmalign.data.dataset import ConversationDataset
from mmalign.errors import SampleError
from mmalign.model.config import VisionConfig

_ENCODED = 200  # samples of a file whose means stand for all
# means of LLaVA's data; in stage 1 without the shared prefix (v0: 37 tokens, whose keys and values,
# 19 MB with LLaMA2-7B, are negligible)
_TEXT_TOKENS = {"pretrain": 44, "finetune": 294}
_LOSS_TOKENS = {"pretrain": 22, "finetune": 242}


@dataclass(frozen=True)
class AverageSample:
    tokens: float  # image tokens included
    loss_tokens: float
    tiles: float  # of its images, as in EncodedSample
    image_tokens: float  # in LLaVA 1.6 with those of image_newline


def llava_sample(stage: Stage, vision: VisionConfig | None) -> AverageSample:
    """Of LLaVA's data, with one image that is a single tile; vision None: with its text alone."""
    patches = vision.num_patches if vision else 0
    tiles = float(vision is not None)
    return AverageSample(_TEXT_TOKENS[stage] + patches, _LOSS_TOKENS[stage], tiles, patches)


def average_sample(dataset: ConversationDataset) -> AverageSample | None:
    """Of samples spread over the data; None where none of them is usable."""
    encoded, image_token_id = [], dataset.tokenizer.image_token_id
    for index in np.unique(np.linspace(0, len(dataset) - 1, _ENCODED).astype(int)):
        try:
            encoded.append(dataset.encode(int(index)))
        except SampleError:  # the data check names it
            continue
    if not encoded:
        return None
    counts = [
        (
            len(x.input_ids),
            (x.labels >= 0).sum(),
            x.num_tiles,
            (x.input_ids == image_token_id).sum() if x.images else 0,
        )
        for x in encoded
    ]
    return AverageSample(*np.mean(counts, axis=0).tolist())
