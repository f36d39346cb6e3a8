"""ImageNet-C's corruptions of pictures: 19 types, severities 1 to 5 (Hendrycks, Dietterich 2019).

Parameters and formulas are those of the packages imagecorruptions and imagecorruptions-imaug, which
work on pictures of any size; there ImageNet-C's own motion blur (ImageMagick) and affine part of
elastic_transform are left out. A severity is milder for a model the larger the picture is before
it is resized. frost needs the package's frost pictures: pip install imagecorruptions-imaug.

Random numbers depend on seed, picture, type and severity alone: any subset, order or number of
worker processes gives the same pixels.
"""

import io
from collections.abc import Callable, Sequence
from typing import Any
from zlib import crc32

import numpy as np
import torch
from PIL import Image
from scipy import ndimage

from mmalign.errors import UserError
from mmalign.evaluation.weather import fog, frost, gaussian, motion, snow, spatter, zoomed

Random = np.random.Generator
# (picture (height, width, 3) fp64 from 0 to 1, parameters, random) -> the same, not yet clipped
Corruption = Callable[[np.ndarray, Any, Random], np.ndarray]


def corrupt(
    image: Image.Image, name: str, severity: int, picture: str, seed: int = 0
) -> Image.Image:
    """The corrupted picture, RGB and of the same size; severity 0 is the picture as it is.

    picture: its name, which with the seed decides the random numbers. Raises UserError for an
    unknown corruption or severity, and where an optional package is missing.
    """
    if name not in CORRUPTIONS:
        raise UserError(f"unknown corruption {name!r}; expected one of {', '.join(CORRUPTIONS)}")
    if severity not in range(6):
        raise UserError(f"{name}: severity is {severity}; expected 0 (none) to 5")
    if severity == 0:
        return image.convert("RGB")
    function, by_severity = CORRUPTIONS[name]
    numbers = (seed, crc32(picture.encode()), list(CORRUPTIONS).index(name), severity)
    random = np.random.default_rng(np.random.SeedSequence(numbers))
    pixels = np.asarray(image.convert("RGB")) / 255.0
    changed = np.clip(function(pixels, by_severity[severity - 1], random), 0, 1)
    return Image.fromarray((changed * 255).astype(np.uint8))  # cut, not rounded, as published


def parse_corruptions(texts: Sequence[str]) -> list[tuple[str, int]]:
    """(name, severity) of each "name:1,3,5"; a name alone stands for 1, 3 and 5, all for all.

    Raises UserError for what is none of these.
    """
    wanted = []
    for text in texts:
        name, _, severities = text.partition(":")
        names = list(CORRUPTIONS) if name == "all" else [name]
        if names[0] not in CORRUPTIONS:
            known = ", ".join(CORRUPTIONS)
            raise UserError(f"unknown corruption {name!r}; expected all, or one of {known}")
        levels = severities.split(",") if severities else ["1", "3", "5"]
        if unknown := [x for x in levels if x not in ("1", "2", "3", "4", "5")]:
            raise UserError(
                f"--corruptions {text}: severity {unknown[0]!r}; expected numbers from 1 to 5, "
                f"for instance {names[0]}:1,3,5"
            )
        wanted += [(x, int(level)) for x in names for level in levels]
    return list(dict.fromkeys(wanted))


# ---- noise ----


def _gaussian_noise(x: np.ndarray, scale: float, random: Random) -> np.ndarray:
    return x + random.normal(scale=scale, size=x.shape)


def _shot_noise(x: np.ndarray, photons: float, random: Random) -> np.ndarray:
    return random.poisson(x * photons) / photons


def _impulse_noise(x: np.ndarray, share: float, random: Random) -> np.ndarray:
    is_noise, salt = random.random(x.shape) <= share, random.random(x.shape) <= 0.5
    return np.where(is_noise, salt, x)


def _speckle_noise(x: np.ndarray, scale: float, random: Random) -> np.ndarray:
    return x + x * random.normal(scale=scale, size=x.shape)


# ---- blur ----


def _gaussian_blur(x: np.ndarray, sigma: float, random: Random) -> np.ndarray:
    return gaussian(x, sigma)


def _glass_blur(x: np.ndarray, c: tuple[float, int, int], random: Random) -> np.ndarray:
    """Every pixel from one nearby, row by row from the bottom, between two blurs.

    The published code means to swap the two, but assigns views: one of them is copied.
    """
    sigma, most, num_passes = c
    pixels = (gaussian(x, sigma) * 255).astype(np.uint8)
    height, width = pixels.shape[:2]
    rows = np.arange(height - most, most, -1)
    columns = np.arange(width - most, most, -1)
    places = (rows[:, None] * width + columns).ravel()
    order = list(range(height * width))
    for _ in range(num_passes):
        moves = random.integers(-most, most, size=(2, len(places)))
        others = places + moves[0] * width + moves[1]
        for a, b in zip(places.tolist(), others.tolist(), strict=True):
            order[a] = order[b]
    return gaussian(pixels.reshape(-1, 3)[order].reshape(pixels.shape) / 255.0, sigma)


def _defocus_blur(x: np.ndarray, c: tuple[int, float], random: Random) -> np.ndarray:
    """A disk, antialiased by a Gaussian of 3 or 5 pixels, with the picture mirrored outside."""
    radius, alias = c
    half, reach = (8, 1) if radius <= 8 else (radius, 2)
    line = np.arange(-half, half + 1)
    disk = (line[:, None] ** 2 + line**2 <= radius**2).astype(np.float64)
    disk /= disk.sum()  # before the mirrored border of the next lines adds to it
    weights = np.exp(-(np.arange(-reach, reach + 1) ** 2) / (2 * alias**2))
    for axis in (0, 1):
        disk = ndimage.correlate1d(disk, weights / weights.sum(), axis, mode="mirror")
    padded = np.pad(x, ((half, half), (half, half), (0, 0)), mode="reflect")
    kernel = torch.from_numpy(disk)[None, None]
    blurred = torch.nn.functional.conv2d(torch.from_numpy(padded).permute(2, 0, 1)[:, None], kernel)
    return blurred[:, 0].permute(1, 2, 0).numpy()


def _motion_blur(x: np.ndarray, c: tuple[int, float], random: Random) -> np.ndarray:
    return motion(x, *c, angle=random.uniform(-45, 45))


def _zoom_blur(x: np.ndarray, factors: np.ndarray, random: Random) -> np.ndarray:
    x = x.astype(np.float32)
    height, width = x.shape[:2]
    layers = (zoomed(x, factor)[:height, :width] for factor in factors)
    return (x + sum(layers)) / (len(factors) + 1)


# ---- weather and colour ----


def _brightness(x: np.ndarray, more: float, random: Random) -> np.ndarray:
    """Of HSV the value grows: a colour is scaled, black becomes grey."""
    value = x.max(2, keepdims=True)
    brighter = np.minimum(value + more, 1)
    return np.where(value > 0, x / np.where(value > 0, value, 1), 1) * brighter


def _saturate(x: np.ndarray, c: tuple[float, float], random: Random) -> np.ndarray:
    """Of HSV the saturation; grey has hue 0, red."""
    value, least = x.max(2, keepdims=True), x.min(2, keepdims=True)
    spread = value - least
    below = np.where(spread > 0, (value - x) / np.where(spread > 0, spread, 1), (0.0, 1.0, 1.0))
    saturation = np.clip(spread / np.where(value > 0, value, 1) * c[0] + c[1], 0, 1)
    return value * (1 - saturation * below)


def _contrast(x: np.ndarray, factor: float, random: Random) -> np.ndarray:
    mean = x.mean((0, 1), keepdims=True)
    return (x - mean) * factor + mean


# ---- digital ----


def _elastic_transform(x: np.ndarray, alpha: float, random: Random) -> np.ndarray:
    """Moves every pixel by a smooth random field."""
    size = x.shape[:2]
    most, sigma = size[0] * 0.005, np.array(size) * 0.01
    moves = [
        alpha * ndimage.gaussian_filter(noise, sigma, mode="reflect", truncate=3)
        for noise in random.uniform(-most, most, size=(2, *size))
    ]
    where = np.mgrid[: size[0], : size[1]] + moves
    channels = [
        ndimage.map_coordinates(x[..., i], where, order=1, mode="reflect") for i in range(3)
    ]
    return np.stack(channels, axis=2)


def _pixelate(x: np.ndarray, scale: float, random: Random) -> np.ndarray:
    image = _to_image(x)
    small = (max(1, int(image.width * scale)), max(1, int(image.height * scale)))
    coarse = image.resize(small, Image.Resampling.BOX)
    return _exact(coarse.resize(image.size, Image.Resampling.NEAREST))


def _jpeg_compression(x: np.ndarray, quality: int, random: Random) -> np.ndarray:
    file = io.BytesIO()
    _to_image(x).save(file, "JPEG", quality=quality)
    return _exact(Image.open(file))


def _to_image(x: np.ndarray) -> Image.Image:
    return Image.fromarray(np.round(x * 255).astype(np.uint8))


def _exact(image: Image.Image) -> np.ndarray:
    """Such that cutting 255 times it gives the picture back."""
    return (np.asarray(image) + 0.5) / 255.0


CORRUPTIONS: dict[str, tuple[Corruption, Sequence[Any]]] = {
    "gaussian_noise": (_gaussian_noise, (0.08, 0.12, 0.18, 0.26, 0.38)),
    "shot_noise": (_shot_noise, (60, 25, 12, 5, 3)),
    "impulse_noise": (_impulse_noise, (0.03, 0.06, 0.09, 0.17, 0.27)),
    "speckle_noise": (_speckle_noise, (0.15, 0.2, 0.35, 0.45, 0.6)),
    "gaussian_blur": (_gaussian_blur, (1, 2, 3, 4, 6)),
    "glass_blur": (_glass_blur, ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2))),
    "defocus_blur": (_defocus_blur, ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5))),
    "motion_blur": (_motion_blur, ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))),
    "zoom_blur": (
        _zoom_blur,
        [
            np.arange(1, last, step)
            for last, step in ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03))
        ],
    ),
    "snow": (
        snow,  # mean, spread, zoom, threshold, radius and sigma of the motion, share of the picture
        (
            (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
            (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
            (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
            (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
            (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
        ),
    ),
    "frost": (frost, ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75))),
    "fog": (fog, ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4))),
    "spatter": (
        spatter,  # mean, spread, sigma, threshold, intensity or sigma, whether it is mud
        (
            (0.65, 0.3, 4, 0.69, 0.6, False),
            (0.65, 0.3, 3, 0.68, 0.6, False),
            (0.65, 0.3, 2, 0.68, 0.5, False),
            (0.65, 0.3, 1, 0.65, 1.5, True),
            (0.67, 0.4, 1, 0.65, 1.5, True),
        ),
    ),
    "brightness": (_brightness, (0.1, 0.2, 0.3, 0.4, 0.5)),
    "saturate": (_saturate, ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2))),
    "contrast": (_contrast, (0.4, 0.3, 0.2, 0.1, 0.05)),
    "elastic_transform": (_elastic_transform, (12.5, 16.25, 21.25, 25, 30)),
    "pixelate": (_pixelate, (0.6, 0.5, 0.4, 0.3, 0.25)),
    "jpeg_compression": (_jpeg_compression, (25, 18, 15, 10, 7)),
}
