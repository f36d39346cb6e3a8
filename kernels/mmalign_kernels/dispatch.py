"""Which implementation of an operation runs.

`reference.py` implements every operation. Another backend adds one file per family beside the
family's own, `rms_norm_triton.py` beside `rms_norm.py`, with functions of the same names. Arguments
and results of `x_fwd` and `x_bwd` are the same in every backend.

MMALIGN_BACKEND, or `use_backend`, names backends, separated by commas. One of BACKENDS runs every
operation. A library (libraries.py) runs the families that it serves, the others run as without it:

    triton              everything in Triton
    flash_attn          attention by FlashAttention-2, everything else by the best there is
    apex,flash_attn     norms and AdamW by apex, attention by FlashAttention-2, the rest as above
    xformers,reference  attention by xformers, everything else in plain PyTorch
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module

from . import libraries
from .libraries import LIBRARIES

BACKENDS = ("reference", "triton", "cuda")
PREFERENCE = {"cuda": ("cuda", "triton", "reference")}  # by device; anything else: reference
# Families whose kernels of csrc/ a GPU has shown to be faster than Triton's. The others run when
# they are named.
MEASURED_CUDA: frozenset[str] = frozenset()

_override: str | None = None


def forced_backend() -> str | None:
    """What `use_backend` or MMALIGN_BACKEND demands; None: the best there is."""
    forced = _override or os.environ.get("MMALIGN_BACKEND") or None
    if forced is not None:
        _named(forced)
    return forced


@contextmanager
def use_backend(backend: str | None) -> Iterator[None]:
    """Force backends inside the block, named as in MMALIGN_BACKEND; None leaves the choice."""
    global _override
    if backend is not None:
        _named(backend)
    before, _override = _override, backend or _override
    try:
        yield
    finally:
        _override = before


@cache
def _named(forced: str) -> dict[str | None, str]:
    """Family -> the library that serves it; None -> the backend of all others, where named."""
    chosen = {}
    for name in (x.strip() for x in forced.split(",")):
        if name not in BACKENDS and name not in LIBRARIES:
            known = ", ".join((*BACKENDS, *LIBRARIES))
            raise ValueError(f"MMALIGN_BACKEND={forced!r}: {name!r} is not one of {known}")
        for family in LIBRARIES[name].files if name in LIBRARIES else (None,):
            if family in chosen:
                both = f"{chosen[family]} and {name} both serve {family or 'every operation'}"
                raise ValueError(f"MMALIGN_BACKEND={forced!r}: {both}. Name one of them")
            chosen[family] = name
    return chosen


def implementation(operation: str, family: str, device_type: str) -> Callable:
    """The function that runs `operation`, of the family file `family`, on tensors of a device."""
    return _choose(operation, family, device_type, forced_backend())


def preference(device_type: str, family: str) -> tuple[str, ...]:
    """The backends of a family where none is named, the best first."""
    backends = PREFERENCE.get(device_type, ("reference",))
    return tuple(x for x in backends if x != "cuda" or family in MEASURED_CUDA)


@cache
def _choose(operation: str, family: str, device_type: str, forced: str | None) -> Callable:
    named = _named(forced) if forced else {}
    if family in named:
        return _from_library(named[family], operation, family)
    own = named.get(None)
    for backend in (own,) if own else preference(device_type, family):
        if backend == "cuda" and not own and libraries.cuda_missing():
            continue  # csrc/ is built where there is a CUDA compiler; Triton needs none
        function = find(backend, operation, family)
        if function is not None:
            _check_device(backend, operation, device_type)
            return function
    raise NotImplementedError(
        f"{operation} has no {own} implementation: mmalign_kernels/{file(own, family)}.py "
        f"with {operation} is missing. Unset MMALIGN_BACKEND, or force 'reference'"
    )


def _from_library(backend: str, operation: str, family: str) -> Callable:
    libraries.require(backend, operation)
    return getattr(import_module(f"{__package__}.{LIBRARIES[backend].files[family]}"), operation)


def _check_device(backend: str, operation: str, device_type: str) -> None:
    interpreted = backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    if device_type == "cpu" and backend != "reference" and not interpreted:
        raise NotImplementedError(
            f"{operation}: the {backend} kernels need a CUDA device, the tensors are on the CPU. "
            "Unset MMALIGN_BACKEND. (Triton's interpreter runs its kernels on a CPU, slowly, where "
            "TRITON_INTERPRET=1 is set before Python starts.)"
        )


def file(backend: str, family: str) -> str:
    return "reference" if backend == "reference" else f"{family}_{backend}"


def find(backend: str, operation: str, family: str) -> Callable | None:
    """A function of one of BACKENDS; None where it has none."""
    name = f"{__package__}.{file(backend, family)}"
    try:
        return getattr(import_module(name), operation, None)
    except ModuleNotFoundError as error:
        if error.name != name:  # the file is there, something that it imports is not
            raise
        return None
