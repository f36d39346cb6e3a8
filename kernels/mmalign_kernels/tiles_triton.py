"""How the programs of an elementwise kernel share a matrix."""

import triton
import triton.language as tl


@triton.jit
def part_of_rows(ROWS: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows (ROWS,) and columns (1, BLOCK) of this program; neighbours share rows, not columns."""
    parts: tl.constexpr = (COLUMNS + BLOCK - 1) // BLOCK
    rows = tl.program_id(0) // parts * ROWS + tl.arange(0, ROWS)
    return rows, tl.program_id(0) % parts * BLOCK + tl.arange(0, BLOCK)[None]
