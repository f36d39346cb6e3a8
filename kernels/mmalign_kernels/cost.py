"""What a call costs. `bytes` and `flops` are the floor, the others what mmalign's kernels do."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """Of one call: the floor, and what mmalign's Triton kernels move and compute."""

    bytes: int
    flops: int
    moved_bytes: int
    done_flops: int

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            self.bytes + other.bytes,
            self.flops + other.flops,
            self.moved_bytes + other.moved_bytes,
            self.done_flops + other.done_flops,
        )


def ceil_div(x: int, y: int) -> int:
    return -(-x // y)


def next_power_of_2(x: int) -> int:
    return 1 << max(x - 1, 0).bit_length()


# what launch.py chooses on an H100
_MULTIPROCESSORS = 132
_WARPS, _WARP_BYTES = 16, 1024  # resident on a multiprocessor; of a row that a warp holds


def partial_rows(tokens: int, columns: int, itemsize: int) -> int:
    """Bytes of fp32 partial sums of a weight gradient, written and read once."""
    warps = min(max(next_power_of_2(columns) * itemsize // _WARP_BYTES, 1), _WARPS)
    programs = min(tokens, _MULTIPROCESSORS * (_WARPS // warps))
    return 2 * 4 * programs * columns
