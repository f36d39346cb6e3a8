"""Launch settings: pure functions of shape, dtype and device. Nothing is timed or synchronised.

Token counts are never compile-time constants of a kernel; hidden sizes are, since they are few.
Imports no triton: costs/ reads the constants.
"""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

WARP = 32
VECTOR_BYTES = 16  # widest load of a thread


class Gpu(NamedTuple):
    capability: int  # 80 for 8.0
    num_multiprocessors: int
    shared_bytes: int  # that a program can have

    @property
    def is_large(self) -> bool:
        """sm_90 and sm_100. sm_120 is newer, but has the shared memory of sm_86 and sm_89."""
        return self.shared_bytes >= 227 * 1024

    @property
    def is_small(self) -> bool:
        return self.shared_bytes < 163 * 1024


_INTERPRETER = Gpu(80, 2, 163 * 1024)  # persistent kernels loop there too


def gpu(x: Tensor) -> Gpu:
    """The device that kernels on x run on."""
    return _cuda_device(x.device.index) if x.is_cuda else _INTERPRETER


def is_interpreted(x: Tensor) -> bool:
    return gpu(x) is _INTERPRETER


@cache
def _cuda_device(index: int) -> Gpu:
    properties = torch.cuda.get_device_properties(index)
    return Gpu(
        10 * properties.major + properties.minor,
        properties.multi_processor_count,
        properties.shared_memory_per_block_optin,
    )


def next_power_of_2(x: int) -> int:
    return 1 << max(x - 1, 0).bit_length()


def ceil_div(x: int, y: int) -> int:
    return -(-x // y)


# Tiles of the memory-bound kernels: 8 KiB of each input, 32 bytes per thread. Fewer bytes leave
# memory idle between the steps of a program; more cost registers and so resident programs.
_TILE_BYTES = 8192
_THREAD_BYTES = 32
_MAX_WARPS = 16
RESIDENT_WARPS = 16  # of persistent programs per multiprocessor
_MAX_ROWS = 128  # that a column sum adds up
_INTERPRETER_TILE_BYTES = 1 << 18  # its time per tile does not depend on the size
STAGES = 3  # tiles in a persistent program's loop: one in use, two in flight


def tile_bytes(x: Tensor) -> int:
    return _INTERPRETER_TILE_BYTES if is_interpreted(x) else _TILE_BYTES


def row_tile(x: Tensor) -> tuple[int, int, int]:
    """Rows, block of columns and warps of a program that holds whole rows of x.

    Several rows only where they are narrow, so that each weight is loaded by the lane that uses it.
    A block is a power of two: the lanes beyond 3200 columns of 4096 cost only issue slots, and more
    than half of those are free while a row waits for memory.
    """
    block = next_power_of_2(x.shape[1])
    row_bytes = block * x.element_size()
    rows = min(max(tile_bytes(x) // 4 // row_bytes, 1), _MAX_ROWS)
    return rows, block, num_warps(rows * row_bytes)


def part_tile(num_columns: int, x: Tensor) -> tuple[int, int, int]:
    """Rows, block of columns and warps where a program may hold part of a row of num_columns."""
    elements, warps = flat_tile(x)
    block = min(next_power_of_2(num_columns), elements // 4)
    return elements // block, block, warps


def flat_tile(x: Tensor) -> tuple[int, int]:
    """Elements and warps of a program where x has no rows."""
    return tile_bytes(x) // x.element_size(), num_warps(tile_bytes(x))


def num_warps(num_bytes: int) -> int:
    """Of a program that holds so many bytes of each input."""
    return min(max(num_bytes // (_THREAD_BYTES * WARP), 1), _MAX_WARPS)


def persistent(x: Tensor, num_tiles: int, warps: int) -> int:
    """Number of persistent programs, each looping over tiles, all resident at once.

    16 warps per multiprocessor with two tiles in flight are 64 KiB for two inputs, three times what
    the latency of memory needs, and the registers of a weight gradient still fit.
    """
    return min(num_tiles, gpu(x).num_multiprocessors * max(RESIDENT_WARPS // warps, 1))


def stages(x: Tensor, num_inputs: int) -> int:
    """STAGES of a persistent program that copies rows of num_inputs tensors like x, if they fit.

    Wide rows of fp32 and fp64 do not, and where not even one tile does, nothing is copied ahead.
    """
    rows, block, _ = row_tile(x)
    copied = num_inputs * rows * block * x.element_size()
    rest = 1024 * (17 if x.element_size() > 4 else 1)  # for sums, of fp64 on their way to memory
    return min(1 + (gpu(x).shared_bytes - rest) // copied, STAGES)


# Matrix products


class Tile(NamedTuple):
    m: int
    n: int
    k: int
    num_warps: int
    num_stages: int

    @property
    def launch_options(self) -> dict[str, int]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


HOPPER_TILE = Tile(128, 256, 64, 8, 4)
TILES_PER_GROUP = 8  # row tiles that share operands while in flight
LOGITS_PER_CHUNK = 1 << 27  # of the language-model head


def tile_settings(x: Tensor) -> Tile:
    """Tiles of C (m, n) and steps of k for operands like x.

    128 x 256 on sm_90: its 48 KiB per step feed 4.2 MFLOP, 85 FLOP per byte from L2; 128 x 128
    would read half as much again from L2.
    """
    if x.element_size() > 2:
        return Tile(64, 64, 32, 4, 2)
    if gpu(x).is_large:
        return HOPPER_TILE
    return Tile(128, 128, 32, 8, 4)
