"""Quick GELU in Triton: y = x * s, s = sigmoid(1.702 x);  dx = dy * s * (1 + 1.702 x (1 - s)).

Bytes of an element of b bytes: forward 2b, backward 3b.
"""

import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .common import upcast


@triton.jit
def _quick_gelu_kernel(
    x_ptr,  # (numel,)
    grad_y_ptr,  # (numel,), or unused
    out_ptr,  # y, or dx
    numel,
    BLOCK: tl.constexpr,
    BACKWARD: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = upcast(tl.load(x_ptr + at, at < numel, other=0))
    gate = 1 / (1 + tl.exp(-1.702 * x))
    if BACKWARD:
        grad = upcast(tl.load(grad_y_ptr + at, at < numel, other=0))
        out = grad * gate * (1 + 1.702 * x * (1 - gate))
    else:
        out = x * gate
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), at < numel)


def _quick_gelu(x: Tensor, grad_y: Tensor | None) -> Tensor:
    x, out = x.contiguous(), x.new_empty(x.shape)
    block, num_warps = launch.flat_tile(x)
    if x.numel():
        _quick_gelu_kernel[(launch.ceil_div(x.numel(), block),)](
            x, x if grad_y is None else grad_y.contiguous(), out, x.numel(),
            BLOCK=block, BACKWARD=grad_y is not None, num_warps=num_warps,
        )  # fmt: skip
    return out


def quick_gelu_fwd(x: Tensor) -> Tensor:
    return _quick_gelu(x, None)


def quick_gelu_bwd(grad_y: Tensor, x: Tensor) -> Tensor:
    return _quick_gelu(x, grad_y)
