"""preprocessor_config.json: what it says is used, exported again, or refused by its name."""

import json

import pytest
from transformers import CLIPImageProcessor

from mmalign.errors import UserError
from mmalign.model.hf import export_vision_tower, load_vision_tower
from mmalign.model.preprocessing import Preprocessing
from tests.model.tiny import hf_clip

# as published: openai/clip-vit-large-patch14 and llava-hf/llava-1.5-7b-hf, in another size
CLIP = {
    "crop_size": 28,
    "do_center_crop": True,
    "do_normalize": True,
    "do_resize": True,
    "feature_extractor_type": "CLIPFeatureExtractor",
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "size": 28,
}
LLAVA = CLIP | {
    "crop_size": {"height": 28, "width": 28},
    "do_rescale": True,
    "image_processor_type": "CLIPImageProcessor",
    "rescale_factor": 0.00392156862745098,
    "size": {"shortest_edge": 28},
}


def read(folder, hf: dict) -> Preprocessing:
    (folder / "preprocessor_config.json").write_text(json.dumps(hf))
    return Preprocessing.from_hf(folder, 28)


def test_published_files_are_stock_clip(tmp_path):
    stock = Preprocessing(28, 28)
    assert Preprocessing.from_hf(tmp_path, 28) == stock
    assert read(tmp_path, CLIP) == read(tmp_path, LLAVA) == read(tmp_path, {}) == stock


def test_what_it_says_reaches_the_tower_and_the_export(tmp_path):
    hf_clip().save_pretrained(tmp_path)
    expected = read(tmp_path, LLAVA | {"image_mean": [0.5] * 3, "size": {"shortest_edge": 40}})
    assert (expected.size, expected.crop_size, expected.image_mean) == (40, 28, (0.5,) * 3)
    tower = load_vision_tower(tmp_path)
    assert tower.config.preprocessing == expected
    assert tower.pixels.mean.flatten().tolist() == [0.5] * 3
    export_vision_tower(tower, tmp_path / "out")
    theirs = CLIPImageProcessor.from_pretrained(tmp_path / "out")
    assert list(theirs.image_mean) == [0.5] * 3 and theirs.size == {"shortest_edge": 40}
    assert load_vision_tower(tmp_path / "out").config == tower.config


def test_transformers_5_keeps_it_in_processor_config(tmp_path):
    settings = {"image_processor": LLAVA | {"image_std": [0.5] * 3}}
    (tmp_path / "processor_config.json").write_text(json.dumps(settings))
    assert Preprocessing.from_hf(tmp_path, 28).image_std == (0.5,) * 3


@pytest.mark.parametrize(
    "change, message",
    [
        ({"do_center_crop": False}, "size is .*; expected one number for height and width"),
        ({"size": {"height": 28, "width": 28}}, "expected one number for shortest_edge"),
        ({"size": {"shortest_edge": 28, "longest_edge": 40}}, "expected one number for shortest"),
        ({"size": {"shortest_edge": 20}}, "size is .*; expected at least crop_size, 28"),
        ({"crop_size": {"height": 28, "width": 30}}, "expected one number for height and width"),
        ({"crop_size": 56}, "crop_size is 56; expected image_size of the vision tower, 28"),
        ({"resample": 2}, "resample is 2; supported: 3"),
        ({"rescale_factor": 1.0}, "rescale_factor is 1.0"),
        ({"image_mean": [0.5, 0.5]}, "expected three numbers"),
        ({"image_std": [0.5, 0.5, 0]}, r"image_std\.2 is 0"),
        ({"image_std": [0.5, float("nan"), 1]}, r"image_std\.1 is nan"),
        ({"image_processor_type": "SiglipImageProcessor"}, "is 'SiglipImageProcessor'"),
    ],
)
def test_other_steps_are_refused(tmp_path, change, message):
    with pytest.raises(UserError, match=rf"preprocessor_config\.json: .*{message}"):
        read(tmp_path, LLAVA | change)
