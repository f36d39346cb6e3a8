"""AdamW's moments in 8 bits: the format of csrc/block_quantization.h on tensors.

Blocks of 128 neighbours share an fp32 scale (after Dettmers et al. 2022, arXiv 2110.02861). A code
is a small floating-point number below 2, the lowest exponent subnormal, and needs no table. The
scale maps the block's largest number to the largest code. Between two codes a number is rounded at
random, so its expected value is exact.

    first moment    sign, 4 bits of exponent, 3 of mantissa
    second moment   5 bits of exponent, 3 of mantissa; above zero it is never rounded to zero
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 128
MANTISSA_BITS = 3
DROPPED_BITS = 23 - MANTISSA_BITS  # of fp32's mantissa
LARGEST = 2 - 2.0**-MANTISSA_BITS


@dataclass(frozen=True)
class MomentCode:
    exponent_bits: int
    signed: bool

    @property
    def shift(self) -> int:
        """Powers of two from the smallest normal code down to fp32's smallest normal number."""
        return 126 - (2**self.exponent_bits - 2)

    @property
    def largest(self) -> int:
        return 2 ** (self.exponent_bits + MANTISSA_BITS) - 1


FIRST, SECOND = MomentCode(4, signed=True), MomentCode(5, signed=False)


def num_blocks(numel: int) -> int:
    """Scales of a tensor of numel numbers; the last block may be short."""
    return -(-numel // BLOCK)


def encode(x: Tensor, draws: Tensor, code: MomentCode) -> tuple[Tensor, Tensor]:
    """fp32 x (numel,) -> codes (numel,) uint8 and scales (num_blocks,) fp32.

    draws (numel,) int32 in [0, 2^16). A block with a NaN has the scale NaN and stays NaN.
    """
    sizes = _blocks(x.view(torch.int32) & 0x7FFFFFFF)  # as integers, NaN is above all numbers
    scales = sizes.amax(1).view(torch.float32) / LARGEST
    ratios = sizes.view(torch.float32) / scales[:, None] * 2.0**-code.shift
    bits = ratios.view(torch.int32) + (_blocks(draws) << (DROPPED_BITS - 16))
    codes = (bits >> DROPPED_BITS).clamp_(max=code.largest)
    if code.signed:
        codes |= (_blocks(x.view(torch.int32)) < 0).int() << 7
    else:
        codes = torch.where(sizes == 0, 0, codes.clamp_(min=1))
    codes = torch.where(scales[:, None] == 0, 0, codes)
    return codes.view(-1)[: len(x)].to(torch.uint8), scales


def decode(codes: Tensor, scales: Tensor, code: MomentCode) -> Tensor:
    """The fp32 numbers of encode's results, (numel,)."""
    wide = codes.int()
    sizes = ((wide & code.largest) << DROPPED_BITS).view(torch.float32) * 2.0**code.shift
    sizes = (_blocks(sizes) * scales[:, None]).view(-1)[: len(codes)]
    return torch.where(wide > code.largest, -sizes, sizes) if code.signed else sizes


def _blocks(x: Tensor) -> Tensor:
    return F.pad(x, (0, -len(x) % BLOCK)).view(-1, BLOCK)
