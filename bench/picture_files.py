"""A folder in LLaVA's format: conversations of drawn lengths about JPEG files."""

import json
import random
from dataclasses import dataclass
from pathlib import Path

from bench.samples import STAGES, draw_picture
from mmalign.config import DataConfig
from mmalign.toy_world.corpus import corpus_pages

WIDTH, HEIGHT, QUALITY = 640, 480, 85  # COCO's usual size, and about its bytes
TOKENS_PER_WORD = 1.4
TEMPLATES = {"pretrain": "plain", "finetune": "v1"}


@dataclass(frozen=True)
class PictureFiles:
    data: DataConfig
    paths: list[Path]

    @property
    def mean_bytes(self) -> float:
        return sum(path.stat().st_size for path in self.paths) / len(self.paths)


def write_files(folder: Path, stage: str, count: int, seed: int = 0) -> PictureFiles:
    words = " ".join(corpus_pages(40, passages=12, seed=seed)).split()
    rng = random.Random(seed)
    paths, records = [], []
    for index, length in enumerate(STAGES[stage].draw(count, seed)):
        paths.append(folder / f"{index}.jpg")
        draw_picture(WIDTH, HEIGHT, seed + index).save(paths[-1], quality=QUALITY)
        begin = rng.randrange(len(words) // 2)
        answer = " ".join(words[begin : begin + max(1, int(length / TOKENS_PER_WORD))])
        turns = [("human", "<image>\nWhat is in this picture?"), ("gpt", answer)]
        records.append(
            {
                "id": str(index),
                "image": paths[-1].name,
                "conversations": [{"from": who, "value": text} for who, text in turns],
            }
        )
    path = folder / "samples.json"
    path.write_text(json.dumps(records))
    data = DataConfig(path=str(path), image_root=str(folder), template=TEMPLATES[stage])
    return PictureFiles(data, paths)
