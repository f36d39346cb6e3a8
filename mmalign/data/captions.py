"""Captions and boxes of pictures, as text that can stand in a picture's place."""

import json
import re
from collections import defaultdict
from pathlib import Path

from mmalign.data.json_records import read_text, records
from mmalign.errors import UserError


def read_captions(path: str | Path) -> dict[str, str]:
    """Text for each image: captions, then a line for each box, as LLaVA's GPT-4 prompts had them.

    Either LLaVA's JSON lines {"image", "captions", "instances": [{"category", "bbox"}]} or COCO's
    {"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}.
    """
    path = Path(path)
    text, _ = read_text(path)
    try:
        coco = json.loads(text)
    except json.JSONDecodeError:  # several lines
        coco = None
    try:
        if isinstance(coco, dict) and "annotations" in coco:
            names = {image["id"]: image["file_name"] for image in coco["images"]}
            lines = defaultdict(list)
            for row in coco["annotations"]:
                lines[image_key(names[row["image_id"]])].append(row["caption"].strip())
        else:
            lines = {image_key(x["image"]): _caption_lines(x) for _, _, x in records(path, text)}
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: not a file of captions ({type(error).__name__}: {error}). Expected COCO's "
            'captions_*.json, or lines {"image", "captions", "instances"} as LLaVA has them'
        ) from error
    return {key: "\n".join(found) for key, found in lines.items()}


def _caption_lines(row: dict) -> list[str]:
    boxes = [f"{box['category']}: {box['bbox']}" for box in row.get("instances", [])]
    return [caption.strip() for caption in row["captions"]] + boxes


def image_key(path: str) -> str:
    """COCO's number, however the file is called: COCO_train2014_000000033471.jpg, 000000033471."""
    stem = path.rpartition("/")[2].rpartition(".")[0] or path
    return re.sub(r"^COCO_(train|val|test)\d{4}_", "", stem)
