"""Captions of COCO (Karpathy's test split, or val2014) and Flickr30k (test), scored by CIDEr-D.

Three kinds of published file are read: Karpathy's dataset_coco.json and dataset_flickr30k.json,
the lists of one object per picture that MAGIC and Sight-Beyond-Text use, and COCO's own
captions_val2014.json. Document frequencies come from the references of the whole file, whichever
pictures are scored: --limit and corrupted pictures change no weight.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mmalign.errors import UserError
from mmalign.evaluation.cider import Cider
from mmalign.evaluation.metrics import percent
from mmalign.evaluation.ptb_tokenizer import ptb_tokens
from mmalign.evaluation.tasks import as_released
from mmalign.evaluation.tasks.task import require_text
from mmalign.evaluation.tasks.vision_task import (
    SUFFIX,
    VisionTask,
    VisualDocument,
    find_file,
)
from mmalign.evaluation.tasks.vqav2 import COCO_PICTURES
from mmalign.files import read_json_value, sha256
from mmalign.model.generate import GenerationOptions

PROMPT = "Provide a one-sentence caption for the provided image."
RELEASED_PROMPT = "Please provide a description of the picture."
_FIRST_SENTENCE = re.compile(r"[.!?]\s")
_SPLITS = ("train", "restval", "val", "test")  # of Karpathy's files
Row = tuple[str, list[str]]  # file name of the picture, its captions


@dataclass(frozen=True, kw_only=True)
class CaptionDocument(VisualDocument):
    cider: Cider = field(repr=False, compare=False)  # of all pictures of the file
    index: int  # of the picture in it


@dataclass(frozen=True, kw_only=True)
class Captions(VisionTask):
    right_or_wrong = False
    largest = 10.0

    files: tuple[str, ...]  # under data_root, the first that exists is read
    pool_files: tuple[str, ...]  # for the demonstrations of as-released
    prompt: str
    pool_size: int = 5000

    def read(self, data_root: Path) -> list[VisualDocument]:
        path = find_file(self.name, data_root, self.files)
        rows = _rows(path)
        cider = Cider([[ptb_tokens(x) for x in captions] for _, captions in rows])
        demonstrations = self._demonstrations(data_root, len(rows))
        return [
            CaptionDocument(
                task=self.name,
                doc_id=index,
                image=name,
                question=self.prompt,
                gold=captions,
                demonstrations=earlier,
                cider=cider,
                index=index,
            )
            for index, ((name, captions), earlier) in enumerate(
                zip(rows, demonstrations, strict=True)
            )
        ]

    def _demonstrations(self, data_root: Path, number: int) -> list[tuple]:
        if not self.released:
            return [()] * number
        path = find_file(self.name, data_root, self.pool_files)
        rows, random = _rows(path, split="train"), np.random.default_rng(as_released.SEED)
        drawn = as_released.drawn_rows(len(rows), min(self.pool_size, len(rows)))
        pool = [(self.prompt, str(random.choice(rows[i][1])).strip()) for i in drawn]
        return as_released.draw_demonstrations(pool, number)

    def data_files(self, data_root: Path) -> dict[str, dict[str, str]]:
        wanted = [self.files, self.pool_files] if self.released else [self.files]
        files = (find_file(self.name, data_root, names) for names in wanted)
        return {str(x.relative_to(data_root)): {"sha256": sha256(x)} for x in files}

    def judge(self, document: VisualDocument, text: str) -> dict:
        assert isinstance(document, CaptionDocument)
        text = text.replace('"', "") if self.released else text.strip()
        first = _FIRST_SENTENCE.split(text, maxsplit=1)[0]
        whole, one = (document.cider.score(document.index, ptb_tokens(x)) for x in (text, first))
        constant = document.cider.score(document.index, document.cider.most_common)
        return {"score": whole, "first_sentence": one, "constant_score": constant}

    def details(self, items: Sequence[dict]) -> dict:
        """CIDEr on a scale of 0 to 10, of which papers print the hundredfold."""
        constant = float(np.mean([item["constant_score"] for item in items]))
        tokens = [len(ptb_tokens(item["answer"]).split()) for item in items]
        return {
            "baselines": {"always the most common caption": constant},
            "first_sentence": float(np.mean([item["first_sentence"] for item in items])),
            "mean_tokens": float(np.mean(tokens)),
            "largest": self.largest,
        }

    def caveats(self, summary: dict) -> list[str]:
        first, tokens = percent(summary["first_sentence"]), summary["mean_tokens"]
        sentence = f"{self.name}: {first} with the first sentence alone of each caption"
        return [f"{sentence}; a caption has {tokens:.1f} tokens.", *super().caveats(summary)]


def _rows(path: Path, split: str = "test") -> list[Row]:
    """The pictures of a file in order, with their captions; UserError for one without captions."""
    content = read_json_value(path)
    if isinstance(content, list):
        rows = [_row_of_list(row) for row in content]
    elif "annotations" in content:
        rows = _coco_rows(path, content)
    else:
        chosen = ("train", "restval") if split == "train" else (split,)
        if unknown := {str(row["split"]) for row in content["images"]} - set(_SPLITS):
            raise UserError(
                f"{path}: the split of a picture is {min(unknown)!r}; expected "
                f"{', '.join(_SPLITS)}. Download it again"
            )
        rows = [
            (row["filename"], [sentence["raw"] for sentence in row["sentences"]])
            for row in content["images"]
            if row["split"] in chosen
        ]
    if not rows:
        raise UserError(f"{path} has no picture of the split {split}. Download it again")
    for name, captions in rows:
        require_text(name, f"{path}: the file name of a picture")
        if not isinstance(captions, list):
            raise UserError(
                f"{path}: the captions of {name} are {str(captions)[:80]!r}; expected a list"
            )
        for caption in captions:
            require_text(caption, f"{path}: a caption of {name}", blank=True)
    names = Counter(name for name, _ in rows)
    if twice := [name for name, number in names.items() if number > 1]:
        raise UserError(f"{path}: the picture {twice[0]} stands there twice. Remove one")
    if bare := [name for name, captions in rows if not captions]:
        raise UserError(f"{path}: the picture {bare[0]} has no caption. Remove it")
    return rows


def _row_of_list(row: dict[str, Any]) -> Row:
    if "image_id" in row:  # as Sight-Beyond-Text opens it
        return f"COCO_test2014_{int(row['image_id']):012d}.jpg", row["captions"]
    return row["image_name"], row["captions"]


def _coco_rows(path: Path, content: dict) -> list[Row]:
    captions: dict[int, list[str]] = {row["id"]: [] for row in content["images"]}
    for row in content["annotations"]:
        if row["image_id"] not in captions:
            raise UserError(
                f"{path}: caption {row['id']} is about picture {row['image_id']}, which the file "
                "does not list. Download it again"
            )
        captions[row["image_id"]].append(row["caption"])
    return [(row["file_name"], captions[row["id"]]) for row in content["images"]]


_COCO_FILES = ("coco/dataset_coco.json", "coco/mscoco_test.json", "mscoco/mscoco_test.json")
_COCO_FILES += ("coco/captions_val2014.json", "coco/annotations/captions_val2014.json")
_COCO_FOLDERS = ("coco/test_images", "mscoco/test_images", *COCO_PICTURES, "coco/test2014")
_COCO_POOL = ("mscoco/mscoco_train.json", "coco/mscoco_train.json", "coco/dataset_coco.json")
_FLICKR_FILES = ("flickr30k/dataset_flickr30k.json", "flickr30k/flickr30k_test.json")
_FLICKR_FOLDERS = ("flickr30k/test_images", "flickr30k/flickr30k-images", "flickr30k/images")
_FLICKR_POOL = ("flickr30k/flickr30k_train.json", "flickr30k/dataset_flickr30k.json")


def _task(name: str, released: bool, files: tuple, folders: tuple, pool: tuple) -> Captions:
    return Captions(
        name=name + (SUFFIX if released else ""),
        released=released,
        files=files,
        folders=folders,
        pool_files=pool,
        definition="CIDEr-D of captions in CoreNLP's PTB tokens; 100.0 is what papers print as 100",
        prompt=RELEASED_PROMPT if released else PROMPT,
        prompts=as_released.PROMPTS if released else "lmms-eval's, for one sentence",
        options=as_released.OPTIONS if released else GenerationOptions(max_new_tokens=64),
    )


TASKS = tuple(
    _task(*names)
    for names in (
        ("coco_captions", False, _COCO_FILES, _COCO_FOLDERS, _COCO_POOL),
        ("coco_captions", True, _COCO_FILES, _COCO_FOLDERS, _COCO_POOL),
        ("flickr30k_captions", False, _FLICKR_FILES, _FLICKR_FOLDERS, _FLICKR_POOL),
        ("flickr30k_captions", True, _FLICKR_FILES, _FLICKR_FOLDERS, _FLICKR_POOL),
    )
)
