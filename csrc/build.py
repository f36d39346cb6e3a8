"""Builds csrc/ into build/csrc-*, without installing it; later calls rebuild what changed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from filelock import FileLock

REPOSITORY = Path(__file__).resolve().parents[1]
ARCHITECTURES = ("80", "90a", "100a")


def build(archs: tuple[str, ...], target: str) -> Path:
    """The library `target` for these architectures; none: only the host library."""
    folder = REPOSITORY / "build" / ("csrc-" + ("-".join(archs) or "host"))
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):  # test processes run concurrently
        configure = ["cmake", "-S", REPOSITORY, "-B", folder, f"-DMMALIGN_PYTHON={sys.executable}"]
        configure += [f"-DMMALIGN_CUDA_ARCHS={';'.join(archs) or 'none'}", "-DMMALIGN_WERROR=ON"]
        if not (folder / "CMakeCache.txt").exists() and shutil.which("ninja"):
            configure += ["-G", "Ninja"]
        _run(configure)
        _run(["cmake", "--build", folder, "--target", target, "--parallel", str(os.cpu_count())])
    return folder / f"lib{target}.so"


def _run(command: list) -> None:
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode:
        output = process.stdout + process.stderr
        noise = ("ptxas info", "    0 bytes stack frame")
        lines = [line for line in output.splitlines() if not line.startswith(noise)]
        raise RuntimeError("\n".join([" ".join(map(str, command)), *lines[-60:]]))
