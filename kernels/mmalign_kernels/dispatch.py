"""Chooses the implementation of an operation.

`rms_norm.py` declares the family rms_norm; `reference/rms_norm.py`, `triton/rms_norm.py` and
`cuda/rms_norm.py` implement it, with functions of the same names, arguments and results. A family
that a backend lacks has no file in its folder; `reference` implements all. `cpu` holds what C++
does better than PyTorch there, in fp32, and AdamW with any state.

MMALIGN_BACKEND, or `use_backend`, names backends, separated by commas. One of BACKENDS runs every
operation. A library (libraries/) runs the families that it serves, and nothing else changes:

    triton              everything in Triton
    flash_attn          attention by FlashAttention-2, the default for everything else
    apex,flash_attn     norms and AdamW by apex, attention by FlashAttention-2, the rest as above
    xformers,reference  attention by xformers, everything else in plain PyTorch
"""

import os
from collections.abc import Callable
from functools import cache
from importlib import import_module

from . import libraries
from .cpu import library as cpu_library
from .cuda import library as cuda_library
from .libraries import LIBRARIES

BACKENDS = ("reference", "cpu", "triton", "cuda")
PREFERENCE = {  # by device; anything else: reference
    "cpu": ("cpu", "reference"),
    "cuda": ("cuda", "triton", "reference"),
}
COMPILED = {"cpu": cpu_library, "cuda": cuda_library}  # from csrc/, where there was a compiler
# Families whose csrc/ kernels a benchmark on a GPU has shown to beat Triton's; none has run on one
# yet. The others run only when named.
MEASURED_CUDA: frozenset[str] = frozenset()

_override: str | None = None


def forced_backend() -> str | None:
    """What `use_backend` or MMALIGN_BACKEND names; None: the default."""
    return _override or environment_backend()


@cache  # reading os.environ takes longer than all the rest of a dispatch
def environment_backend() -> str | None:
    """MMALIGN_BACKEND, as it is when it is first needed."""
    forced = os.environ.get("MMALIGN_BACKEND") or None
    if forced is not None:
        _named(forced)
    return forced


class use_backend:  # called as a function; a generator would take three times as long
    """Force backends inside the block, named as in MMALIGN_BACKEND; None changes nothing."""

    def __init__(self, backend: str | None):
        if backend is not None:
            _named(backend)
        self.backend = backend

    def __enter__(self) -> None:
        global _override
        self.before, _override = _override, self.backend or _override

    def __exit__(self, *error: object) -> None:
        global _override
        _override = self.before


@cache
def _named(forced: str) -> dict[str | None, str]:
    """Family -> the library that serves it; None -> the named backend of all other families."""
    chosen = {}
    for name in (x.strip() for x in forced.split(",")):
        if name not in BACKENDS and name not in LIBRARIES:
            known = ", ".join((*BACKENDS, *LIBRARIES))
            raise ValueError(f"MMALIGN_BACKEND={forced!r}: {name!r} is not one of {known}")
        for family in LIBRARIES[name].families if name in LIBRARIES else (None,):
            if family in chosen:
                both = f"{chosen[family]} and {name} both serve {family or 'every operation'}"
                raise ValueError(f"MMALIGN_BACKEND={forced!r}: {both}. Name one of them")
            chosen[family] = name
    return chosen


def require(device_type: str) -> None:
    """Raises ValueError or NotImplementedError, before any work, where what is named cannot run."""
    forced = forced_backend()
    for backend in dict.fromkeys(_named(forced).values()) if forced else ():
        if backend in LIBRARIES:
            libraries.require(backend, f"MMALIGN_BACKEND={forced}")
            if (needed := LIBRARIES[backend].device) != device_type:
                raise NotImplementedError(
                    f"MMALIGN_BACKEND={forced}: {backend} runs on {needed}, not on {device_type}. "
                    "Name another backend"
                )
        else:
            _check_device(backend, f"MMALIGN_BACKEND={forced}", device_type)
            if backend in COMPILED and (reason := COMPILED[backend].missing()):
                raise NotImplementedError(
                    f"MMALIGN_BACKEND={forced}: the {backend} library {reason}"
                )
    named = device_type == "cpu" and os.environ.get("MMALIGN_CPU_LIBRARY")
    if named and (reason := cpu_library.missing()):
        raise NotImplementedError(f"MMALIGN_CPU_LIBRARY is set, but the library {reason}")


def implementation(operation: str, family: str, device_type: str) -> Callable:
    """The function that runs `operation` of `family` on tensors of a device type."""
    return _choose(operation, family, device_type, forced_backend())


def preference(device_type: str, family: str) -> tuple[str, ...]:
    """The backends that a family tries where none is named, in order."""
    backends = PREFERENCE.get(device_type, ("reference",))
    return tuple(x for x in backends if x != "cuda" or family in MEASURED_CUDA)


@cache
def _choose(operation: str, family: str, device_type: str, forced: str | None) -> Callable:
    named = _named(forced) if forced else {}
    if family in named:
        libraries.require(named[family], operation)
        return libraries.implementation(named[family], operation)
    own = named.get(None)
    for backend in (own,) if own else preference(device_type, family):
        if backend in COMPILED and not own and COMPILED[backend].missing():
            continue
        function = find(backend, operation, family)
        if function is not None:
            _check_device(backend, operation, device_type)
            return function
    raise NotImplementedError(
        f"{operation} has no {own} implementation: mmalign_kernels/{own}/{family}.py with "
        f"{operation} is missing. Unset MMALIGN_BACKEND, or set it to 'reference'"
    )


def _check_device(backend: str, operation: str, device_type: str) -> None:
    interpreted = backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    if backend == "cpu" and device_type != "cpu":
        raise NotImplementedError(
            f"{operation}: the cpu kernels need tensors on the CPU, not on {device_type}. "
            "Unset MMALIGN_BACKEND"
        )
    if device_type == "cpu" and backend in ("triton", "cuda") and not interpreted:
        raise NotImplementedError(
            f"{operation}: the {backend} kernels need a CUDA device, the tensors are on the CPU. "
            "Unset MMALIGN_BACKEND. (With TRITON_INTERPRET=1 set before Python starts, Triton's "
            "interpreter runs its kernels on a CPU, slowly.)"
        )


def find(backend: str, operation: str, family: str) -> Callable | None:
    """The function of one of BACKENDS; None if it does not implement the operation."""
    name = f"{__package__}.{backend}.{family}"
    try:
        return getattr(import_module(name), operation, None)
    except ModuleNotFoundError as error:
        if error.name != name:  # the file exists, but one of its imports is missing
            raise
        return None
