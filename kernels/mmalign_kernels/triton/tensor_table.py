"""One launch for many tensors: a table of their addresses, where each program finds its tensor.

The table, int64, has one column per tensor, padded to a power of two, and these rows:

    first tile of the tensor                  number of elements     index in the caller's list
    address in the first of the lists         in the second                                 ...
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch

_ALIGNMENT = 16  # of addresses in bytes and of sizes in elements, for 128-bit accesses
_FEWEST = 32  # columns; each number of columns compiles another kernel
_ADDRESSES = tl.constexpr(3)  # first row of addresses


class TensorTable(NamedTuple):
    rows: Tensor  # (3 + number of lists, num_columns) int64
    num_columns: int
    num_tiles: int  # programs to launch
    aligned: bool


def tensor_tables(lists: list[list[Tensor]], tile: int) -> Iterator[TensorTable]:
    """One table of the tensors whose addresses and sizes allow 128-bit accesses, one of the rest.

    lists: each has one contiguous tensor per index; the tensors of an index are updated together,
    `tile` elements per program. The lists must outlive the launch.
    """
    columns = {True: [], False: []}
    for place, (first, *others) in enumerate(zip(*lists, strict=True)):
        addresses = [x.data_ptr() for x in (first, *others)]
        if first.numel():
            aligned = not any(x % _ALIGNMENT for x in (*addresses, first.numel()))
            columns[aligned].append((first.numel(), place, *addresses))
    for aligned, found in columns.items():
        if found:
            yield _table(found, tile, aligned, lists[0][0].device)


def _table(
    columns: list[tuple[int, ...]], tile: int, aligned: bool, device: torch.device
) -> TensorTable:
    begins, num_tiles = [], 0
    for numel, *_ in columns:
        begins.append(num_tiles)
        num_tiles += launch.ceil_div(numel, tile)
    num = max(launch.next_power_of_2(len(columns)), _FEWEST)
    padding = num - len(columns)
    rows = [begins + [num_tiles] * padding]  # a tile of no program
    rows += [[*row] + [0] * padding for row in zip(*columns, strict=True)]
    # from pinned memory the copy does not synchronise
    table = torch.tensor(rows, dtype=torch.int64, pin_memory=device.type == "cuda")
    return TensorTable(table.to(device, non_blocking=True), num, num_tiles, aligned)


@triton.jit
def find_tensor(table_ptr, NUM: tl.constexpr, ALIGNED: tl.constexpr):
    """Column of this program's tensor, its tile there, the tensor's size, its index."""
    begins = tl.load(table_ptr + tl.arange(0, NUM))
    column = tl.sum((begins <= tl.program_id(0)).to(tl.int32), 0) - 1
    tile = tl.program_id(0) - tl.load(table_ptr + column).to(tl.int32)
    numel = tl.load(table_ptr + NUM + column)
    if ALIGNED:
        numel = tl.multiple_of(numel, 16)
    return column, tile, numel, tl.load(table_ptr + 2 * NUM + column).to(tl.int32)


@triton.jit
def address(
    table_ptr,
    column,
    NUM: tl.constexpr,
    ALIGNED: tl.constexpr,
    LIST: tl.constexpr,
    TYPE: tl.constexpr,
):
    """A pointer to the program's tensor of the caller's list number LIST, of this element type."""
    at = tl.load(table_ptr + (_ADDRESSES + LIST) * NUM + column).to(tl.pointer_type(TYPE))
    if ALIGNED:
        at = tl.multiple_of(at, 16)
    return at
