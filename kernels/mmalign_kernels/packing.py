"""Gathers rows from a padded or per-image layout into the packed one, and scatters them back.

Plain PyTorch: reference/packing.py.
"""

from typing import Any

from torch import Tensor

from .operation import check_floats, check_integers, check_shape, differentiable, operation


@operation
def pack_rows_fwd(x: Tensor, positions: Tensor) -> Tensor:
    return x.new_empty((positions.shape[0], *x.shape[1:]))


@operation
def pack_rows_bwd(grad: Tensor, positions: Tensor, num_rows: int) -> Tensor:
    """Sums the gradients of the copies of each row."""
    return grad.new_empty((num_rows, *grad.shape[1:]))


@operation
def unpack_rows_fwd(packed: Tensor, positions: Tensor, num_rows: int) -> Tensor:
    return packed.new_empty((num_rows, *packed.shape[1:]))


@operation
def unpack_rows_bwd(grad: Tensor, positions: Tensor) -> Tensor:
    return grad.new_empty((positions.shape[0], *grad.shape[1:]))


def _save_positions(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.num_rows = inputs[0].shape[0]
    ctx.save_for_backward(inputs[1])


def _pack_backward(ctx: Any, grad: Tensor) -> tuple:
    return pack_rows_bwd(grad, ctx.saved_tensors[0], ctx.num_rows), None


def _unpack_backward(ctx: Any, grad: Tensor) -> tuple:
    return unpack_rows_bwd(grad, ctx.saved_tensors[0]), None, None


_pack_rows = differentiable(pack_rows_fwd, _save_positions, _pack_backward)
_unpack_rows = differentiable(unpack_rows_fwd, _save_positions, _unpack_backward)


def pack_rows(x: Tensor, positions: Tensor) -> Tensor:
    """x[positions]: x (num_rows, ...), positions (num_packed,) -> (num_packed, ...).

    A row may be gathered more than once; its gradients add up. Raises ValueError for positions that
    are not one dimension of integers.
    """
    check_floats("pack_rows", x=x)
    check_integers("pack_rows", x, positions=positions)
    return _pack_rows(x, positions)


def unpack_rows(packed: Tensor, positions: Tensor, num_rows: int) -> Tensor:
    """Zeros (num_rows, ...) with packed[i] written at row positions[i].

    packed (num_packed, ...), positions (num_packed,) without repetition. Raises ValueError where
    the two lengths differ.
    """
    check_floats("unpack_rows", packed=packed)
    check_integers("unpack_rows", packed, positions=positions)
    check_shape(
        "unpack_rows",
        packed.shape[:1],
        lambda: f"packed {tuple(packed.shape)}",
        positions=positions,
    )
    return _unpack_rows(packed, positions, num_rows)
