"""Tiled matrix products: how tiles are loaded and in what order. launch.py has their sizes.

On sm_90 tiles are loaded by TMA (tensor descriptors made on the host) and multiplied by HGMMA. If
rows are not 16-byte aligned, and on sm_80, they are loaded through pointers (cp.async) for HGMMA or
HMMA. Both ways read zeros outside the matrix. fp32 and fp64 are multiplied as such, not in TF32.
"""

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import launch


def takes_descriptors(*matrices: Tensor) -> bool:
    """Whether TMA can read all of them: sm_90, 16-bit, contiguous rows aligned to 16 bytes."""
    return launch.gpu(matrices[0]).is_large and all(
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
def place_of_tile(tile, num_m, num_n, GROUP: tl.constexpr = launch.TILES_PER_GROUP):
    """(m, n) of a tile: down columns of GROUP tiles, so that tiles in flight share operands."""
    group = tile // (GROUP * num_n)
    height = tl.minimum(num_m - group * GROUP, GROUP)
    within = tile % (GROUP * num_n)
    return group * GROUP + within % height, within // height


@triton.jit
def halves(tile):
    """Left and right half of a tile: an epilogue in smaller pieces needs less shared memory."""
    ROWS: tl.constexpr = tile.shape[0]
    COLUMNS: tl.constexpr = tile.shape[1]
    return tl.split(tl.permute(tl.reshape(tile, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))
