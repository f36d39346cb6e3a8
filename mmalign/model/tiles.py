"""LLaVA 1.6's view of a picture: as a whole and, beside it, cut into tiles of the tower's size.

Of several grids of tiles the one that keeps most of the picture is filled with it, in the middle.
The decoder reads the patches of the whole, then those of the tiles, line by line across tiles:
lines and columns that only pad are left out, and every line ends with the embedding image_newline.
So does transformers' LlavaNextForConditionalGeneration.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

Grid = tuple[int, int]  # (height, width) of all its tiles in pixels
NEWLINE = -1  # among `rows`: image_newline


@dataclass(frozen=True)
class Tiles:
    """Pictures of one prompt or sample, and what of them is a token."""

    pixels: Tensor  # (num_tiles, 3, image_size, image_size) uint8
    rows: Tensor  # (num_tokens,) int64; of the tower's output for these tiles, or NEWLINE
    num_patches: int  # of a tile


Pixels = Tensor | Tiles  # a Tensor: (num_images, 3, image_size, image_size) uint8, all patches


def num_image_tokens(pixels: Pixels, num_patches: int) -> int:
    return len(pixels.rows) if isinstance(pixels, Tiles) else len(pixels) * num_patches


def join_pixels(pictures: Sequence[Pixels]) -> Pixels:
    """One after the other; all of them tiles, or none."""
    tiles = [x for x in pictures if isinstance(x, Tiles)]
    if not tiles:
        return torch.cat([x for x in pictures if isinstance(x, Tensor)])
    assert len(tiles) == len(pictures)
    rows, num_before = [], 0
    for x in tiles:
        rows.append(torch.where(x.rows == NEWLINE, NEWLINE, x.rows + num_before))
        num_before += len(x.pixels) * x.num_patches
    return Tiles(torch.cat([x.pixels for x in tiles]), torch.cat(rows), tiles[0].num_patches)


def best_grid(height: int, width: int, grids: Sequence[Grid]) -> Grid:
    """The one in which the picture keeps most pixels, and then leaves fewest empty."""

    def kept_and_wasted(grid: Grid) -> tuple[int, int]:
        scale = min(grid[1] / width, grid[0] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - grid[0] * grid[1]

    return max(grids, key=kept_and_wasted)


def size_in(grid: Grid, height: int, width: int) -> tuple[int, int]:
    """(height, width) of the picture that fills the grid in one direction."""
    scale_height, scale_width = grid[0] / height, grid[1] / width
    if scale_width < scale_height:
        return min(math.ceil(height * scale_width), grid[0]), grid[1]
    return grid[0], min(math.ceil(width * scale_height), grid[1])


def token_rows(height: int, width: int, grid: Grid, image_size: int, side: int) -> np.ndarray:
    """Tiles.rows of a picture of this size; side: patches along a tile."""
    num_down, num_across = grid[0] // image_size, grid[1] // image_size
    num_patches = side * side
    rows = np.arange(num_patches, (1 + num_down * num_across) * num_patches)
    rows = rows.reshape(num_down, num_across, side, side).swapaxes(1, 2)
    rows = _without_padding(rows.reshape(num_down * side, num_across * side), height, width)
    rows = np.pad(rows, ((0, 0), (0, 1)), constant_values=NEWLINE)
    return np.concatenate((np.arange(num_patches), rows.ravel()))


def _without_padding(patches: np.ndarray, height: int, width: int) -> np.ndarray:
    """Lines or columns that have something of the picture: (lines, columns)."""
    lines, columns = patches.shape
    if width / height > columns / lines:
        padding = (lines - int(round(height * (columns / width), 7))) // 2
        return patches[padding : lines - padding]
    padding = (columns - int(round(width * (lines / height), 7))) // 2
    return patches[:, padding : columns - padding]
