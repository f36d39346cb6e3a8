"""Argument checks of the public operations: facts the host knows, so they wait for no device.

check_offsets is the exception, for backends on a CPU.
"""

import torch
from torch import Tensor

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_INTEGERS = (torch.int64, torch.int32)


def check_shape(operation: str, expected: tuple[int, ...], why: str, **tensors: Tensor) -> None:
    """Every tensor has the expected shape; `why` names the tensor that it follows from."""
    for name, tensor in tensors.items():
        if tensor.shape != expected:
            raise ValueError(
                f"{operation}: {name} has shape {tuple(tensor.shape)}, "
                f"expected {tuple(expected)} beside {why}"
            )


def check_rank(operation: str, rank: int, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.dim() != rank:
            raise ValueError(
                f"{operation}: {name} has shape {tuple(tensor.shape)}, expected {rank} dimensions"
            )


def check_floats(operation: str, **tensors: Tensor) -> None:
    """One floating-point type and one device for all."""
    items = iter(tensors.items())
    first_name, first = next(items)
    if first.dtype not in _FLOATS:
        raise ValueError(f"{operation}: {first_name} is {first.dtype}, expected one of {_FLOATS}")
    for name, tensor in items:
        if tensor.dtype != first.dtype or tensor.device != first.device:
            raise ValueError(
                f"{operation}: {name} is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}, "
                f"but {first_name} is {first.dtype} {tuple(first.shape)} on {first.device}"
            )


def check_integers(operation: str, beside: Tensor, **tensors: Tensor) -> None:
    """One-dimensional int32 or int64 indices on the device of `beside`."""
    for name, tensor in tensors.items():
        if tensor.dtype not in _INTEGERS or tensor.dim() != 1 or tensor.device != beside.device:
            raise ValueError(
                f"{operation}: {name} is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}, "
                f"expected one dimension of int32 or int64 on {beside.device}"
            )


def check_offsets(
    cu_seqlens: Tensor, max_seqlen: int, num_tokens: int
) -> tuple[list[int], list[int]]:
    """Bounds and lengths of the samples; ValueError where they do not fit. Waits for a GPU."""
    bounds = cu_seqlens.tolist()
    lengths = [end - begin for begin, end in zip(bounds, bounds[1:], strict=False)]
    if bounds[0] != 0 or bounds[-1] != num_tokens or min(lengths, default=0) < 0:
        raise ValueError(f"cu_seqlens must rise from 0 to {num_tokens}, got {bounds}")
    if max(lengths, default=0) > max_seqlen:
        raise ValueError(f"max_seqlen is {max_seqlen}, but a sample has {max(lengths)} tokens")
    return bounds, lengths
