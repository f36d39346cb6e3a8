"""The machine and the versions that a run or an evaluation used."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import torch

import mmalign
from mmalign.errors import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}  # by --precision


def choose_device(device: str) -> torch.device:
    """auto takes a GPU where there is one; under torchrun each process its own."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no CUDA device here; use --device cpu")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device(device)


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
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None if result.returncode == 0 else None
