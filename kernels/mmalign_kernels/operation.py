"""How an operation is declared once, for eager calls, for tracing and for autograd.

An operation `mmalign::x` is declared by a function whose signature gives the schema and whose body
gives empty results of the right shapes (the fake kernel). Eager calls go straight to the
implementation that dispatch.py chooses, because the dispatcher costs tens of microseconds a call;
torch.compile, export and fake tensors see the registered operation.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import Parameter

from . import dispatch


class Operation:
    """`mmalign::<name>`: calling it runs the implementation, or its registered form in tracing.

    The first argument, a tensor or a list of them, decides which implementation.
    """

    def __init__(self, declaration: Callable, mutates: tuple[str, ...]):
        self.name = declaration.__name__
        self.family = declaration.__module__.rpartition(".")[2]
        schema = torch.library.infer_schema(declaration, mutates_args=mutates)
        self.registered = torch.library.custom_op(
            f"mmalign::{self.name}", self.run, mutates_args=mutates, schema=schema
        )
        self.registered.register_fake(declaration)

    def run(self, *args: Any) -> Any:
        device = (args[0] if isinstance(args[0], Tensor) else args[0][0]).device
        function = dispatch.implementation(self.name, self.family, device.type)
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):  # kernels are launched on the current one
                return function(*args)
        return function(*args)

    def __call__(self, *args: Any) -> Any:
        return self.registered(*args) if is_traced(args[0]) else self.run(*args)


def operation(declaration: Callable) -> Operation:
    """Declare an operation that leaves its arguments alone."""
    return Operation(declaration, mutates=())


def is_traced(x: Tensor | list[Tensor]) -> bool:
    """Whether a call must go through the dispatcher: compiled, exported, fake or meta tensors."""
    if torch.compiler.is_compiling():
        return True
    tensor = x if isinstance(x, Tensor) else x[0]
    return type(tensor) not in (Tensor, Parameter) or tensor.is_meta


def differentiable(forward: Operation, setup_context: Callable, backward: Callable) -> Callable:
    """`forward` with a gradient.

    setup_context(ctx, inputs, output) keeps what backward(ctx, *grads) needs; both serve the
    registered operation and eager calls. A gradient that nothing asked for arrives as None.
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
        @once_differentiable
        def backward(ctx: Any, *grads: Tensor | None) -> Any:
            with dispatch.use_backend(ctx.backend):  # the one that ran the forward pass
                return backward(ctx, *grads)

    def call(*args: Any) -> Any:
        if is_traced(args[0]):
            return forward.registered(*args)
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args):
            return Eager.apply(*args)
        return forward.run(*args)

    return call
