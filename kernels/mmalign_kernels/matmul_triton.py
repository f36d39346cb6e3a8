"""Tiles of matrix products for the kernels that multiply: how big, how loaded, in what order.

On sm_90 tiles arrive by TMA (host-made tensor descriptors) and are multiplied by HGMMA. Where rows
are not 16-byte aligned, and on sm_80, they arrive through pointers (cp.async) into HGMMA or HMMA.
Both ways give zeros outside the matrix. fp32 and fp64 are multiplied as they are, not in TF32.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import launch


class Tile(NamedTuple):
    m: int
    n: int
    k: int
    num_warps: int
    num_stages: int

    @property
    def launch_options(self) -> dict[str, int]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


def tile_settings(x: Tensor) -> Tile:
    """Tiles of C (m, n) and steps of k for operands like x.

    128 x 256 on sm_90: its 48 KiB a step feed 4.2 MFLOP, 85 FLOP a byte from L2; 128 x 128 would
    ask L2 for half as much again.
    """
    if x.element_size() > 2:
        return Tile(64, 64, 32, 4, 2)
    if launch.gpu(x).capability >= 90:
        return Tile(128, 256, 64, 8, 4)
    return Tile(128, 128, 32, 8, 4)


def takes_descriptors(*matrices: Tensor) -> bool:
    """Whether TMA reads all of them: sm_90, half precision, contiguous rows on 16 bytes."""
    return launch.gpu(matrices[0]).capability >= 90 and all(
        x.element_size() == 2
        and x.stride(1) == 1
        and x.stride(0) * x.element_size() % launch.VECTOR_BYTES == 0
        and x.data_ptr() % launch.VECTOR_BYTES == 0
        and x.numel() > 0
        for x in matrices
    )


def operand(x: Tensor, rows: int, columns: int, descriptors: bool) -> TensorDescriptor | Tensor:
    """What a kernel takes for matrix x, read in tiles of (rows, columns)."""
    return TensorDescriptor.from_tensor(x, [rows, columns]) if descriptors else x


@triton.jit
def load_tile(
    matrix,  # (num_rows, num_columns): a descriptor of tiles, or a pointer
    row,
    column,
    num_rows,
    num_columns,
    stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """matrix[row : row + ROWS, column : column + COLUMNS], zero outside."""
    if DESCRIPTORS:
        tile = matrix.load([row, column])
    else:
        rows = row + tl.arange(0, ROWS)
        columns = column + tl.arange(0, COLUMNS)
        inside = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
        offsets = rows.to(tl.int64)[:, None] * stride + columns[None, :]
        tile = tl.load(matrix + offsets, mask=inside, other=0.0)
    return tile


@triton.jit
def place_of_tile(tile, num_m, num_n, GROUP: tl.constexpr):
    """(m, n) of a tile: down columns of GROUP tiles, so that tiles in flight share operands."""
    group = tile // (GROUP * num_n)
    height = tl.minimum(num_m - group * GROUP, GROUP)
    within = tile % (GROUP * num_n)
    return group * GROUP + within % height, within // height


@triton.jit
def halves(tile):
    """Left and right half of a tile: smaller pieces of an epilogue need less shared memory."""
    ROWS: tl.constexpr = tile.shape[0]
    COLUMNS: tl.constexpr = tile.shape[1]
    return tl.split(tl.permute(tl.reshape(tile, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))
