"""Compiles what a program would launch, for a GPU that this process need not see.

The program runs on meta tensors, which have a shape and no data. What is compiled lies in Triton's
cache on the disk, where later processes find it.
"""

from importlib import import_module
from types import SimpleNamespace
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from . import launch


def compile_only(gpu: launch.Gpu, share: int, num_shares: int) -> list[str]:
    """From now on kernels are compiled and not launched, and operations take meta tensors.

    Of `num_shares` processes each compiles every kernel of its own share; their names are appended
    to the list that this returns.
    """
    seen: dict[str, int] = {}  # kernels in the order of their first launch
    compiled: list[str] = []
    compile_and_launch = JITFunction.run

    def compile_own(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        name = self.fn.__name__
        if seen.setdefault(name, len(seen)) % num_shares == share:
            compile_and_launch(self, *args, grid=grid, warmup=True, **options)
            compiled.append(name)

    target = GPUTarget("cuda", gpu.capability, launch.WARP)
    driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: target,
            get_current_device=lambda: 0,
            get_current_stream=lambda device: 0,
        )
    )
    JITFunction.run = compile_own
    launch.gpu = lambda x: gpu
    for name in ("operation", "swiglu"):  # who ask; here a meta tensor is not traced
        module = import_module(f"mmalign_kernels.{name}")
        module.is_traced = lambda x: False  # pyright: ignore[reportAttributeAccessIssue]
    return compiled
