"""Corruptions against recorded outputs of imagecorruptions-imaug 1.1.5."""

import hashlib
import json
from importlib.util import find_spec

import numpy as np
import pytest
from PIL import Image

from mmalign.errors import UserError
from mmalign.evaluation.corruptions import CORRUPTIONS, corrupt, parse_corruptions

OWN = [name for name in CORRUPTIONS if name != "frost"]
DETERMINISTIC = ["gaussian_blur", "defocus_blur", "zoom_blur", "brightness", "contrast"]
DETERMINISTIC += ["pixelate", "jpeg_compression", "saturate"]
needs_frost = pytest.mark.skipif(
    find_spec("imagecorruptions") is None, reason="frost needs imagecorruptions-imaug's pictures"
)


@pytest.fixture(scope="module")
def recorded(shared_data):
    """(picture, what was recorded of it) of two photos in two sizes."""
    pairs = []
    for entry in json.loads((shared_data / "formats" / "corruptions.json").read_text())["images"]:
        image = Image.open(shared_data / entry["file"]).convert("RGB")
        image = image.resize((entry["width"], entry["height"]), Image.Resampling.BICUBIC)
        assert hashlib.sha256(np.asarray(image).tobytes()).hexdigest() == entry["input_sha256"]
        pairs.append((image, entry))
    return pairs


def changed(image, name, severity, seed=0):
    """(pixels, mean absolute difference to the picture)"""
    pixels = np.asarray(corrupt(image, name, severity, "picture.jpg", seed)).astype(float)
    return pixels, np.abs(pixels - np.asarray(image)).mean()


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_deterministic(recorded, name):
    for image, entry in recorded:
        places = np.ix_(entry["sample_rows"], entry["sample_columns"])
        for severity, expected in entry["deterministic"][name].items():
            pixels, difference = changed(image, name, int(severity))
            assert pixels.mean((0, 1)) == pytest.approx(expected["mean"], abs=0.05)
            assert pixels.std((0, 1)) == pytest.approx(expected["std"], abs=0.05)
            assert difference == pytest.approx(expected["mad"], abs=0.05)
            assert np.abs(pixels[places] - expected["pixels"]).max() <= 1


@pytest.mark.parametrize(
    "name", [x for x in OWN if x not in DETERMINISTIC] + [pytest.param("frost", marks=needs_frost)]
)
def test_random(recorded, name):
    """The mean of ten draws lies within the range of the ten that were recorded."""
    for image, entry in recorded:
        for severity, expected in entry["random"][name].items():
            draws = [changed(image, name, int(severity), seed)[1] for seed in range(10)]
            assert expected["min"] < np.mean(draws) < expected["max"], (severity, draws)
            assert len(set(draws)) > 5


@pytest.mark.parametrize("name", OWN)
def test_any_picture(name):
    noise = np.random.default_rng(0).integers(256, size=(33, 47, 4), dtype=np.uint8)
    for mode in ("RGBA", "RGB", "L"):
        image = Image.fromarray(noise).convert(mode)
        for severity in range(1, 6):
            found = corrupt(image, name, severity, "a.jpg")
            assert (found.mode, found.size) == ("RGB", image.size)
        assert corrupt(image, name, 0, "a.jpg").tobytes() == image.convert("RGB").tobytes()


@pytest.mark.parametrize("name", [x for x in OWN if x not in DETERMINISTIC])
def test_random_numbers_belong_to_the_picture(recorded, name):
    image = recorded[0][0]
    first = corrupt(image, name, 3, "a.jpg", seed=1).tobytes()
    np.random.seed(0)
    assert corrupt(image, name, 3, "a.jpg", seed=1).tobytes() == first
    assert corrupt(image, name, 3, "b.jpg", seed=1).tobytes() != first
    assert corrupt(image, name, 3, "a.jpg", seed=2).tobytes() != first


def test_change_grows_with_severity(recorded):
    image = recorded[1][0]
    for name in set(OWN) - {"saturate", "spatter"}:
        differences = [changed(image, name, severity)[1] for severity in (1, 3, 5)]
        assert differences == sorted(differences), name


def test_arguments():
    assert parse_corruptions(["fog:1,5", "snow"]) == [
        *(("fog", 1), ("fog", 5)),
        *(("snow", 1), ("snow", 3), ("snow", 5)),
    ]
    assert len(parse_corruptions(["all"])) == 3 * 19
    with pytest.raises(UserError, match="unknown corruption 'rain'"):
        parse_corruptions(["rain:1"])
    with pytest.raises(UserError, match="severity '6'"):
        parse_corruptions(["fog:6"])
    image = Image.new("RGB", (40, 40))
    with pytest.raises(UserError, match="severity is 6"):
        corrupt(image, "fog", 6, "a.jpg")


@pytest.mark.skipif(find_spec("imagecorruptions") is not None, reason="the package is there")
def test_frost_names_its_package():
    with pytest.raises(UserError, match="pip install imagecorruptions-imaug"):
        corrupt(Image.new("RGB", (40, 40)), "frost", 1, "a.jpg")
