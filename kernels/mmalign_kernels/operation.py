"""How an operation is declared: once, for eager calls, tracing and autograd.

The signature of the declaring function is the schema of `mmalign::<name>`; its body returns empty
results of the right shapes (the fake kernel). Eager calls go straight to the implementation that
dispatch.py chooses, because PyTorch's dispatcher costs tens of microseconds per call;
torch.compile, export and fake tensors see the registered operation.

Below: checks of public arguments. They use only what the host knows, so they never synchronise
with the device (check_offsets does; backends on a CPU call it).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import Parameter

from . import dispatch


class Operation:
    """`mmalign::<name>`; a call runs the implementation, or the registered operation when traced.

    The device of the first argument, a tensor or a list of tensors, selects the implementation.
    """

    def __init__(self, declaration: Callable, mutates: tuple[str, ...]):
        self.name, self.declaration = declaration.__name__, declaration
        self.family = declaration.__module__.rpartition(".")[2]
        schema = torch.library.infer_schema(declaration, mutates_args=mutates)
        self.registered = torch.library.custom_op(
            f"mmalign::{self.name}", self.run, mutates_args=mutates, schema=schema
        )
        self.registered.register_fake(declaration)

    def run(self, *args: Any) -> Any:
        tensor = args[0][0] if isinstance(args[0], list) else args[0]
        if tensor.is_cpu:
            return dispatch.implementation(self.name, self.family, "cpu")(*args)
        device = tensor.device
        function = dispatch.implementation(self.name, self.family, device.type)
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):  # kernels launch on the current device
                return function(*args)
        return function(*args)

    def __call__(self, *args: Any) -> Any:
        return self.registered(*args) if is_traced(args[0]) else self.run(*args)


def operation(declaration: Callable) -> Operation:
    """Declare an operation that mutates none of its arguments."""
    return Operation(declaration, mutates=())


def mutating(*arguments: str) -> Callable[[Callable], Operation]:
    """Declare an operation that writes to these arguments."""
    return lambda declaration: Operation(declaration, mutates=arguments)


def is_traced(x: Tensor | list[Tensor]) -> bool:
    """Whether a call must go through the dispatcher: compiled, exported, fake or meta tensors."""
    if torch.compiler.is_compiling():
        return True
    tensor = x if isinstance(x, Tensor) else x[0]
    return type(tensor) not in (Tensor, Parameter) or tensor.is_meta


def once(backward: Callable) -> Callable:
    """torch's once_differentiable, which costs nothing where no second backward pass can follow."""
    guarded = once_differentiable(backward)

    def run(ctx: Any, *grads: Tensor | None) -> Any:
        return (guarded if torch.is_grad_enabled() else backward)(ctx, *grads)

    return run


def differentiable(forward: Operation, setup_context: Callable, backward: Callable) -> Callable:
    """`forward` with a gradient.

    setup_context(ctx, inputs, output) saves what backward(ctx, *grads) needs; both serve the
    registered operation and eager calls.
    """
    forward.registered.register_autograd(backward, setup_context=setup_context)

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            ctx.backend = dispatch.forced_backend()
            output = forward.run(*args)
            setup_context(ctx, args, output)
            return output

        @staticmethod
        @once
        def backward(ctx: Any, *grads: Tensor | None) -> Any:
            if ctx.backend == dispatch.forced_backend():
                return backward(ctx, *grads)
            with dispatch.use_backend(ctx.backend):  # the backend of the forward pass
                return backward(ctx, *grads)

    def call(*args: Any) -> Any:
        if is_traced(args[0]):
            return forward.registered(*args)
        if torch.is_grad_enabled():
            for x in args:
                if isinstance(x, Tensor) and x.requires_grad:
                    return Eager.apply(*args)
        return forward.run(*args)

    return call


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of arithmetic and accumulators: fp32, or fp64 for fp64."""
    return torch.promote_types(x.dtype, torch.float32)


def empty_statistics(x: Tensor, columns: int = 1) -> Tensor:
    """Uninitialised (num_rows, columns) in the compute dtype, for statistics of every row of x."""
    return x.new_empty((x.shape[0], columns), dtype=compute_dtype(x))


_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_INTEGERS = (torch.int64, torch.int32)


def check_shape(
    operation: str, expected: tuple[int, ...], why: str | Callable[[], str], **tensors: Tensor
) -> None:
    """Every tensor has the expected shape; `why` names the tensors that determine it.

    Operations that take microseconds pass a function: putting shapes into words takes one, too.
    """
    for name, tensor in tensors.items():
        if tensor.shape != expected:
            raise ValueError(
                f"{operation}: {name} has shape {tuple(tensor.shape)}, "
                f"expected {tuple(expected)} for {why if isinstance(why, str) else why()}"
            )


def check_rank(operation: str, rank: int, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.dim() != rank:
            raise ValueError(
                f"{operation}: {name} has shape {tuple(tensor.shape)}, expected {rank} dimensions"
            )


def check_floats(operation: str, **tensors: Tensor) -> None:
    """All tensors have the same floating-point dtype and device."""
    items = iter(tensors.items())
    first_name, first = next(items)
    dtype, device = first.dtype, first.device
    if dtype not in _FLOATS:
        raise ValueError(f"{operation}: {first_name} is {dtype}, expected one of {_FLOATS}")
    for name, tensor in items:
        if tensor.dtype != dtype or tensor.device != device:
            raise ValueError(
                f"{operation}: {name} is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}, "
                f"but {first_name} is {dtype} {tuple(first.shape)} on {device}"
            )


def check_integers(operation: str, like: Tensor, **tensors: Tensor) -> None:
    """One-dimensional int32 or int64 indices on the device of `like`."""
    for name, tensor in tensors.items():
        if tensor.dtype not in _INTEGERS or tensor.dim() != 1 or tensor.device != like.device:
            raise ValueError(
                f"{operation}: {name} is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}, "
                f"expected one dimension of int32 or int64 on {like.device}"
            )


def check_offsets(
    cu_seqlens: Tensor, max_seqlen: int, num_tokens: int
) -> tuple[list[int], list[int]]:
    """Bounds and lengths of the samples; ValueError if they are inconsistent. Synchronises."""
    bounds = cu_seqlens.tolist()
    lengths = [end - begin for begin, end in zip(bounds, bounds[1:], strict=False)]
    if bounds[0] != 0 or bounds[-1] != num_tokens or min(lengths, default=0) < 0:
        raise ValueError(f"cu_seqlens must increase from 0 to {num_tokens}, got {bounds}")
    if max(lengths, default=0) > max_seqlen:
        raise ValueError(f"max_seqlen is {max_seqlen}, but a sample has {max(lengths)} tokens")
    return bounds, lengths
