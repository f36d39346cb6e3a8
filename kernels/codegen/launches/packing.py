"""Rows of LLaMA2-7B's and OpenLLaMA-3B's hidden states."""

import torch
from mmalign_kernels.triton.packing import pack_rows_bwd, pack_rows_fwd, unpack_rows_fwd

from ..compiler import meta

ROWS, PACKED = 16384, 9000
POSITIONS = meta(PACKED, dtype=torch.int64)
MEMORY_BOUND = {"_gather_rows_kernel", "_sum_rows_kernel"}
LAUNCHES = {}
for _columns in (3200, 4096):
    _x, _packed = meta(ROWS, _columns), meta(PACKED, _columns)
    LAUNCHES |= {
        f"pack_rows {_columns}": lambda x=_x: pack_rows_fwd(x, POSITIONS),
        f"pack_rows backward {_columns}": lambda x=_packed: pack_rows_bwd(x, POSITIONS, ROWS),
        f"unpack_rows {_columns}": lambda x=_packed: unpack_rows_fwd(x, POSITIONS, ROWS),
    }
