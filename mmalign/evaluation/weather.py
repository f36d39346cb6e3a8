"""The corruptions of corruptions.py that add something to a picture: snow, frost, fog, spatter."""

import math
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage

from mmalign.errors import UserError

Random = np.random.Generator
_WATER = np.array((175, 238, 238)) / 255  # pale turquoise
_MUD = np.array((63, 42, 20)) / 255
_GREY = np.array((0.299, 0.587, 0.114))


def gaussian(x: np.ndarray, sigma: float) -> np.ndarray:
    """Blurs height and width."""
    sigmas = (sigma, sigma) + (0,) * (x.ndim - 2)
    return ndimage.gaussian_filter(x, sigmas, mode="nearest", truncate=4)


def zoomed(x: np.ndarray, factor: float) -> np.ndarray:
    """The centre, enlarged to at least the size of x: (height, width) or with channels."""
    cut = []
    for size in x.shape[:2]:
        kept = math.ceil(size / factor)
        begin = (size - kept) // 2
        cut.append(slice(begin, begin + kept))
    factors = (factor, factor) + (1,) * (x.ndim - 2)
    return np.asarray(ndimage.zoom(x[tuple(cut)], factors, order=1))


def motion(x: np.ndarray, radius: int, sigma: float, angle: float) -> np.ndarray:
    """Mean of 2 * radius + 1 copies along a line, degrees, weighted by one half of a Gaussian."""
    steps = np.arange(2 * radius + 1)
    weights = np.exp(-(steps**2) / (2 * sigma**2))
    weights /= weights.sum()
    rows, columns = np.arange(x.shape[0]), np.arange(x.shape[1])
    down, right = math.sin(math.radians(angle)), math.cos(math.radians(angle))
    blurred = np.zeros_like(x)
    for step, weight in zip(steps.tolist(), weights, strict=True):
        dy, dx = -math.ceil(step * down - 0.5), -math.ceil(step * right - 0.5)
        if abs(dy) >= len(rows) or abs(dx) >= len(columns):
            break
        down_to = np.clip(rows - dy, 0, len(rows) - 1)
        right_to = np.clip(columns - dx, 0, len(columns) - 1)
        blurred += weight * x[down_to][:, right_to]
    return blurred


def snow(x: np.ndarray, c: tuple, random: Random) -> np.ndarray:
    mean, spread, zoom, threshold, radius, sigma, share = c
    height, width = x.shape[:2]
    layer = zoomed(random.normal(mean, spread, size=(height, width)), zoom)
    layer = np.clip(np.where(layer < threshold, 0, layer), 0, 1)
    layer = motion(layer, radius, sigma, random.uniform(-135, -45))
    layer = np.round(layer * 255)[:height, :width, None] / 255
    pale = np.maximum(x, (x @ _GREY)[..., None] * 1.5 + 0.5)
    return share * x + (1 - share) * pale + layer + np.rot90(layer, 2)


def fog(x: np.ndarray, c: tuple[float, float], random: Random) -> np.ndarray:
    amount, decay = c
    height, width = x.shape[:2]
    size = 1 << (max(height, width) - 1).bit_length()
    cloud = _plasma(size, decay, random)[:height, :width, None]
    return (x + amount * cloud) * x.max() / (x.max() + amount)


def _plasma(size: int, decay: float, random: Random) -> np.ndarray:
    """A fractal height map from 0 to 1 by diamonds and squares; size is a power of 2."""
    heights, wobble, step = np.zeros((size, size)), 100.0, size

    def mean(total: np.ndarray) -> np.ndarray:
        return total / 4 + wobble * random.uniform(-wobble, wobble, total.shape)

    while step >= 2:
        half = step // 2
        corners = heights[::step, ::step]
        pairs = corners + np.roll(corners, -1, axis=0)
        heights[half::step, half::step] = mean(pairs + np.roll(pairs, -1, axis=1))
        centres = heights[half::step, half::step]
        above, left = np.roll(centres, 1, axis=0), np.roll(centres, 1, axis=1)
        heights[::step, half::step] = mean(centres + above + corners + np.roll(corners, -1, axis=1))
        heights[half::step, ::step] = mean(centres + left + corners + np.roll(corners, -1, axis=0))
        step, wobble = half, wobble / decay
    heights -= heights.min()
    return heights / heights.max()


def spatter(x: np.ndarray, c: tuple, random: Random) -> np.ndarray:
    mean, spread, sigma, threshold, strength, is_mud = c
    layer = gaussian(random.normal(mean, spread, size=x.shape[:2]), sigma)
    if is_mud:
        drops = gaussian((layer > threshold).astype(np.float64), strength)
        drops = np.where(drops < 0.8, 0, drops)[..., None]
        return x * (1 - drops) + _MUD * drops
    layer = (np.where(layer < threshold, 0, layer) * 255).astype(np.uint8)
    drops = layer * _refraction(layer)
    if drops.max() > 0:
        drops /= drops.max()
    return x + strength * drops[..., None] * _WATER


def _refraction(layer: np.ndarray) -> np.ndarray:
    """Light on drops: an embossed distance to their edges, 0 to 255."""
    distance = np.minimum(np.asarray(ndimage.distance_transform_edt(~_edges(layer))), 20)
    distance = ndimage.uniform_filter(distance, 3, mode="mirror").astype(np.uint8)
    emboss = np.array([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]])
    lit = ndimage.correlate(_equalised(distance).astype(np.int64), emboss, mode="mirror")
    return np.round(ndimage.uniform_filter(lit.clip(0, 255).astype(np.float64), 3, mode="mirror"))


def _edges(layer: np.ndarray, low: int = 50, high: int = 150) -> np.ndarray:
    """Canny's, bool: ridges of the gradient above `low` that touch one above `high`."""
    dy, dx = (ndimage.sobel(layer.astype(np.int64), axis, mode="nearest") for axis in (0, 1))
    size = np.pad(abs(dx) + abs(dy), 1)
    middle, tangent = size[1:-1, 1:-1], math.tan(math.radians(22.5))
    across, along = abs(dy) < tangent * abs(dx), abs(dy) > abs(dx) / tangent
    falling = dx * dy < 0
    height, width = layer.shape

    def shifted(down: int, right: int) -> np.ndarray:
        return size[1 + down : 1 + down + height, 1 + right : 1 + right + width]

    cases = [across, along, falling]
    before = np.select(cases, [shifted(0, -1), shifted(-1, 0), shifted(-1, 1)], shifted(-1, -1))
    after = np.select(cases, [shifted(0, 1), shifted(1, 0), shifted(1, -1)], shifted(1, 1))
    straight = across | along
    ridge = (middle > low) & (middle > before) & np.where(straight, middle >= after, middle > after)
    regions = np.empty(layer.shape, np.int32)
    ndimage.label(ridge, np.ones((3, 3)), output=regions)
    strong = np.unique(regions[ridge & (middle > high)])
    return np.isin(regions, strong[strong > 0])


def _equalised(values: np.ndarray) -> np.ndarray:
    """uint8 with a flat histogram."""
    counts = np.bincount(values.ravel(), minlength=256)
    first = int(np.flatnonzero(counts)[0])
    if counts[first] == values.size:
        return values
    total = counts.cumsum() - counts[first]
    return (
        np.round(total * (255 / (values.size - counts[first])))
        .clip(0, 255)
        .astype(np.uint8)[values]
    )


def frost(x: np.ndarray, c: tuple[float, float], random: Random) -> np.ndarray:
    share, amount = c
    image, (height, width) = _frost_picture(int(random.integers(6))), x.shape[:2]
    scale = 1.1 * max(1.0, height / image.height, width / image.width)
    size = (math.ceil(image.width * scale), math.ceil(image.height * scale))
    pixels = np.asarray(image.resize(size, Image.Resampling.BICUBIC)) / 255
    top, left = random.integers(0, (len(pixels) - height, pixels.shape[1] - width))
    return share * x + amount * pixels[top : top + height, left : left + width]


@cache
def _frost_picture(index: int) -> Image.Image:
    kind = "png" if index < 3 else "jpg"
    return Image.open(frost_folder() / f"frost{index + 1}.{kind}").convert("RGB")


def frost_folder() -> Path:
    """imagecorruptions-imaug's six pictures, without importing it: it needs OpenCV and numba."""
    package = find_spec("imagecorruptions")
    if package is None or not package.submodule_search_locations:
        raise UserError(
            "frost needs the frost pictures of a package: pip install imagecorruptions-imaug "
            "(or mmalign[corruptions]), or leave frost out of --corruptions"
        )
    return Path(package.submodule_search_locations[0]) / "frost"
