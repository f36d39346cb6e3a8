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


def row_block(x: Tensor) -> tuple[int, int]:
    """Block and warps of a program that holds one row: about two vectors for every thread."""
    columns = x.shape[1]
    block = next_power_of_2(columns)
    threads = block * x.element_size() // (4 * VECTOR_BYTES)
    return block, min(max(threads // WARP, 1), 16)


def persistent_rows(x: Tensor, num_inputs: int) -> tuple[int, int, int, int]:
    """Block, warps, stages and programs where programs stay and take one row after the other."""
    num_rows, columns = x.shape
    block = next_power_of_2(columns)
    row_bytes = block * x.element_size()
    num_warps = min(max(row_bytes // (2 * VECTOR_BYTES * WARP), 1), 16)
    stages = 3
    per_multiprocessor = 32 // num_warps
    return block, num_warps, stages, min(num_rows, gpu(x).num_multiprocessors * per_multiprocessor)


def attention_columns(head_dim: int) -> int:
    """Columns of a tile of one head: a matrix product takes a power of two from 16 on."""
    return max(next_power_of_2(head_dim), 16)


def attention_fwd(qkv: Tensor, head_dim: int) -> dict[str, int]:
    """Queries and keys of a tile (BLOCK_M a multiple of BLOCK_N), warps and stages."""
    columns = attention_columns(head_dim)
    if qkv.dtype == torch.float32:  # no matrix units at full precision
        return dict(BLOCK_M=32, BLOCK_N=32, BLOCK_D=columns, num_warps=4, num_stages=1)
    if gpu(qkv).capability >= 90:
        return dict(BLOCK_M=128, BLOCK_N=64, BLOCK_D=columns, num_warps=8, num_stages=3)
    return dict(BLOCK_M=128, BLOCK_N=64, BLOCK_D=columns, num_warps=8, num_stages=2)


def attention_bwd(qkv: Tensor, head_dim: int) -> tuple[dict[str, int], dict[str, int]]:
    """The same for the gradients of the queries, and for those of keys and values."""
    columns = attention_columns(head_dim)
    if qkv.dtype == torch.float32:
        settings = dict(BLOCK_M=32, BLOCK_N=32, BLOCK_D=columns, num_warps=4, num_stages=1)
        return settings, settings
    return (
        dict(BLOCK_M=128, BLOCK_N=64, BLOCK_D=columns, num_warps=8, num_stages=2),
        dict(BLOCK_M=64, BLOCK_N=128, BLOCK_D=columns, num_warps=8, num_stages=2),
    )
