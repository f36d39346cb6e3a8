"""Launch settings: pure functions of shape, type and device. Nothing is timed, nothing waits.

Token counts never enter a compiled kernel; hidden sizes do, there are few of them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor

WARP = 32
VECTOR_BYTES = 16  # the widest load of a thread


class Gpu(NamedTuple):
    capability: int  # 80 for 8.0
    num_multiprocessors: int


A100, H100 = Gpu(80, 108), Gpu(90, 132)
_INTERPRETER = Gpu(80, 2)  # persistent kernels loop there too
_pretended: Gpu | None = None


def gpu(x: Tensor) -> Gpu:
    """The device that kernels on x run on."""
    if _pretended is not None:
        return _pretended
    return _cuda_device(x.device.index) if x.is_cuda else _INTERPRETER


@cache
def _cuda_device(index: int) -> Gpu:
    properties = torch.cuda.get_device_properties(index)
    return Gpu(10 * properties.major + properties.minor, properties.multi_processor_count)


@contextmanager
def pretend(device: Gpu) -> Iterator[None]:
    """Inside the block every tensor lives on `device`: kernels are compiled for it, not run."""
    global _pretended
    before, _pretended = _pretended, device
    try:
        yield
    finally:
        _pretended = before


def next_power_of_2(x: int) -> int:
    return triton.next_power_of_2(x)


def ceil_div(x: int, y: int) -> int:
    return -(-x // y)


# Tiles of the memory-bound kernels: 8 KiB of each input, 32 bytes of it a thread. Fewer bytes leave
# the memory idle between the steps of a program, more cost registers and with them programs.
_TILE_BYTES = 8192
_THREAD_BYTES = 32
_MAX_WARPS = 16
_RESIDENT_WARPS = 16  # of persistent programs on a multiprocessor
_MAX_ROWS = 128  # of a sum down the columns
_INTERPRETER_TILE_BYTES = 1 << 18  # it takes the same time for any tile
STAGES = 3  # of tiles in a persistent program's loop: one worked on, two on their way


def tile_bytes(x: Tensor) -> int:
    return _INTERPRETER_TILE_BYTES if gpu(x) is _INTERPRETER else _TILE_BYTES


def row_tile(x: Tensor) -> tuple[int, int, int]:
    """Rows, block of columns and warps of a program that holds whole rows of x.

    Several rows only where they are narrow: one row a program has its weights where its lanes are.
    A block is a power of two. The lanes that 3200 columns leave idle in 4096 move nothing and cost
    issue slots, of which a row waiting for memory has more than half to spare.
    """
    block = next_power_of_2(x.shape[1])
    row_bytes = block * x.element_size()
    rows = min(max(tile_bytes(x) // 4 // row_bytes, 1), _MAX_ROWS)
    return rows, block, _num_warps(rows * row_bytes)


def part_tile(num_columns: int, x: Tensor) -> tuple[int, int, int]:
    """Rows, block of columns and warps where programs may cut rows of num_columns into pieces."""
    elements, num_warps = flat_tile(x)
    block = min(next_power_of_2(num_columns), elements // 4)
    return elements // block, block, num_warps


def flat_tile(x: Tensor) -> tuple[int, int]:
    """Elements and warps of a program where x has no rows."""
    return tile_bytes(x) // x.element_size(), _num_warps(tile_bytes(x))


def _num_warps(num_bytes: int) -> int:
    return min(max(num_bytes // (_THREAD_BYTES * WARP), 1), _MAX_WARPS)


def persistent(x: Tensor, num_tiles: int, num_warps: int) -> int:
    """Number of programs that stay and take one tile after the other, all resident at once.

    16 warps a multiprocessor with two tiles on their way are 64 KiB in flight for two inputs, three
    times what the latency of memory asks for, and the registers of a weight gradient still fit.
    """
    return min(num_tiles, gpu(x).num_multiprocessors * max(_RESIDENT_WARPS // num_warps, 1))
