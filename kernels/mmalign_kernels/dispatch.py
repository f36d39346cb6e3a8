"""Which implementation of an operation runs.

`reference.py` implements every operation. Another backend adds one file per family beside the
family's own, `rms_norm_triton.py` beside `rms_norm.py`, with functions of the same names. Arguments
and results of `x_fwd` and `x_bwd` are the same in every backend.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module

BACKENDS = ("reference", "triton", "cuda")
_PREFERENCE = {"cuda": ("cuda", "triton", "reference")}  # by device; anything else: reference

_override: str | None = None


def forced_backend() -> str | None:
    """The backend that `use_backend` or MMALIGN_BACKEND demands; None: the best one there is."""
    forced = _override or os.environ.get("MMALIGN_BACKEND") or None
    if forced is not None and forced not in BACKENDS:
        raise ValueError(f"MMALIGN_BACKEND={forced!r} is not one of {', '.join(BACKENDS)}")
    return forced


@contextmanager
def use_backend(backend: str | None) -> Iterator[None]:
    """Force one backend inside the block; None leaves the choice as it is."""
    global _override
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is not one of {', '.join(BACKENDS)}")
    before, _override = _override, backend or _override
    try:
        yield
    finally:
        _override = before


def implementation(operation: str, family: str, device_type: str) -> Callable:
    """The function that runs `operation`, of the family file `family`, on tensors of a device."""
    return _choose(operation, family, device_type, forced_backend())


@cache
def _choose(operation: str, family: str, device_type: str, forced: str | None) -> Callable:
    backends = (forced,) if forced else _PREFERENCE.get(device_type, ("reference",))
    for backend in backends:
        function = _find(backend, operation, family)
        if function is not None:
            _check_device(backend, operation, device_type)
            return function
    raise NotImplementedError(
        f"{operation} has no {forced} implementation: mmalign_kernels/{_file(forced, family)}.py "
        f"with {operation} is missing. Unset MMALIGN_BACKEND, or force 'reference'"
    )


def _check_device(backend: str, operation: str, device_type: str) -> None:
    interpreted = backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    if device_type == "cpu" and backend != "reference" and not interpreted:
        raise NotImplementedError(
            f"{operation}: the {backend} kernels need a CUDA device, the tensors are on the CPU. "
            "Unset MMALIGN_BACKEND. (Triton's interpreter runs its kernels on a CPU, slowly, where "
            "TRITON_INTERPRET=1 is set before Python starts.)"
        )


def _file(backend: str, family: str) -> str:
    return "reference" if backend == "reference" else f"{family}_{backend}"


def _find(backend: str, operation: str, family: str) -> Callable | None:
    name = f"{__package__}.{_file(backend, family)}"
    try:
        return getattr(import_module(name), operation, None)
    except ModuleNotFoundError as error:
        if error.name != name:  # the file is there, something that it imports is not
            raise
        return None
