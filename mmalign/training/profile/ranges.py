"""Named ranges of a step: stages, layers and operations, in torch.profiler's trace and as NVTX.

They exist only inside `ranges_of(model)`; outside of it a stage costs one look at a variable.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
from mmalign_kernels.operation import Operation
from torch import nn
from torch.profiler import record_function

from mmalign.model.llava import Llava

OPERATION_PREFIX = "mmalign::"
_recording = False
_NOTHING = nullcontext()


def stage(name: str) -> AbstractContextManager:
    """The range of a stage of the step: data wait, forward, backward, optimizer ..."""
    return _Range(name) if _recording else _NOTHING


class _Range:
    def __init__(self, name: str):
        self.name, self.record = name, record_function(name)

    def __enter__(self) -> "_Range":
        self.record.__enter__()
        if torch.cuda.is_available():
            torch.cuda.nvtx.range_push(self.name)
        return self

    def __exit__(self, *exception) -> None:
        if torch.cuda.is_available():
            torch.cuda.nvtx.range_pop()
        self.record.__exit__(None, None, None)


@contextmanager
def ranges_of(model: Llava) -> Iterator[None]:
    """Inside: stages, every layer's forward and backward pass, and every operation have ranges."""
    global _recording
    run = Operation.run

    def run_in_range(operation: Operation, *args):
        with _Range(f"{OPERATION_PREFIX}{operation.name}"):
            return run(operation, *args)

    layers = _LayerRanges(model)
    Operation.run, _recording = run_in_range, True
    try:
        yield
    finally:
        Operation.run, _recording = run, False
        layers.remove()


class _LayerRanges:
    """Forward ranges by module hooks, backward ranges by hooks on the nodes of the graph."""

    def __init__(self, model: Llava):
        self.open: list[_Range] = []  # of forward passes, innermost last
        self.backward: _Range | None = None
        self.hooks = []
        for name, module in _named_parts(model):
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
        self.open.append(_Range(name))
        self.open[-1].__enter__()

    def _end(self, name: str, module: nn.Module, args: tuple, output) -> None:
        self.open.pop().__exit__()
        if name.startswith("layer") and output is not None and output[0].grad_fn is not None:
            output[0].grad_fn.register_prehook(partial(self._enter_backward, name))

    def _enter_backward(self, name: str, grads: tuple) -> None:
        """The gradient of the layer's output is there: its backward pass begins."""
        self._leave_backward()
        self.backward = _Range(f"{name} backward")
        self.backward.__enter__()

    def _leave_backward(self, *grads: tuple) -> None:
        """The next layer's turn, or the first layer's input has its gradient, or a new forward."""
        if self.backward is not None:
            self.backward.__exit__()
            self.backward = None


def _named_parts(model: Llava) -> list[tuple[str, nn.Module]]:
    parts = [(f"layer {i}", layer) for i, layer in enumerate(model.decoder.layers)]
    if model.vision_tower is not None:
        parts += [("vision tower", model.vision_tower), ("projector", model.projector)]
        layers = enumerate(model.vision_tower.layers)
        parts += [(f"vision layer {i}", layer) for i, layer in layers]
    return parts
