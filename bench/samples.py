"""Samples for the benchmarks, drawn so that nothing has to be downloaded: tensors, JPEG files.

Text lengths are lognormal. Mean and spread of each stage are those that give LLaVA's data their
lengths (about 300 tokens per sample in stage 1 and 550 in stage 2, 256 of them the image) and the
share of padding in random batches of 16 (9% in stage 1, 45% in stage 2).
"""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from transformers.trainer_pt_utils import get_length_grouped_indices

from bench.models import Size
from mmalign.batch import IGNORE_INDEX
from mmalign.config import DataConfig
from mmalign.data.dataset import EncodedSample
from mmalign.toy_world.corpus import corpus_pages

MAX_TEXT = 2048 - 1  # LLaVA's limit counts the image as one token
POOL = 1 << 14
JPEG_SIZE, JPEG_QUALITY = (640, 480), 85  # COCO's usual size, and about its bytes
TOKENS_PER_WORD = 1.4


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
    pixels: list[Tensor]  # of each sample uint8 (1, 3, image_size, image_size)

    @property
    def lengths(self) -> list[int]:
        return [len(sample.input_ids) for sample in self.encoded]

    @property
    def num_loss_tokens(self) -> int:
        return sum(int((one.labels[1:] != IGNORE_INDEX).sum()) for one in self.encoded)

    def __len__(self) -> int:
        return len(self.encoded)


def draw_samples(stage: str, count: int, size: Size) -> Samples:
    """`count` samples of the stage's lengths."""
    return samples_of(stage, STAGES[stage].draw(count, seed=0).tolist(), size)


def samples_of(stage: str, text_lengths: Sequence[int], size: Size, seed: int = 0) -> Samples:
    """Random text of these lengths after an image; the last tokens of a text are supervised."""
    rng = np.random.RandomState(seed)
    encoded, pixels = [], []
    for index, length in enumerate(text_lengths):
        text = rng.randint(3, size.image_token_id, length).astype(np.int32)
        image = np.full(size.vision.num_patches, size.image_token_id, np.int32)
        ids = np.concatenate([text[:1], image, text[1:]])  # BOS precedes the image
        labels = np.full_like(ids, IGNORE_INDEX)
        supervised = max(1, round(length * STAGES[stage].supervised))
        labels[-supervised:] = ids[-supervised:]
        encoded.append(EncodedSample(str(index), ids, labels, (Path(f"{index}.jpg"),), 1))
        image_size = size.vision.image_size
        drawn = draw_image(image_size, image_size, seed + index)
        pixels.append(torch.from_numpy(np.array(drawn)).permute(2, 0, 1)[None])
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


# ---- images ----


def draw_image(width: int, height: int, seed: int) -> Image.Image:
    """Shapes over noise: edges and texture, so that a JPEG of it has about a photo's size."""
    rng = np.random.RandomState(seed)
    coarse = rng.randint(0, 256, (height // 4 + 1, width // 4 + 1, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    for _ in range(12):
        x, y = rng.randint(0, width), rng.randint(0, height)
        size, color = rng.randint(8, max(9, height // 3)), tuple(rng.randint(0, 256, 3).tolist())
        draw.ellipse((x, y, x + size, y + size), fill=color)
    return image


@dataclass(frozen=True)
class JpegFiles:
    """A folder in LLaVA's format: conversations of drawn lengths about JPEG files."""

    data: DataConfig
    paths: list[Path]

    @property
    def mean_bytes(self) -> float:
        return sum(path.stat().st_size for path in self.paths) / len(self.paths)


def write_jpeg_files(folder: Path, stage: str, count: int) -> JpegFiles:
    words = " ".join(corpus_pages(40, passages=12, seed=0)).split()
    rng = random.Random(0)
    paths, records = [], []
    for index, length in enumerate(STAGES[stage].draw(count, seed=0)):
        paths.append(folder / f"{index}.jpg")
        draw_image(*JPEG_SIZE, index).save(paths[-1], quality=JPEG_QUALITY)
        begin = rng.randrange(len(words) // 2)
        answer = " ".join(words[begin : begin + max(1, int(length / TOKENS_PER_WORD))])
        turns = [("human", "<image>\nWhat is in this picture?"), ("gpt", answer)]
        conversations = [{"from": who, "value": text} for who, text in turns]
        name = paths[-1].name
        records.append({"id": str(index), "image": name, "conversations": conversations})
    path = folder / "samples.json"
    path.write_text(json.dumps(records))
    template = {"pretrain": "plain", "finetune": "v1"}[stage]
    data = DataConfig(  # worker processes: nothing is kept for the next round
        path=str(path), image_root=str(folder), template=template, num_workers=2
    )
    return JpegFiles(data, paths)
