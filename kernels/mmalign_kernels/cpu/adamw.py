"""AdamW by PyTorch's fused kernel; csrc/cpu/bf16_state.cpp reads and writes state in bf16."""

from functools import cache
from typing import Any

from torch import Tensor

from ..reference import adamw as reference
from ..reference.adamw import Bf16State, Draw
from .library import operation


def adamw_update(*arguments: Any) -> None:
    reference.adamw_update(*arguments, bf16=_bf16_state())


@cache
def _bf16_state() -> Bf16State:
    return Bf16State(operation("join_master"), operation("split_master"), _round)


def _round(x: Tensor, rounded: Tensor, draw: Draw) -> None:
    high, low = draw(2).tolist()
    operation("round_stochastically")(x, rounded, (high << 16) + low)
