"""Images: file to uint8 pixels, resized and cropped as stock CLIP does.

Equal to transformers' CLIPImageProcessor (the PIL version, before rescaling and normalising) to
one level: convert to RGB, short side to image_size with antialiased bicubic, centre crop. EXIF
orientation is not applied, because neither CLIPImageProcessor nor LLaVA applies it, and a
transparency channel is thrown away as LLaVA's `Image.open(path).convert("RGB")` does (transformers
5 would put the image on white if it were given the channel).
"""

import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from mmalign.errors import UserError

# PIL turns these to RGB by clipping at 255: a 16-bit picture becomes white
_DEEP_MODES = ("I", "I;16", "I;16L", "I;16B", "I;16N", "F")
# torch resizes 5 times faster than PIL, but differs by up to 2 levels where it enlarges or hardly
# shrinks; from a halving on by at most 1
_TORCH_RESIZE_SCALE = 2


def load_image(path: Path, image_size: int) -> Tensor:
    """Decode, resize and crop one image.

    Returns:
        uint8 tensor (3, image_size, image_size), channels red, green, blue.
    Raises:
        UserError: the file is missing, broken, cut short, too large or deeper than 8 bits.
    """
    image = _open_rgb(path)
    height, width = _resized(image.height, image.width, image_size)
    if height * width > Image.MAX_IMAGE_PIXELS:
        raise UserError(
            f"{path} is {image.width} x {image.height}: with its short side at {image_size} it "
            f"would have {height * width} pixels. Crop the image"
        )
    if min(image.size) >= _TORCH_RESIZE_SCALE * image_size:
        # a view with channels last: the fast path of torch's uint8 resize
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        pixels = interpolate(pixels[None], (height, width), mode="bicubic", antialias=True)[0]
    else:
        resized = image.resize((width, height), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.array(resized)).permute(2, 0, 1)  # (3, height, width)
    top, left = (height - image_size) // 2, (width - image_size) // 2
    return pixels[:, top : top + image_size, left : left + image_size].contiguous()


def check_image(path: Path) -> None:
    """Read the whole file as load_image does, without resizing.

    Raises:
        UserError: as load_image.
    """
    _open_rgb(path, draft=True)


def _resized(height: int, width: int, image_size: int) -> tuple[int, int]:
    """Short side image_size; the long side is cut to an integer, as CLIPImageProcessor does."""
    if height <= width:
        return image_size, int(image_size * width / height)
    return int(image_size * height / width), image_size


def _open(path: Path) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        return Image.open(path)


def _open_rgb(path: Path, draft: bool = False) -> Image.Image:
    try:
        with _open(path) as image:
            if image.mode in _DEEP_MODES:
                raise UserError(f"{path} has mode {image.mode}, more than 8 bits. Save it with 8")
            if draft:  # all data of a JPEG are read, but only an eighth of its size is made
                image.draft(image.mode, (1, 1))
            return image.convert("RGB")
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"no file {path}") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UserError(f"{path} is too large ({error}). Scale the image down") from error
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error ...
        raise UserError(f"{path} cannot be decoded ({error})") from error
