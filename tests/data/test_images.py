"""Images against transformers' CLIPImageProcessor (the PIL version) fed as LLaVA feeds it."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, LlavaImageProcessorPil

from mmalign.data.archive import MAX_PICTURE_BYTES
from mmalign.data.images import check_image, load_image
from mmalign.errors import UserError
from mmalign.model.preprocessing import Preprocessing

PHOTOS = ("alpaca.png", "bard.jpg", "extreme_ironing.jpg", "llama.jpg", "llava_v1_5_radar.jpg")
PHOTOS += ("vicuna.jpeg", "waterview.jpg")


def square(side: int) -> Preprocessing:
    return Preprocessing(size=side, crop_size=side)


def clip_pixels(path: Path, preprocessing: Preprocessing) -> np.ndarray:
    crop_size = preprocessing.crop_size
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": preprocessing.size},
        crop_size={"height": crop_size, "width": crop_size},
        do_rescale=False,
        do_normalize=False,
    )
    image = Image.open(path).convert("RGB")
    return np.asarray(processor(image, return_tensors="np")["pixel_values"][0])


def assert_within_one_level(path: Path, preprocessing: Preprocessing) -> None:
    ours, crop_size = load_image(path, preprocessing), preprocessing.crop_size
    assert ours.dtype == torch.uint8 and ours.shape == (3, crop_size, crop_size)
    theirs = clip_pixels(path, preprocessing).astype(int)
    assert np.abs(ours.numpy().astype(int) - theirs).max() <= 1


READERS = [
    lambda path: load_image(path, square(1000)),
    lambda path: check_image(path, square(1000)),
]


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("size, crop_size", [(28, 28), (224, 224), (336, 336), (256, 224)])
@pytest.mark.parametrize("name", PHOTOS)
def test_photos_equal_clip(shared_data, name, size, crop_size):
    assert_within_one_level(shared_data / "llava/images" / name, Preprocessing(size, crop_size))


# (height, width): enlarged, equal, one off, long, wide, rounding of the long side, halved and less
SHAPES = [(1, 1), (5, 90), (30, 7), (224, 224), (224, 225), (225, 224), (37, 64), (900, 20)]
SHAPES += [(223, 500), (17, 1000), (448, 449), (447, 600), (451, 1333), (900, 700)]


@pytest.mark.parametrize("height, width", SHAPES)
def test_noise_of_any_shape_equals_clip(tmp_path, height, width):
    rng = np.random.default_rng(height * width)
    pixels = rng.integers(0, 2, (height, width, 3), dtype=np.uint8) * 255  # the worst for rounding
    Image.fromarray(pixels).save(tmp_path / "noise.png", compress_level=0)
    assert_within_one_level(tmp_path / "noise.png", square(224))


@pytest.mark.parametrize(
    "mode, suffix",
    [("L", "png"), ("1", "png"), ("P", "png"), ("P", "gif"), ("LA", "png"), ("RGBA", "png")]
    + [("CMYK", "jpg"), ("L", "jpg"), ("RGB", "webp"), ("RGB", "bmp")],
)
def test_modes_equal_clip(tmp_path, mode, suffix):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (90, 120, 3), dtype=np.uint8)).convert(mode)
    if mode == "RGBA":
        image.putalpha(Image.fromarray(rng.integers(0, 256, (90, 120), dtype=np.uint8)))
    path = tmp_path / f"image.{suffix}"
    image.save(path)
    assert Image.open(path).mode == mode
    assert_within_one_level(path, square(56))


def test_exif_orientation_is_left_alone(tmp_path):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[274] = 6  # stored on its side
    image.save(tmp_path / "rotated.jpg", exif=exif)
    image.save(tmp_path / "plain.jpg")
    rotated, plain = (
        load_image(tmp_path / name, square(28)) for name in ("rotated.jpg", "plain.jpg")
    )
    assert torch.equal(rotated, plain)
    assert_within_one_level(tmp_path / "rotated.jpg", square(28))


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("name", ["waterview.jpg", "extreme_ironing.jpg", "alpaca.png"])
def test_truncated_photos_are_refused(shared_data, tmp_path, name, read):
    content = (shared_data / "llava/images" / name).read_bytes()
    for share in (0.0, 0.01, 0.3, 0.6, 0.9, 0.97):
        (tmp_path / name).write_bytes(content[: int(len(content) * share)])
        with pytest.raises(UserError, match=f"{name} cannot be decoded"):
            read(tmp_path / name)


@pytest.mark.parametrize("read", READERS)
def test_other_unusable_files(tmp_path, monkeypatch, read):
    with pytest.raises(UserError, match="no file .*absent.jpg"):
        read(tmp_path / "absent.jpg")
    with pytest.raises(UserError, match="is a folder, expected a regular file"):
        read(tmp_path)
    os.mkfifo(tmp_path / "endless.jpg")  # nobody writes to it
    with pytest.raises(UserError, match="endless.jpg is a FIFO"):
        read(tmp_path / "endless.jpg")
    with pytest.raises(UserError, match="/dev/zero is a device"):
        read(Path("/dev/zero"))
    others = {"<html>404</html>": "a web page", "version https://git-lfs": "a git-LFS pointer"}
    for text, kind in (others | {"": "empty", "text": "not one of JPEG, PNG"}).items():
        (tmp_path / "other.jpg").write_text(text)
        with pytest.raises(UserError, match=f"other.jpg cannot be decoded: it is {kind}"):
            read(tmp_path / "other.jpg")
    deep = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64) * 15
    Image.fromarray(deep).save(tmp_path / "deep.png")  # PIL would clip it to white
    with pytest.raises(UserError, match="deep.png has mode I;16, more than 8 bits"):
        read(tmp_path / "deep.png")
    Image.new("RGB", (40, 50)).save(tmp_path / "large.png")
    for limit in (1500, 500):  # PIL warns of the first and refuses the second
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(UserError, match="large.png is too large"):
            read(tmp_path / "large.png")


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("width, height", [(150_000, 1), (1, 2_000_000)])
def test_a_thread_of_an_image_is_refused_before_it_fills_memory(tmp_path, read, width, height):
    Image.new("L", (width, height)).save(tmp_path / "thread.png")
    with pytest.raises(UserError, match=f"thread.png is {width} x {height}: .* Crop the image"):
        read(tmp_path / "thread.png")


@pytest.mark.parametrize("read", READERS)
def test_a_file_too_large_to_read_is_refused_by_its_size(tmp_path, read):
    with open(tmp_path / "hole.webp", "wb") as file:
        file.write(b"RIFF\0\0\0\x7fWEBPVP8 ")
        file.truncate(MAX_PICTURE_BYTES + 1)  # takes no space on the disk
    with pytest.raises(UserError, match="hole.webp is too large .268,435,457 bytes"):
        read(tmp_path / "hole.webp")


EPS = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"


@pytest.mark.parametrize("read", READERS)
def test_no_program_is_started_for_a_picture(tmp_path, monkeypatch, read):
    """Pillow hands an EPS to Ghostscript, whatever the file's name."""
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/CALLED\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)  # looked for anew
    (tmp_path / "a.jpg").write_text(EPS)
    with pytest.raises(UserError, match="a.jpg cannot be decoded: it is not one of JPEG, PNG"):
        read(tmp_path / "a.jpg")
    assert not (tmp_path / "CALLED").exists()
    with pytest.raises(OSError):  # what the explicit list of formats keeps out
        Image.open(tmp_path / "a.jpg").load()
    assert (tmp_path / "CALLED").exists()


@pytest.mark.parametrize("shape", [(60, 33), (33, 60), (40, 40)])
def test_padding_is_that_of_llava(tmp_path, shape):
    """LlavaImageProcessor with do_pad: a square with the mean's colour, then CLIP's steps."""
    picture = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path / "picture.png")
    preprocessing = replace(Preprocessing.stock(28, is_clip=True), do_pad=True)
    pixels = load_image(tmp_path / "picture.png", preprocessing)
    settings = preprocessing.to_hf(is_clip=True)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    processor = LlavaImageProcessorPil.from_pretrained(tmp_path)
    assert settings["image_processor_type"] == "LlavaImageProcessor" and processor.do_pad
    theirs = processor(
        Image.fromarray(picture), do_rescale=False, do_normalize=False, return_tensors="pt"
    )["pixel_values"][0]
    assert (pixels.int() - theirs.int()).abs().max() <= 2
    assert Preprocessing.from_hf(tmp_path, 28) == preprocessing


def test_a_square_that_would_not_fit_into_memory_is_refused(tmp_path):
    Image.new("RGB", (20000, 1)).save(tmp_path / "line.png")
    preprocessing = replace(Preprocessing.stock(28, is_clip=True), do_pad=True)
    with pytest.raises(UserError, match="400000000 pixels"):
        load_image(tmp_path / "line.png", preprocessing)
