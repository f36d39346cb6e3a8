"""The variants of an operation, how they want their data, and the random data itself."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from types import SimpleNamespace

import torch
from mmalign_kernels import dispatch, libraries
from mmalign_kernels.cuda import library as cuda_library
from mmalign_kernels.libraries import LIBRARIES
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
TYPE_NAME = {torch.bfloat16: "bf16", torch.float32: "fp32"}[DTYPE]
FORWARD, BACKWARD, BOTH, STEP = "forward", "backward", "both", "step"
LOSS_ONLY, SCORE = "loss only", "score"  # forward passes without gradients
ALL = (FORWARD, BACKWARD, BOTH)
EVERY = (*ALL, STEP, LOSS_ONLY, SCORE)


def _same(inputs: SimpleNamespace) -> SimpleNamespace:
    return inputs


def _as_it_is(inputs: SimpleNamespace, output: Tensor) -> Tensor:
    return output


@dataclass(frozen=True)
class Layout:
    """How a library wants the data: entered once and untimed. None: as the case makes them."""

    leaves: tuple[str, ...] | None = None  # what gradients are taken by; None: the operation's
    enter: Callable[[SimpleNamespace], SimpleNamespace] = _same  # differentiable
    exit: Callable[[SimpleNamespace, Tensor], Tensor] = _as_it_is  # back, for the check


@dataclass(frozen=True)
class Variant:
    name: str
    function: Callable[[SimpleNamespace], Tensor | tuple[Tensor, ...]]
    missing: Callable[[torch.device], str | None] = lambda device: None
    layout: Layout = Layout()
    context: Callable[[], AbstractContextManager] = nullcontext
    directions: tuple[str, ...] = EVERY
    compiled: bool = False
    comparable: bool = True  # moves the bytes that the operation's cost counts


def ours(family: str, function: Callable, layout: Layout = Layout()) -> list[Variant]:
    """mmalign's operation by its own kernels, best first; then by each library that serves it."""
    libraries_of = [name for name, served in LIBRARIES.items() if family in served.families]
    names = {f"mmalign {backend}": backend for backend in ("cuda", "triton", "reference")}
    names |= {f"{library} through mmalign": library for library in libraries_of}
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


def _our_missing(backend: str, family: str, device: torch.device) -> str | None:
    if backend == "reference":
        return None
    if backend not in LIBRARIES and find_spec(f"mmalign_kernels.{backend}.{family}") is None:
        return f"{family} has no {backend} kernel"
    if device.type != "cuda":
        return f"{backend} needs a CUDA device"
    return _not_installed(backend)


@cache
def _not_installed(backend: str) -> str | None:
    if backend == "triton":
        return None
    reason = cuda_library.missing() if backend == "cuda" else libraries.find(backend)[1]
    return None if reason is None else f"{backend} {reason.partition('. ')[0]}"


def on_gpu(device: torch.device) -> str | None:
    return None if device.type == "cuda" else "timed on a GPU only"


def torch_variants(function: Callable, layout: Layout = Layout()) -> list[Variant]:
    """PyTorch's own: eager, and compiled on a GPU."""
    return [
        Variant("torch eager", function, layout=layout),
        Variant("torch.compile", function, on_gpu, layout, compiled=True),
    ]


def activations(
    rows: int, columns: int, device: torch.device, dtype: torch.dtype, spread: float = 0.5
) -> Tensor:
    """Normal, with columns of different scale, as hidden states have."""
    scale = torch.exp(spread * torch.randn(columns, device=device))
    return (torch.randn(rows, columns, device=device) * scale).to(dtype)


def norm_weight(columns: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return (1 + 0.2 * torch.randn(columns, device=device)).to(dtype)


def head_inputs(
    tokens: int,
    num_supervised: int,
    hidden_size: int,
    vocab_size: int,
    device: torch.device,
    dtype: torch.dtype,
) -> SimpleNamespace:
    """Hidden states that lean towards their target: the loss of a trained model, about 2."""
    weight = torch.randn(vocab_size, hidden_size, device=device) / hidden_size**0.5
    target_ids = torch.randint(vocab_size, (tokens,), device=device)
    hidden_states = torch.randn(tokens, hidden_size, device=device)
    hidden_states += 9 * weight[target_ids]
    ignored = torch.randperm(tokens, device=device)[num_supervised:]
    target_ids[ignored] = -100
    return SimpleNamespace(
        hidden_states=hidden_states.to(dtype), weight=weight.to(dtype), target_ids=target_ids
    )
