"""Packing and unpacking of rows in plain PyTorch."""

from torch import Tensor


def pack_rows_fwd(x: Tensor, positions: Tensor) -> Tensor:
    return x.index_select(0, positions)


def pack_rows_bwd(grad: Tensor, positions: Tensor, num_rows: int) -> Tensor:
    return grad.new_zeros(num_rows, *grad.shape[1:]).index_add_(0, positions, grad)


def unpack_rows_fwd(packed: Tensor, positions: Tensor, num_rows: int) -> Tensor:
    zeros = packed.new_zeros(num_rows, *packed.shape[1:])
    return zeros.index_copy_(0, positions.long(), packed)


def unpack_rows_bwd(grad: Tensor, positions: Tensor) -> Tensor:
    return grad.index_select(0, positions)
