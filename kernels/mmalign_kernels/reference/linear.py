"""Matrix products by the fastest available library: y = x W^T + bias.

On a GPU that is PyTorch's default. On a CPU, PyTorch sends fp32 products to MKL, which uses no
AVX-512 on AMD processors; oneDNN, also part of PyTorch, does: 220 instead of 100 GFLOP/s on one
core of an EPYC 9005, 3000 x 768 by 768 x 2048. It accumulates in fp32, too. But oneDNN compiles a
kernel for every new shape, and packed batches have a new number of tokens in each step: 0.6 ms on
an EPYC 9004, more than it saves on small products, which therefore stay with MKL. It is the same in
every backend, so nothing declares it.

A weight's gradient, grad^T x, is a product over rows. oneDNN takes one of the two matrices as it is
and needs the other transposed: the smaller one, by csrc/cpu where it is built, since PyTorch's copy
takes up to a third of the time of the product.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..cpu import library as cpu_library
from ..operation import check_floats, is_traced

_SMALL = 200_000_000  # multiplications below which making the code outweighs the gain
_HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(
    torch.ops.mkldnn, "_linear_pointwise"
)

_adding = False


@contextmanager
def adding_to_gradients() -> Iterator[None]:
    """Inside, a backward pass adds to the .grad that a weight already has within the product.

    cuBLAS reads .grad as it writes the sum, rounded once; autograd would write the gradient, and
    add it in a pass over three tensors. For forward and backward passes together, of weights that
    nobody watches: autograd and what hangs on it (DDP, FSDP2) see no gradient of them.
    """
    global _adding
    before, _adding = _adding, True
    try:
        yield
    finally:
        _adding = before


def _prefers_onednn(x: Tensor, weight: Tensor) -> bool:
    size = x.numel() * weight.shape[0]
    return _HAS_ONEDNN and x.is_cpu and x.dtype == torch.float32 and size >= _SMALL


def _dense(x: Tensor) -> Tensor:
    """x or a copy: oneDNN reads transposed matrices fast, other strides a hundred times slower."""
    return x if x.is_contiguous() or x.t().is_contiguous() else x.contiguous()


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias of two matrices, without a gradient."""
    if _prefers_onednn(x, weight):
        x, weight = _dense(x), _dense(weight)
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """grad.T @ x, for grad (num_rows, out_features) and x (num_rows, in_features)."""
    transposed, columns = grad.t(), x.t()
    if not _prefers_onednn(transposed, columns) or cpu_library.missing():
        return product(transposed, columns)
    transpose = cpu_library.operation("transpose")
    if grad.shape[1] <= x.shape[1]:
        return product(transpose(grad.contiguous()), columns)
    return transpose(product(transpose(x.contiguous()), transposed))


class WeightGradient:
    """The sum of grad.T @ x over chunks of rows, as weight_gradient gives that of one.

    Where weight_gradient would end with a transposed copy, the sum is transposed, once.
    """

    def __init__(self, weight: Tensor, dtype: torch.dtype):
        self.shape, self.options = weight.shape, {"dtype": dtype, "device": weight.device}
        self.sum: Tensor | None = None
        self.is_transposed = False

    def add(self, grad: Tensor, x: Tensor) -> None:
        """grad (num_rows, out_features), x (num_rows, in_features)."""
        if self.sum is None:
            narrow = x.shape[1] < grad.shape[1] and _prefers_onednn(grad.t(), x.t())
            self.is_transposed = narrow and not cpu_library.missing()
            self.sum = torch.zeros(self.shape[:: -1 if self.is_transposed else 1], **self.options)
        if self.is_transposed:
            self.sum += product(cpu_library.operation("transpose")(x.contiguous()), grad.t())
        else:
            self.sum += weight_gradient(grad, x)

    def total(self) -> Tensor:
        """(out_features, in_features)."""
        if self.sum is None:
            return torch.zeros(self.shape, **self.options)
        return cpu_library.operation("transpose")(self.sum) if self.is_transposed else self.sum


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        needs_x, needs_weight, _ = ctx.needs_input_grad
        ctx.weight = weight if needs_weight and weight.is_leaf else None
        # a frozen weight saves no activation, as in F.linear
        ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None)
        return product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        grad = grad.contiguous()
        if _adding and ctx.weight is not None and ctx.weight.grad is not None:
            ctx.weight.grad.addmm_(grad.t(), x)
            needs_weight = False
        return (
            product(grad, weight.t()) if needs_x else None,
            weight_gradient(grad, x) if needs_weight else None,
            grad.sum(0) if needs_bias else None,
        )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias, as torch.nn.functional.linear.

    x (..., in_features), weight (out_features, in_features), bias (out_features,) of one dtype
    -> (..., out_features). Raises ValueError if shapes, dtypes or devices do not match.
    """
    check_floats("linear", x=x, weight=weight, **({} if bias is None else {"bias": bias}))
    if weight.dim() != 2 or x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"linear: x {tuple(x.shape)} and weight {tuple(weight.shape)} do not share in_features"
        )
    if is_traced(x) or not (_adding or _prefers_onednn(x, weight)):
        return F.linear(x, weight, bias)
    y = _Linear.apply(x.reshape(-1, weight.shape[1]), weight, bias)
    return y.view(*x.shape[:-1], len(weight))
