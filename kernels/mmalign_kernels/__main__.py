"""python -m mmalign_kernels: which backends run which operations here, and why others cannot."""

import os
import platform
import sys
import textwrap
from argparse import ArgumentParser
from collections.abc import Iterator
from importlib import metadata
from importlib.util import find_spec

import torch

import mmalign_kernels

from . import dispatch, libraries
from .libraries import LIBRARIES
from .operation import Operation

WIDTH = 100


def _triton() -> tuple[str | None, str | None]:
    if find_spec("triton") is None:
        return None, "is not installed. pip install triton (CUDA builds of torch include it)"
    version = metadata.version("triton")
    if torch.cuda.is_available():
        return version, None
    if os.environ.get("TRITON_INTERPRET") == "1":
        return f"{version}, in its interpreter (TRITON_INTERPRET=1): slow", None
    return None, (
        f"{version} is installed, but there is no CUDA device. With TRITON_INTERPRET=1 its kernels "
        "run on a CPU, slowly, for tests"
    )


def _find(backend: str) -> tuple[str | None, str | None]:
    """Version of a backend and None; or None and why it cannot run here."""
    if backend == "reference":
        return f"torch {torch.__version__}", None
    if backend == "triton":
        return _triton()
    if backend in LIBRARIES:
        return libraries.find(backend)
    reason = dispatch.COMPILED[backend].missing()
    return (None, reason) if reason else ("its library is built", None)


def _families() -> Iterator[tuple[str, str, list[str]]]:
    """Public operation, its family and the functions that a backend must have."""
    for name in mmalign_kernels.__all__:
        module = sys.modules[getattr(mmalign_kernels, name).__module__]
        family = module.__name__.rpartition(".")[2]
        parts = [x.name for x in vars(module).values() if isinstance(x, Operation)]
        parts = [x for x in parts if x.startswith(name.removesuffix("_step"))] or parts
        if parts:  # linear declares none: it is torch's own
            yield name, family, parts


def _serves(backend: str, family: str, parts: list[str], here: bool) -> bool:
    if backend in LIBRARIES:
        return family in LIBRARIES[backend].families
    if find_spec(f"{__package__}.{backend}.{family}") is None:
        return False
    return not here or all(dispatch.find(backend, part, family) for part in parts)


def _rows(versions: dict[str, str | None]) -> Iterator[list[str]]:
    yield ["", *(x.partition("_")[0] if "_" in x else "" for x in versions)]
    yield ["", *(x.partition("_")[2] or x for x in versions)]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name, family, parts in _families():
        here = [x for x in versions if _serves(x, family, parts, bool(versions[x]))]
        marks = {x: "yes" if versions[x] else "no" for x in here}
        default = next(x for x in dispatch.preference(device, family) if marks.get(x) == "yes")
        marks[default] = "default"
        yield [name, *(marks.get(x, "-") for x in versions)]


def report() -> str:
    """The output of the command."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
    lines = [f"Python {platform.python_version()}, torch {torch.__version__}, {device}", ""]
    found = {x: _find(x) for x in (*dispatch.BACKENDS, *LIBRARIES)}
    for backend, (version, reason) in found.items():
        text = " ".join((reason or f"available: {version}").split())
        lines += textwrap.wrap(f"{backend:14}{text}", WIDTH, subsequent_indent=" " * 14)
    rows = list(_rows({x: version for x, (version, _) in found.items()}))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines.append("")
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        lines.append(" ".join(cells).rstrip())
    lines += ["", *textwrap.wrap(_HELP, WIDTH)]
    return "\n".join(lines)


_HELP = (
    "default: runs when no backend is named; yes: runs when named; no: cannot run here, for the "
    "reason above; -: does not implement it. MMALIGN_BACKEND=flash_attn,apex names libraries, "
    "which run what they serve; the default runs the rest. MMALIGN_BACKEND=triton runs every "
    "operation in Triton."
)


if __name__ == "__main__":
    ArgumentParser("python -m mmalign_kernels", description=__doc__).parse_args()
    print(report())
