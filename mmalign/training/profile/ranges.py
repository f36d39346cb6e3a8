"""Named ranges of a step in torch.profiler's trace and as NVTX: phases, layers and operations.

They are wrapped around the trainer from outside, inside `ranges_of(trainer)` alone: a run that is
not profiled does not know of them.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial, wraps

import torch
from mmalign_kernels.operation import Operation
from torch import Tensor, nn
from torch.profiler import record_function

from mmalign.batch import PackedBatch
from mmalign.model.llava import Llava
from mmalign.training.trainer import Trainer

OPERATION_PREFIX = "mmalign::"


class ProfilerRange:
    """A context manager: record_function, and NVTX where CUDA is available."""

    def __init__(self, name: str):
        self.name, self.record = name, record_function(name)

    def __enter__(self) -> "ProfilerRange":
        self.record.__enter__()
        if torch.cuda.is_available():
            torch.cuda.nvtx.range_push(self.name)
        return self

    def __exit__(self, *exception) -> None:
        if torch.cuda.is_available():
            torch.cuda.nvtx.range_pop()
        self.record.__exit__(None, None, None)


@contextmanager
def ranges_of(trainer: Trainer) -> Iterator[None]:
    """Inside: phases of the step, every layer's forward and backward pass, and every operation."""
    optimizer, modules = trainer.optimizer, {"forward": trainer.parallel.model}
    with ExitStack() as stack:
        for owner, method, range_of in (
            (PackedBatch, "to", lambda *_: ProfilerRange("copy to device")),
            (Tensor, "backward", lambda *_: ProfilerRange("backward")),
            (optimizer, "gradient_norm", lambda *_: ProfilerRange("gradient norm")),
            (optimizer, "step", lambda *_: ProfilerRange("optimizer")),
            (Operation, "run", lambda x, *_: ProfilerRange(f"{OPERATION_PREFIX}{x.name}")),
        ):
            stack.enter_context(wrapped(owner, method, range_of))
        hooks = _ModuleRanges(modules | _parts(trainer.model))
        stack.callback(hooks.remove)
        yield


@contextmanager
def wrapped(
    owner: object, method: str, around: Callable[..., AbstractContextManager]
) -> Iterator[None]:
    """Inside, calls of owner.method run within the context around(*arguments)."""
    function, own = getattr(owner, method), vars(owner).get(method)

    @wraps(function)
    def call(*args, **kwargs):
        with around(*args):
            return function(*args, **kwargs)

    setattr(owner, method, call)
    try:
        yield
    finally:
        if own is None:  # an object's method is its class's
            delattr(owner, method)
        else:
            setattr(owner, method, own)


class _ModuleRanges:
    """Forward ranges by module hooks, backward ranges of layers by hooks on the graph's nodes."""

    def __init__(self, modules: dict[str, nn.Module]):
        self.open: list[ProfilerRange] = []  # of forward passes, innermost last
        self.backward: ProfilerRange | None = None
        self.hooks = []
        for name, module in modules.items():
            self.hooks += [
                module.register_forward_pre_hook(partial(self._begin, name)),
                module.register_forward_hook(partial(self._end, name), always_call=True),
            ]

    def remove(self) -> None:
        self._leave_backward()
        for hook in self.hooks:
            hook.remove()

    def _begin(self, name: str, module: nn.Module, args: tuple) -> None:
        self._leave_backward()
        if name == "layer 0" and args[0].grad_fn is not None:
            args[0].grad_fn.register_prehook(self._leave_backward)
        self.open.append(ProfilerRange(name))
        self.open[-1].__enter__()

    def _end(self, name: str, module: nn.Module, args: tuple, output) -> None:
        self.open.pop().__exit__()
        if name.startswith("layer") and output is not None and output[0].grad_fn is not None:
            output[0].grad_fn.register_prehook(partial(self._enter_backward, name))

    def _enter_backward(self, name: str, grads: tuple) -> None:
        """The gradient of the layer's output is complete: its backward pass begins."""
        self._leave_backward()
        self.backward = ProfilerRange(f"{name} backward")
        self.backward.__enter__()

    def _leave_backward(self, *grads: tuple) -> None:
        """Another layer begins, or the gradient of the first layer's input is complete."""
        if self.backward is not None:
            self.backward.__exit__()
            self.backward = None


def _parts(model: Llava) -> dict[str, nn.Module]:
    parts: dict[str, nn.Module] = {
        f"layer {i}": layer for i, layer in enumerate(model.decoder.layers)
    }
    if model.vision_tower is not None and model.projector is not None:
        parts |= {"vision tower": model.vision_tower, "projector": model.projector}
        layers = enumerate(model.vision_tower.layers)
        parts |= {f"vision layer {i}": layer for i, layer in layers}
    return parts
