"""Compiles the Triton kernels of a program before it runs: on several cores.

Otherwise Triton compiles a kernel when it is first launched, one after the other. Here processes
run the program on meta tensors and share the kernels that it launches, while the caller reads data
and weights. What it saves is not measured yet.

Triton compiles a kernel anew for other types, for other settings, and for pointers and integers
that are divisible by 16 where those before were not. So a program needs the sizes and the types of
the real run, except for the numbers of tokens and of samples: kernels do not specialise on these.
"""

import hashlib
import logging
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import torch

from . import dispatch
from .triton import launch

log = logging.getLogger("mmalign")
MOST_PROCESSES = 4  # starting one takes longer than compiling ten kernels
Program = Callable[[], None]  # that pickle takes, and that makes its tensors on META
META = torch.device("meta")


@contextmanager
def compiled_kernels(program: Program, device: torch.device) -> Iterator[None]:
    """Compiles what the program launches while the block runs, and waits at the end of the block.

    Does nothing where `device` runs no Triton kernels, or where an earlier run compiled them.
    """
    runs_triton = device.type == "cuda" and dispatch.forced_backend() != "reference"
    if not runs_triton or find_spec("triton") is None:
        yield
        return
    with compiling(program, launch.gpu(torch.empty(0, device=device))):
        yield


@contextmanager
def compiling(program: Program, gpu: launch.Gpu) -> Iterator[None]:
    """As compiled_kernels, for any GPU."""
    compiled = _compiled(program, gpu)
    cores = len(os.sched_getaffinity(0))
    num_processes = 0 if compiled.exists() else min(max(cores // 2, 1), MOST_PROCESSES)
    processes = start(program, gpu, num_processes)
    try:
        yield
        if finish(processes):
            compiled.touch()
    finally:
        for process in processes:
            process.kill()


def _compiled(program: Program, gpu: launch.Gpu) -> Path:
    """A file in Triton's cache that exists if the cache has the kernels of this program."""
    from triton import __version__, knobs

    sources = sorted(Path(launch.__file__).parent.glob("*.py"))
    content = pickle.dumps((program, gpu, __version__))
    digest = hashlib.sha256(content + b"".join(x.read_bytes() for x in sources))
    return Path(knobs.cache.dir) / f"mmalign_{digest.hexdigest()}"


def start(program: Program, gpu: launch.Gpu, num_processes: int) -> list[subprocess.Popen]:
    processes = []
    for share in range(num_processes):
        process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        assert process.stdin is not None
        process.stdin.write(pickle.dumps((program, gpu, share, num_processes)))
        process.stdin.close()
        processes.append(process)
    return processes


def finish(processes: list[subprocess.Popen]) -> bool:
    """Whether all have compiled their share; if not, a warning: the first launches compile it."""
    for process in processes:
        assert process.stderr is not None
        errors = process.stderr.read().decode()
        if process.wait():
            reason = errors.strip().rpartition("\n")[2]
            log.warning("kernels are compiled at their first launch, not before it: %s", reason)
    return not any(process.returncode for process in processes)


def main() -> None:
    """In a process of its own."""
    program, gpu, share, num_shares = pickle.load(sys.stdin.buffer)
    from .triton.compile_only import compile_only  # only here is Triton sure

    names = compile_only(gpu, share, num_shares)
    with dispatch.use_backend("triton"):
        program()
    print(*dict.fromkeys(names))


if __name__ == "__main__":
    main()
