"""Captions and boxes of pictures, as text."""

import json

import pytest

from mmalign.data.captions import read_captions
from mmalign.errors import UserError


def test_captions_of_llava_and_coco_are_the_same(tmp_path, shared_data):
    path = shared_data / "llava" / "caps_boxes_coco2014_val_80.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    coco = {
        "images": [
            {"id": i, "file_name": f"COCO_val2014_{x['image']}"} for i, x in enumerate(lines)
        ],
        "annotations": [
            {"image_id": i, "caption": text} for i, x in enumerate(lines) for text in x["captions"]
        ],
    }
    (tmp_path / "captions.json").write_text(json.dumps(coco))
    ours, theirs = read_captions(path), read_captions(tmp_path / "captions.json")
    assert ours.keys() == theirs.keys() and len(ours) == 80
    assert all(text.startswith(theirs[key]) for key, text in ours.items())
    assert "donut: [0.37, 0.584, 0.504, 0.709]" in ours["000000296284"].splitlines()


def test_file_without_captions_is_named(tmp_path):
    (tmp_path / "rows.json").write_text('[{"id": 1, "image": "a.png"}]')
    with pytest.raises(UserError, match="rows.json: not a file of captions .*captions"):
        read_captions(tmp_path / "rows.json")
