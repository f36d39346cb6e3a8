"""Controls of the pictures: shuffled, blank, or a caption in their place."""

import io
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmalign.data.controls import CONTROLS
from mmalign.data.controls.pictures import deranged
from mmalign.errors import SampleError, UserError
from tests.data.test_controls import apply


def test_shuffled_images_are_the_same_pictures_and_none_stays(rows, text_rows, count):
    controlled = apply("shuffle-images", rows, text_rows, count)
    for before, after in zip(rows, controlled.records, strict=True):
        assert before["conversations"] == after["conversations"]
        assert ("image" in before) == ("image" in after)
        assert "image" not in before or before["image"] != after["image"]
    images = [Counter(row.get("image") for row in x) for x in (rows, controlled.records)]
    assert images[0] == images[1]
    assert controlled.about == {"images": 15, "unchanged": 0}


@pytest.mark.parametrize("seed", range(20))
def test_deranged_keeps_no_label_wherever_that_is_possible(seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, rng.integers(1, 6), size=rng.integers(1, 30))
    given = deranged(labels, np.random.RandomState(seed))
    assert sorted(given) == list(range(len(labels)))
    most = np.bincount(labels).max()
    unavoidable = max(0, 2 * most - len(labels))  # the most frequent one has no other place
    assert (labels[given] == labels).sum() == unavoidable


def test_deranged_is_uniform_among_derangements():
    counts = Counter(
        tuple(deranged(np.arange(4), np.random.RandomState(seed)).tolist()) for seed in range(3000)
    )
    assert len(counts) == 9  # the derangements of four
    assert min(counts.values()) > 3000 / 9 / 2


def test_one_picture_for_all_is_reported_as_unchanged(rows):
    for row in rows:
        row["image"] = "1.png"
    assert CONTROLS["shuffle-images"](rows, 0).about["unchanged"] == 20


def test_blank_image_is_clips_mean_colour(rows, text_rows, count):
    control, controlled = CONTROLS["blank-image"], apply("blank-image", rows, text_rows, count)
    [(name, content)] = control.files.items()
    images = {row["image"] for row in controlled.records if "image" in row}
    assert images == {name}
    pixels = np.asarray(Image.open(io.BytesIO(content()))) / 255
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    assert np.abs((pixels - mean) / std).max() < 0.01


def test_caption_stands_where_the_image_stood(rows, text_rows, count):
    after = apply("caption-for-image", rows, text_rows, count).records
    for i, (before, row) in enumerate(zip(rows, after, strict=True)):
        assert "image" not in row
        if "image" not in before:
            assert row == before
            continue
        caption = f"caption {Path(before['image']).stem}"
        wanted = before["conversations"][0]["value"].replace("<image>", caption)
        assert row["conversations"][0]["value"] == wanted, i
        assert row["conversations"][1:] == before["conversations"][1:]


def test_samples_without_captions_are_named(rows):
    with pytest.raises(UserError, match="11 of 20 samples: sample-2, .*, sample-18 and 1 more"):
        CONTROLS["caption-for-image"](rows, 0, {"1": "a boat"})


def test_image_without_a_place_is_named(rows, text_rows, count):
    rows[2]["conversations"][0]["value"] = "what is it"
    with pytest.raises(SampleError, match="sample 'sample-2': 1 images, but 0 <image>"):
        apply("caption-for-image", rows, text_rows, count)


def test_several_pictures_of_a_sample(rows):
    several = [
        {"from": "human", "value": "<image> or <image>"},
        {"from": "gpt", "value": "boat " * 11},
        {"from": "human", "value": "and <image>?"},
        {"from": "gpt", "value": "a"},
    ]
    rows[1] |= {"image": ["1.png", "2.png", "3.png"], "conversations": several}
    shuffled = CONTROLS["shuffle-images"](rows, 0)
    assert shuffled.about["images"] == 17 and shuffled.about["unchanged"] == 0
    assert len(shuffled.records[1]["image"]) == 3
    assert isinstance(shuffled.records[2]["image"], str)
    assert CONTROLS["blank-image"](rows, 0).records[1]["image"] == ["blank.png"] * 3
    captions = {f"{i}": f"caption {i}" for i in range(20)}
    row = CONTROLS["caption-for-image"](rows, 0, captions).records[1]
    questions = [turn["value"] for turn in row["conversations"][::2]]
    assert questions == ["caption 1 or caption 2", "and caption 3?"] and "image" not in row
    row = next(x for x in CONTROLS["short-answers"](rows, 0).records if x["id"] == "sample-1")
    assert row["conversations"][0]["value"] == "<image>\n" * 3 + "and ?"
    assert len(row["image"]) == 3
