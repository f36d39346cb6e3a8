"""Samples for the benchmarks, drawn so that nothing has to be downloaded.

Text lengths are lognormal. Mean and spread of each stage are those that give LLaVA's data their
lengths (about 300 tokens a sample in stage 1 and 550 in stage 2, 256 of them the image) and the
share of padding in random batches of 16 (9% in stage 1, 45% in stage 2).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from transformers.trainer_pt_utils import get_length_grouped_indices

from mmalign.batch import IGNORE_INDEX
from mmalign.data.dataset import EncodedSample

MAX_TEXT = 2048 - 1  # LLaVA's limit counts the image as one token
POOL = 1 << 14


@dataclass(frozen=True)
class Lengths:
    """Text tokens of a stage's samples."""

    mean: float
    spread: float  # standard deviation of the logarithm
    supervised: float  # share of the text that is trained on

    def draw(self, count: int, seed: int) -> np.ndarray:
        """(count,) int64."""
        location = np.log(self.mean) - self.spread**2 / 2
        drawn = np.random.RandomState(seed).lognormal(location, self.spread, count)
        return np.clip(drawn.round(), 8, MAX_TEXT).astype(np.int64)


STAGES = {
    "pretrain": Lengths(mean=44, spread=0.31, supervised=0.5),
    "finetune": Lengths(mean=294, spread=0.6, supervised=0.82),
}


@dataclass(frozen=True)
class Samples:
    encoded: list[EncodedSample]
    pixels: list[Tensor]  # of each sample uint8 (3, image_size, image_size)

    @property
    def lengths(self) -> list[int]:
        return [len(sample.input_ids) for sample in self.encoded]

    def __len__(self) -> int:
        return len(self.encoded)


def draw_samples(
    stage: str, count: int, num_patches: int, image_size: int, image_token_id: int, seed: int = 0
) -> Samples:
    """`count` samples of the stage's lengths; the last tokens of a text are supervised."""
    texts = STAGES[stage].draw(count, seed)
    return samples_of(stage, texts, num_patches, image_size, image_token_id, seed)


def samples_of(
    stage: str,
    text_lengths: Sequence[int],
    num_patches: int,
    image_size: int,
    image_token_id: int,
    seed: int = 0,
) -> Samples:
    """Random text of these lengths after an image."""
    rng = np.random.RandomState(seed)
    encoded, pixels = [], []
    for index, length in enumerate(text_lengths):
        text = rng.randint(3, image_token_id, length).astype(np.int32)
        image = np.full(num_patches, image_token_id, np.int32)
        ids = np.concatenate([text[:1], image, text[1:]])  # BOS stands before the image
        labels = np.full_like(ids, IGNORE_INDEX)
        trained = max(1, round(length * STAGES[stage].supervised))
        labels[-trained:] = ids[-trained:]
        encoded.append(EncodedSample(str(index), ids, labels, Path(f"{index}.jpg")))
        picture = draw_picture(image_size, image_size, seed + index)
        pixels.append(torch.from_numpy(np.array(picture)).permute(2, 0, 1))
    return Samples(encoded, pixels)


def random_batches(lengths: list[int], batch_size: int) -> list[list[int]]:
    """Samples as they come: their order is random already."""
    order = range(len(lengths))
    return [list(order[i : i + batch_size]) for i in range(0, len(order), batch_size)]


def grouped_batches(lengths: list[int], batch_size: int) -> list[list[int]]:
    """As transformers' LengthGroupedSampler forms them."""
    order = get_length_grouped_indices(
        lengths, batch_size, generator=torch.Generator().manual_seed(0)
    )
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def padding_share(lengths: list[int], batches: list[list[int]]) -> float:
    """Part of the padded batches that holds no token."""
    rows = [[lengths[i] for i in batch] for batch in batches]
    return 1 - sum(map(sum, rows)) / sum(max(row) * len(row) for row in rows)


def typical_step(
    stage: str, batch_size: int, micro_batch_size: int, num_patches: int, grouped: bool
) -> list[list[int]]:
    """Text lengths of one optimizer step, by micro-batch, that stands for all steps.

    Of POOL drawn samples cut into steps, it is the step whose mean length and share of padding are
    nearest to those of the whole pool, so one step of each kind is enough to compare them.
    """
    texts = STAGES[stage].draw(POOL, seed=0)
    lengths = (texts + num_patches).tolist()
    batches = grouped_batches if grouped else random_batches
    cut = batches(lengths, micro_batch_size)
    mean, padding = np.mean(lengths), padding_share(lengths, cut)

    def distance(step: list[list[int]]) -> float:
        here = np.mean([lengths[i] for batch in step for i in batch])
        return abs(here / mean - 1) + abs(padding_share(lengths, step) - padding)

    count = batch_size // micro_batch_size
    steps = [cut[i : i + count] for i in range(0, len(cut) - count + 1, count)]
    return [texts[batch].tolist() for batch in min(steps, key=distance)]


# ---- pictures ----


def draw_picture(width: int, height: int, seed: int) -> Image.Image:
    """Shapes over noise: edges and texture, so that a JPEG of it has about a photo's size."""
    rng = np.random.RandomState(seed)
    coarse = rng.randint(0, 256, (height // 4 + 1, width // 4 + 1, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    for _ in range(12):
        x, y = rng.randint(0, width), rng.randint(0, height)
        size, colour = rng.randint(8, max(9, height // 3)), tuple(rng.randint(0, 256, 3).tolist())
        draw.ellipse((x, y, x + size, y + size), fill=colour)
    return image
