"""Unpacking of rows by csrc/cpu/packing.cpp; PyTorch's gather and sum are as good."""

from torch import Tensor

from ..reference.packing import pack_rows_bwd, pack_rows_fwd, unpack_rows_bwd
from .library import operation

__all__ = ["pack_rows_bwd", "pack_rows_fwd", "unpack_rows_bwd", "unpack_rows_fwd"]


def unpack_rows_fwd(packed: Tensor, positions: Tensor, num_rows: int) -> Tensor:
    return operation("scatter_rows")(packed.contiguous(), positions.contiguous(), num_rows)
