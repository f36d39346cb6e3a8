"""Variants of an operation: ours by backend, PyTorch's own, and how each library is called.

Every function takes the inputs of a case. Libraries are imported at their first use, which is a
verification or a warm-up.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace

from mmalign_kernels import dispatch, libraries
from mmalign_kernels.cpu import library as cpu_library
from mmalign_kernels.cuda import library as cuda_library
from torch import Tensor

from bench.comparison import BACKWARD, BOTH, FORWARD, LOSS_ONLY, SCORE, STEP
from bench.shapes import ON_GPU, REHEARSAL

Inputs = SimpleNamespace


@dataclass(frozen=True)
class Layout:
    """How a library takes the data: entered once and untimed."""

    leaves: tuple[str, ...] | None = None  # what gradients are taken of; None: the case's
    enter: Callable[[Inputs], Inputs] = lambda inputs: inputs  # differentiable
    exit: Callable[[Inputs, Tensor], Tensor] = lambda inputs, output: output  # to verify it


@dataclass(frozen=True)
class Variant:
    name: str
    function: Callable[[Inputs], Tensor | tuple[Tensor, ...]]
    missing: Callable[[], str | None] = lambda: None  # why it cannot run here
    layout: Layout = Layout()
    context: Callable[[], AbstractContextManager] = nullcontext
    directions: tuple[str, ...] = (FORWARD, BACKWARD, BOTH, STEP, LOSS_ONLY, SCORE)
    compiled: bool = False
    comparable: bool = True  # moves the bytes that the operation's cost counts


# ---- ours ----


def ours(family: str, function: Callable, layout: Layout = Layout()) -> list[Variant]:
    """mmalign's operation by its own kernels, best first; then by each library that serves it."""
    served = [name for name, one in libraries.LIBRARIES.items() if family in one.families]
    names = {f"mmalign {backend}": backend for backend in ("cuda", "triton", "cpu", "reference")}
    names |= {f"{library} through mmalign": library for library in served}
    return [
        Variant(
            name,
            function,
            partial(_our_missing, backend, family),
            layout,
            partial(dispatch.use_backend, backend),
        )
        for name, backend in names.items()
    ]


def _our_missing(backend: str, family: str) -> str | None:
    if backend == "reference":
        return None
    known = backend in libraries.LIBRARIES
    if not known and find_spec(f"mmalign_kernels.{backend}.{family}") is None:
        return f"{family} has no {backend} kernel"
    if backend == "cpu":
        reason = f"{backend} needs tensors on a CPU" if ON_GPU else cpu_library.missing()
        return reason and reason.partition(". ")[0]
    if not ON_GPU and not (REHEARSAL and backend == "triton"):  # in its interpreter
        return f"{backend} needs a CUDA device"
    if backend == "triton":
        return None
    reason = libraries.find(backend)[1] if known else cuda_library.missing()
    return None if reason is None else f"{backend} {reason.partition('. ')[0]}"


# ---- PyTorch's and the libraries' ----


def on_gpu() -> str | None:
    return None if ON_GPU else "timed on a GPU only"


def torch_variants(function: Callable, layout: Layout = Layout()) -> list[Variant]:
    """PyTorch's own: eager, and compiled on a GPU."""
    return [
        Variant("torch eager", function, layout=layout),
        Variant("torch.compile", function, on_gpu, layout, compiled=True),
    ]


def missing(library: str) -> Callable[[], str | None]:
    """For Variant.missing: why the library cannot run on this machine."""

    def reason() -> str | None:
        if not ON_GPU and library != "transformers":
            return f"{library} needs a CUDA device"
        module = library.replace("-", "_")
        return None if find_spec(module) else f"{library} is not installed"

    return reason


def peer(library: str, function: Callable, layout: Layout = Layout(), **more) -> Variant:
    """The variant that is called as its library."""
    return Variant(library, function, missing(library), layout, **more)


@cache
def library(module: str) -> ModuleType:
    return import_module(module)


def liger() -> ModuleType:
    return library("liger_kernel.transformers.functional")


def llama_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """LlamaRMSNorm's formula runs as the module does, with the given weight."""
    module = library("transformers.models.llama.modeling_llama").LlamaRMSNorm
    return module.forward(SimpleNamespace(weight=weight, variance_epsilon=eps), x)
