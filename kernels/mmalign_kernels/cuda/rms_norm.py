"""RMSNorm by the CUDA kernels of csrc/rms_norm.cu and csrc/rms_norm_backward.cu."""

from functools import cache

import torch
from torch import Tensor

from ..operation import empty_statistics
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
    """Zeros that a launch leaves as zeros: one set for each stream, and for each captured call."""
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return torch.zeros(_NUM_COUNTERS, dtype=torch.int32, device=device)
    return _counters_of_stream(device, torch.cuda.current_stream(device).cuda_stream)


@cache
def _counters_of_stream(device: torch.device, stream: int) -> Tensor:
    return torch.zeros(_NUM_COUNTERS, dtype=torch.int32, device=device)


@fake("rms_norm_fwd")
def _rms_norm_fwd(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), empty_statistics(x)


@fake("add_rms_norm_fwd")
def _add_rms_norm_fwd(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x), empty_statistics(x)


@fake("rms_norm_bwd")
def _rms_norm_bwd(
    grad_y: Tensor,
    grad_residual: Tensor | None,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    needs_weight: bool,
    counters: Tensor,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), weight.new_empty(len(weight) if needs_weight else 0)
