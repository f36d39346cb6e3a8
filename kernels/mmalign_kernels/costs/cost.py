"""The cost of one call: bytes and FLOPs that it needs, and what mmalign's Triton kernels do."""

from dataclasses import dataclass
from typing import NamedTuple

from ..triton import launch

H100 = launch.Gpu(90, 132)


@dataclass(frozen=True)
class Cost:
    """Of one call: required bytes and FLOPs, and what mmalign's Triton kernels move and compute."""

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


class Passes(NamedTuple):
    forward: Cost
    backward: Cost

    @property
    def both(self) -> Cost:
        return self.forward + self.backward


def partial_rows(tokens: int, columns: int, itemsize: int) -> int:
    """Bytes of the fp32 partial sums of a weight gradient on an H100, written and read once."""
    warps = launch.num_warps(launch.next_power_of_2(columns) * itemsize)
    programs = min(tokens, H100.num_multiprocessors * (launch.RESIDENT_WARPS // warps))
    return 2 * 4 * programs * columns
