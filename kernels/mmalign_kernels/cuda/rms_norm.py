"""RMSNorm by the CUDA kernels of csrc/rms_norm.cu and csrc/rms_norm_backward.cu."""

from functools import cache

import torch
from torch import Tensor

from ..rms_norm import add_rms_norm_fwd as declared_add_fwd
from ..rms_norm import rms_norm_bwd as declared_bwd
from ..rms_norm import rms_norm_fwd as declared_fwd
from .library import fake, operation

_NUM_COUNTERS = 1024  # kMaxCounters of csrc/column_partials.cuh


def rms_norm_fwd(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return operation("rms_norm_fwd")(x.contiguous(), weight.contiguous(), eps)


def add_rms_norm_fwd(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    tensors = (x.contiguous(), residual.contiguous(), weight.contiguous())
    return operation("add_rms_norm_fwd")(*tensors, eps)


def rms_norm_bwd(
    grad_y: Tensor,
    grad_residual: Tensor | None,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    needs_weight: bool,
) -> tuple[Tensor, Tensor]:
    return operation("rms_norm_bwd")(
        grad_y.contiguous(),
        None if grad_residual is None else grad_residual.contiguous(),
        x.contiguous(),
        weight.contiguous(),
        rstd.contiguous(),
        needs_weight,
        _counters(x.device),
    )


def _counters(device: torch.device) -> Tensor:
    """Counters that every launch leaves at zero: one set per stream, and per captured call."""
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return torch.zeros(_NUM_COUNTERS, dtype=torch.int32, device=device)
    return _counters_of_stream(device, torch.cuda.current_stream(device).cuda_stream)


@cache
def _counters_of_stream(device: torch.device, stream: int) -> Tensor:
    return torch.zeros(_NUM_COUNTERS, dtype=torch.int32, device=device)


fake("rms_norm_fwd", declared_fwd.declaration)
fake("add_rms_norm_fwd", declared_add_fwd.declaration)
fake("rms_norm_bwd", lambda *args: declared_bwd.declaration(*args[:-1]))  # no counters
