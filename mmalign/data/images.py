"""Images: file to uint8 pixels, resized and cropped as CLIP does, or as SigLIP and LLaVA 1.5 do.

Within one level of transformers' CLIPImageProcessor (the PIL version, before rescaling and
normalising): convert to RGB, resize the short side with antialiasing, crop the centre. EXIF
orientation is not applied, because neither CLIPImageProcessor nor LLaVA applies it, and an alpha
channel is dropped as in LLaVA's `Image.open(path).convert("RGB")` (transformers 5 would put the
image on white if it were given the channel).
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.nn.functional import interpolate

from mmalign.data.pictures import Picture, open_picture
from mmalign.errors import UserError
from mmalign.files import KIND_BYTES, kind_of
from mmalign.model.config import VisionConfig
from mmalign.model.preprocessing import Preprocessing
from mmalign.model.tiles import Grid, Pixels, Tiles, best_grid, size_in, token_rows

# Pillow has readers for many more; that of EPS, for one, starts Ghostscript on the file
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
# PIL converts these to RGB by clipping at 255: a 16-bit image becomes white
_DEEP_MODES = ("I", "I;16", "I;16L", "I;16B", "I;16N", "F")
# torch resizes 5 times faster than PIL, but differs by up to 2 levels where it enlarges or hardly
# shrinks; from a halving on by at most 1
_TORCH_RESIZE_SCALE = 2


def load_image(
    picture: Picture,
    preprocessing: Preprocessing,
    change: Callable[[Image.Image], Image.Image] = lambda image: image,
) -> Tensor:
    """Decode, resize and crop one image; change gets the whole of it, before it is resized.

    Returns:
        uint8 tensor (3, crop_size, crop_size), channels red, green, blue.
    Raises:
        UserError: the file is missing, not a regular one, of another format, broken, truncated,
            too large (as it is or resized) or deeper than 8 bits.
    """
    size, crop_size = preprocessing.size, preprocessing.crop_size
    image = change(_open_rgb(picture, preprocessing))
    if preprocessing.do_pad:
        image = _padded(image, preprocessing.background)
    height, width = _resized(image.height, image.width, preprocessing)
    if min(image.size) >= _TORCH_RESIZE_SCALE * size:
        # a view with channels last: the fast path of torch's uint8 resize
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        mode = preprocessing.resample
        pixels = interpolate(pixels[None], (height, width), mode=mode, antialias=True)[0]
    else:
        resample = Image.Resampling[preprocessing.resample.upper()]
        resized = image.resize((width, height), resample)
        pixels = torch.from_numpy(np.array(resized)).permute(2, 0, 1)  # (3, height, width)
    top, left = (height - crop_size) // 2, (width - crop_size) // 2
    return pixels[:, top : top + crop_size, left : left + crop_size].contiguous()


def load_picture(
    picture: Picture,
    vision: VisionConfig,
    change: Callable[[Image.Image], Image.Image] = lambda image: image,
) -> Pixels:
    """One image as the tower sees it: (1, 3, crop_size, crop_size), or the tiles of LLaVA 1.6.

    Raises UserError as load_image.
    """
    if not vision.grids:
        return load_image(picture, vision.preprocessing, change)[None]
    image, size = change(_open_rgb(picture, vision.preprocessing)), vision.image_size
    grid, rows = _tiled(image, vision)
    height, width = size_in(grid, image.height, image.width)
    resample = Image.Resampling[vision.preprocessing.resample.upper()]
    filled = Image.new("RGB", (grid[1], grid[0]))  # black where nothing of the image is
    place = (grid[1] - width) // 2, (grid[0] - height) // 2
    filled.paste(image.resize((width, height), resample), place)
    whole = _channels_first(image.resize((size, size), resample))
    tiles = _channels_first(filled).unfold(1, size, size).unfold(2, size, size)
    tiles = tiles.permute(1, 2, 0, 3, 4).flatten(0, 1)  # (num_tiles, 3, image_size, image_size)
    return Tiles(torch.cat((whole[None], tiles)), torch.from_numpy(rows), vision.num_patches)


def count_tiles(picture: Picture, vision: VisionConfig) -> tuple[int, int]:
    """Tiles and tokens of what load_picture returns, from the size that the file states.

    Raises UserError as load_image, but for what follows the file's header.
    """
    if not vision.grids:
        return 1, vision.num_patches
    with _opened(picture, vision.preprocessing) as image:
        grid, rows = _tiled(image, vision)
    return 1 + grid[0] * grid[1] // vision.image_size**2, len(rows)


def _tiled(image: Image.Image, vision: VisionConfig) -> tuple[Grid, np.ndarray]:
    """The grid that the image is cut to, and Tiles.rows."""
    grid = best_grid(image.height, image.width, vision.grids)
    side = vision.image_size // vision.patch_size
    return grid, token_rows(image.height, image.width, grid, vision.image_size, side)


def _channels_first(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def check_image(picture: Picture, preprocessing: Preprocessing) -> None:
    """Read the whole file as load_image does, without resizing.

    Raises:
        UserError: as load_image.
    """
    _open_rgb(picture, preprocessing, draft=True)


def _resized(height: int, width: int, preprocessing: Preprocessing) -> tuple[int, int]:
    """(height, width) with the short side at size, the long side rounded down as CLIP's is.

    Where nothing is cropped afterwards, as for SigLIP, both sides.
    """
    size = preprocessing.size
    if not preprocessing.do_center_crop:
        return size, size
    if height <= width:
        return size, int(size * width / height)
    return int(size * height / width), size


def _padded(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """The image in the middle of a square."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), background)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def _open(file: BinaryIO) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        return Image.open(file, formats=FORMATS)


def _open_rgb(picture: Picture, preprocessing: Preprocessing, draft: bool = False) -> Image.Image:
    with _opened(picture, preprocessing) as image:
        if draft:  # reads all data of a JPEG, but decodes to an eighth of its size
            image.draft(image.mode, (1, 1))
        return image.convert("RGB")


@contextmanager
def _opened(picture: Picture, preprocessing: Preprocessing) -> Iterator[Image.Image]:
    """preprocessing: for the check that the resized image fits into memory."""
    try:
        with open_picture(picture) as file, _open(file) as image:
            _check_kind(picture, image, preprocessing)
            yield image
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"no file {picture}") from error
    except UnidentifiedImageError as error:
        with open_picture(picture) as file:
            found = kind_of(file.read(KIND_BYTES)) or f"not one of {', '.join(FORMATS)}"
        raise UserError(f"{picture} cannot be decoded: it is {found}") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UserError(f"{picture} is too large ({error}). Scale the image down") from error
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error ...
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{picture} cannot be decoded ({reason})") from error


def _check_kind(picture: Picture, image: Image.Image, preprocessing: Preprocessing) -> None:
    if image.mode in _DEEP_MODES:
        raise UserError(
            f"{picture} has mode {image.mode}, more than 8 bits per channel. Save it with 8"
        )
    height, width = _resized(image.height, image.width, preprocessing)
    if preprocessing.do_pad:
        height = width = max(image.size)
    if Image.MAX_IMAGE_PIXELS is not None and height * width > Image.MAX_IMAGE_PIXELS:
        raise UserError(
            f"{picture} is {image.width} x {image.height}: resized to a short side of "
            f"{preprocessing.size}, or padded, it would have {height * width} pixels. Crop the "
            "image"
        )
