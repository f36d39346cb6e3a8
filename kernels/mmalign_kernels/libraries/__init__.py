"""Other projects' kernels as backends: what they serve, what they need and how to install them.

A library runs only when named. It serves whole families, forward and backward. attention.py and
apex.py hold the operations.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module, metadata
from importlib.util import find_spec

import torch
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)


class LibraryMissing(NotImplementedError):
    """A named backend cannot run here; the message says why and what to do."""


@dataclass(frozen=True)
class Library:
    """One backend: the families it serves, how to find its version, and the tensors it takes."""

    module: str  # of this package
    families: tuple[str, ...]
    version: Callable[[], str]  # raises LibraryMissing
    capability: tuple[int, int]  # oldest supported GPU
    max_head_dim: int = 256
    dtypes: tuple[torch.dtype, ...] = HALF
    device: str = "cuda"


def _load(module: str, functions: tuple[str, ...], missing: str) -> None:
    """Import the module and check its functions; LibraryMissing with `missing` as the advice."""
    try:
        loaded = import_module(module)
    except ModuleNotFoundError as error:
        name = error.name or module
        said = "is not installed" if module.startswith(name) else f"lacks the package {name}"
        raise LibraryMissing(f"{said}. {missing}") from error
    except (ImportError, OSError, RuntimeError) as error:  # built for another torch, no driver
        reason = str(error).strip().partition("\n")[0]
        raise LibraryMissing(f"is installed, but does not load: {reason}. {missing}") from error
    absent = [x for x in functions if not hasattr(loaded, x)]
    if absent:
        raise LibraryMissing(f"is installed, but {module} lacks {', '.join(absent)}. {missing}")


def _distribution(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "unknown version"


def _flash_attn() -> str:
    missing = "Needs 2.7 or later: pip install flash-attn --no-build-isolation (needs nvcc)"
    functions = "_flash_attn_varlen_forward", "_flash_attn_varlen_backward"
    _load("flash_attn.flash_attn_interface", functions, missing)
    version = _distribution("flash_attn")
    if version[0].isdigit() and tuple(map(int, version.split(".")[:2])) < (2, 7):
        raise LibraryMissing(f"is {version}, too old. {missing}")
    return version


def _flash_attn_3() -> str:
    missing = "Build FlashAttention's folder hopper/: python setup.py install (needs nvcc)"
    functions = "_flash_attn_forward", "_flash_attn_backward"
    _load("flash_attn_interface", functions, missing)
    return _distribution("flash_attn_3")


def _flash_attn_4() -> str:
    functions = "_flash_attn_fwd", "_flash_attn_bwd"
    _load("flash_attn.cute.interface", functions, "pip install flash-attn-4")
    return _distribution("flash_attn_4")


def _xformers() -> str:
    functions = "forward_requires_grad", "backward"
    functions = tuple(f"memory_efficient_attention_{x}" for x in functions)
    missing = "pip install xformers (from 0.0.35 on its attention is in the package mslk)"
    _load("xformers.ops", functions, missing)
    return _distribution("xformers")


def _torch_varlen() -> str:
    _load("torch.nn.attention.varlen", ("varlen_attn",), "Needs torch 2.10 or later")
    if not torch.backends.cuda.is_flash_attention_available():
        raise LibraryMissing(
            f"runs on CUDA only, and torch {torch.__version__} is built without its "
            "FlashAttention. Install a CUDA build of torch"
        )
    return str(torch.__version__)


_APEX_EXTENSIONS = ("amp_C", "fused_layer_norm_cuda")
_BUILD_APEX = (
    "Build NVIDIA's from source, in a clone of github.com/NVIDIA/apex: "
    "APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install -v --no-build-isolation ./"
)


def _apex() -> str:
    """NVIDIA's apex has CUDA extensions; PyPI's apex, another project, has none."""
    try:
        about = metadata.metadata("apex")
    except metadata.PackageNotFoundError:
        about = None
    absent = [x for x in _APEX_EXTENSIONS if find_spec(x) is None]
    if absent and about is None and find_spec("apex") is None:
        raise LibraryMissing(
            f"is not installed. {_BUILD_APEX} ('pip install apex' installs another project)"
        )
    if absent and (about is None or "NVIDIA" not in (about["Summary"] or "")):
        known = f"apex {about['Version']} ({about['Summary']})" if about else "a package apex"
        raise LibraryMissing(
            f"is not NVIDIA's: {known} is installed, without the CUDA extensions "
            f"{' and '.join(absent)}; PyPI's apex is another project. pip uninstall apex. "
            f"{_BUILD_APEX}"
        )
    if absent:
        raise LibraryMissing(f"was built without {' and '.join(absent)}. {_BUILD_APEX}")
    _load("amp_C", ("multi_tensor_adam", "multi_tensor_adam_capturable"), _BUILD_APEX)
    functions = "rms_forward_affine", "rms_backward_affine"
    _load("fused_layer_norm_cuda", functions, _BUILD_APEX)
    return about["Version"] if about else "unknown version"


_ATTENTION = "attention", ("full_attention", "rotary_attention")

LIBRARIES = {
    "flash_attn": Library(*_ATTENTION, _flash_attn, (8, 0)),
    "flash_attn_3": Library(*_ATTENTION, _flash_attn_3, (8, 0)),
    "flash_attn_4": Library(*_ATTENTION, _flash_attn_4, (9, 0), 128),
    "xformers": Library(*_ATTENTION, _xformers, (8, 0)),
    "torch_varlen": Library(*_ATTENTION, _torch_varlen, (8, 0)),
    "apex": Library("apex", ("rms_norm", "adamw"), _apex, (7, 0), dtypes=(*HALF, torch.float32)),
}


def implementation(backend: str, operation: str) -> Callable:
    """The function of a library that runs `operation`."""
    module = import_module(f"{__package__}.{LIBRARIES[backend].module}")
    return module.OPERATIONS[backend][operation]


@cache
def find(backend: str) -> tuple[str | None, str | None]:
    """Version of a library and None; or None and why it is missing, with what to do."""
    try:
        return LIBRARIES[backend].version(), None
    except LibraryMissing as error:
        return None, str(error)


def require(backend: str, operation: str) -> None:
    """Raise LibraryMissing if the backend cannot run here."""
    _, reason = find(backend)
    if reason:
        raise LibraryMissing(f"{operation}: backend {backend} {reason}. Or name another backend")


@cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def check(backend: str, operation: str, x: Tensor, head_dim: int | None = None) -> None:
    """Raise NotImplementedError if the library has no kernel for tensors like x."""
    library = LIBRARIES[backend]
    fits = x.device.type == library.device and x.dtype in library.dtypes
    if fits and x.is_cuda:
        fits = _capability(x.device.index) >= library.capability
    if fits and (head_dim is None or head_dim <= library.max_head_dim):
        return
    major, minor = library.capability
    types = ", ".join(str(dtype).removeprefix("torch.") for dtype in library.dtypes)
    needs = f"a GPU of compute capability {major}.{minor} or later and one of {types}"
    came = f"{str(x.dtype).removeprefix('torch.')} on {x.device}"
    if head_dim is not None:
        needs += f", with a head_dim of at most {library.max_head_dim}"
        came += f" with a head_dim of {head_dim}"
    if x.is_cuda:
        came += " of compute capability {}.{}".format(*_capability(x.device.index))
    raise NotImplementedError(
        f"{operation}: backend {backend} needs {needs}; the tensors are {came}. Change them, or "
        "name another backend (python -m mmalign_kernels lists them)"
    )
