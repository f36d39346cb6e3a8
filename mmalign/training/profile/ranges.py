"""Named ranges of a step in torch.profiler's trace and as NVTX: phases, layers and operations.

They are wrapped around the trainer from outside, inside `ranges_of(trainer)` alone: a run that is
not profiled does not know of them.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial, wraps

import torch
from mmalign_kernels.operation import Operation
from torch import Tensor, nn
from torch.profiler import record_function

from mmalign.batch import PackedBatch
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
def ranges_of(trainer: Trainer, step_begins: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Inside: phases of the step, every layer's forward and backward pass, and every operation.

    step_begins is called before each train_step.
    """
    phases = {
        "copy to device": (PackedBatch, "to"),
        "backward": (Tensor, "backward"),
        "gradient norm": (trainer.optimizer, "gradient_norm"),
        "optimizer": (trainer.optimizer, "step"),
    }
    with ExitStack() as stack:
        for name, (owner, method) in phases.items():
            stack.enter_context(_replaced(owner, method, partial(_in_range, name)))
        stack.enter_context(_replaced(Operation, "run", _operation_in_range))
        stack.enter_context(_replaced(trainer, "train_step", partial(_after, step_begins)))
        modules = _ModuleRanges({"forward": trainer.parallel.model, **_parts(trainer.model)})
        stack.callback(modules.remove)
        yield


@contextmanager
def _replaced(owner: object, name: str, wrap: Callable[[Callable], Callable]) -> Iterator[None]:
    """Inside, owner.name is wrap(owner.name)."""
    own = vars(owner).get(name)
    setattr(owner, name, wrap(getattr(owner, name)))
    try:
        yield
    finally:
        if own is None:  # an object's method is its class's
            delattr(owner, name)
        else:
            setattr(owner, name, own)


def _in_range(name: str, function: Callable) -> Callable:
    @wraps(function)
    def wrapped(*args, **kwargs):
        with ProfilerRange(name):
            return function(*args, **kwargs)

    return wrapped


def _after(first: Callable[[], None], function: Callable) -> Callable:
    @wraps(function)
    def wrapped(*args, **kwargs):
        first()
        return function(*args, **kwargs)

    return wrapped


def _operation_in_range(run: Callable) -> Callable:
    def wrapped(operation: Operation, *args):
        with ProfilerRange(f"{OPERATION_PREFIX}{operation.name}"):
            return run(operation, *args)

    return wrapped


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


def _parts(model: nn.Module) -> dict[str, nn.Module]:
    parts = {f"layer {i}": layer for i, layer in enumerate(model.decoder.layers)}
    if model.vision_tower is not None:
        parts |= {"vision tower": model.vision_tower, "projector": model.projector}
        layers = enumerate(model.vision_tower.layers)
        parts |= {f"vision layer {i}": layer for i, layer in layers}
    return parts
