"""Devices, GPUs that we know, and the versions that a run or an evaluation used."""

import importlib.metadata
import os
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch
from mmalign_kernels import dispatch

import mmalign
from mmalign.errors import UserError
from mmalign.malloc import keep_freed_memory

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}  # by --precision


@dataclass(frozen=True)
class Gpu:
    """None: not published, or not measured."""

    name: str  # for scripts/plan_memory.py --gpu
    pattern: str  # found in what torch.cuda.get_device_name returns
    bf16_flops: float | None  # dense, with fp32 accumulation
    memory_gib: float | None  # that CUDA reports, rounded down


# Rates are half of what a data sheet gives with sparsity. From NVIDIA's data sheets of H100, H200,
# B200 (HGX), A100 and L40S, and for the others the white papers of GA102 and Ada. The first pattern
# that matches a device's name holds.
GPUS = (
    Gpu("h100-pcie", r"\bH100 PCIe", 756e12, None),
    Gpu("h100-nvl", r"\bH[12]00 NVL", 835.5e12, None),
    Gpu("h200", r"\bG?H200\b", 989.4e12, 139.7),
    Gpu("h100-80g", r"\bG?H[18]00\b", 989.4e12, 79.1),
    Gpu("b200", r"\bB200\b", 2250e12, 178.3),
    Gpu("a100-40g", r"\bA100.*40GB", 312e12, 39.4),
    Gpu("a100-80g", r"\bA[18]00\b", 312e12, 79.1),
    Gpu("l40s", r"\bL40S\b", 362e12, 44.3),
    Gpu("a40", r"\bA40\b", None, 44.3),
    Gpu("a6000", r"\bRTX A6000\b", 154.8e12, 47.4),
    Gpu("a10g", r"\bA10G\b", None, 22.0),
    Gpu("rtx-4090", r"\bRTX 4090\b", 165.2e12, 23.5),
    Gpu("rtx-3090", r"\bRTX 3090\b(?! Ti)", 71e12, 23.5),
)


def choose_device(device: str) -> torch.device:
    """auto: a GPU where there is one; under torchrun each process has its own.

    Raises UserError if the device is missing, or cannot run the backend that MMALIGN_BACKEND names.
    On a CPU the process keeps the memory that it frees from here on (malloc.py).
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no CUDA device here; use --device cpu")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        dispatch.require(device)
    except (ValueError, NotImplementedError) as error:
        raise UserError(str(error)) from error
    if device == "cuda":
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    keep_freed_memory()
    return torch.device(device)


def choose_precision(precision: str, device: torch.device) -> str:
    """auto: bf16 on a GPU, where our kernels multiply fp32 without matrix units; fp32 on a CPU."""
    if precision == "auto":
        return "bf16" if device.type == "cuda" else "fp32"
    if precision not in DTYPES:
        raise UserError(f"precision is {precision!r}; expected auto or one of {', '.join(DTYPES)}")
    return precision


def versions() -> dict[str, str | None]:
    """Of mmalign (with its git commit), Python, the libraries and the device."""
    packages = ("torch", "triton", "numpy", "pillow", "safetensors", "sentencepiece", "tokenizers")
    found = {name: _package_version(name) for name in packages}
    return {
        "mmalign": mmalign.__version__,
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        **found,
    }


def _package_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """Commit of the source that runs, with '-dirty' where files differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        folder = Path(mmalign.__file__).parent
        result = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip() or None
