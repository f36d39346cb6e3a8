"""Compiles the launches of a family for sm_80 and sm_90, without a GPU.

The launchers run on meta tensors under a driver that knows only its target. So a kernel is compiled
with exactly the arguments and settings that production passes, and a launcher that read a value
from the device would fail here. Needs a process without TRITON_INTERPRET; from kernels/:

    python -m codegen.compiler rms_norm             # one JSON line per kernel and architecture
    python -m codegen.compiler rms_norm float32 89  # in another dtype, for another device
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import triton
from mmalign_kernels.costs.cost import H100
from mmalign_kernels.triton import launch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

float_dtype = torch.bfloat16
KERNELS = Path(__file__).resolve().parents[1]
A100 = launch.Gpu(80, 108, 163 * 1024)
TARGETS = (A100, H100)
OTHERS = {  # RTX 3090, RTX 4090 and L40S, B200, RTX 5090: everything fits, not more is asked
    gpu.capability: gpu
    for gpu in (
        launch.Gpu(86, 82, 99 * 1024),
        launch.Gpu(89, 128, 99 * 1024),
        launch.Gpu(100, 148, 227 * 1024),
        launch.Gpu(120, 170, 99 * 1024),
    )
}
DEVICES = {gpu.capability: gpu for gpu in TARGETS} | OTHERS


@dataclass(frozen=True)
class Compiled:
    """One kernel on one architecture; instructions as counted in its machine code."""

    family: str
    launch: str
    kernel: str
    architecture: int
    num_warps: int
    registers: int
    shared_bytes: int
    stack_bytes: int
    spills: int  # local loads and stores
    occupancy: float  # share of the threads of a multiprocessor
    instructions: int
    loads: dict[str, int]  # bits of a global load -> count, with asynchronous copies
    stores: dict[str, int]
    hgmma: int
    hmma: int
    tma: int
    local_loads: int  # of operands from shared memory to registers, in TTGIR
    copies_ahead: int  # tiles in flight while a loop waits for one: its async_wait, at most

    @property
    def per_access(self) -> float:
        """Instructions per 128 bits of global loads and stores."""
        bits = sum(int(x) * n for counts in (self.loads, self.stores) for x, n in counts.items())
        return 128 * self.instructions / max(bits, 1)

    @property
    def vector_loads(self) -> float:
        return _vector_share(self.loads)

    @property
    def vector_stores(self) -> float:
        return _vector_share(self.stores)


def _vector_share(counts: dict[str, int]) -> float:
    """Share of the bits that 128-bit accesses move."""
    return 128 * counts.get("128", 0) / max(sum(int(bits) * n for bits, n in counts.items()), 1)


def meta(*shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A tensor with an address of the usual alignment and no data; bf16, or what is compiled."""
    return torch.empty(shape, dtype=dtype or float_dtype, device="meta")


def launches(family: str) -> ModuleType:
    return import_module(f"{__package__}.launches.{family}")


def compile_family(
    family: str, dtype: str = "bfloat16", targets: tuple[launch.Gpu, ...] = TARGETS
) -> list[Compiled]:
    global float_dtype
    float_dtype = getattr(torch, dtype)  # before the launches make their tensors
    runs, found = launches(family).LAUNCHES, []
    for gpu in targets:
        for name, run in runs.items():
            with recording(gpu) as kernels, torch.no_grad():
                run()
            unique = {(k.metadata.name, k.metadata.hash): k for k in kernels}
            found += [_read(family, name, gpu, k) for k in unique.values()]
    return found


@contextmanager
def pretend(gpu: launch.Gpu) -> Iterator[None]:
    """Inside the block launch settings are those for `gpu`, wherever the tensors are."""
    real, launch.gpu = launch.gpu, lambda x: gpu
    try:
        yield
    finally:
        launch.gpu = real


@contextmanager
def recording(gpu: launch.Gpu) -> Iterator[list]:
    """Inside the block a launch is compiled for `gpu` and listed, and does not run."""
    kernels, run = [], JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernels.append(run(self, *args, grid=grid, warmup=True, **kwargs))
        return kernels[-1]

    target = GPUTarget("cuda", gpu.capability, launch.WARP)
    pretended: Any = SimpleNamespace(
        get_current_target=lambda: target,
        get_current_device=lambda: gpu.capability,  # kernels are cached by device
        get_current_stream=lambda device: 0,
    )
    driver.set_active(pretended)
    JITFunction.run = compile_only
    try:
        with pretend(gpu):
            yield kernels
    finally:
        JITFunction.run = run


def _read(family: str, name: str, gpu: launch.Gpu, kernel: triton.compiler.CompiledKernel):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        command = [tool, "-res-usage", "-sass", file.name]
        sass = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    registers, stack = (int(re.findall(rf"{x}:(\d+)", sass)[0]) for x in ("REG", "STACK"))
    opcodes = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", sass)
    count = Counter(opcode.split(".")[0] for opcode in opcodes)
    num_warps, shared = kernel.metadata.num_warps, kernel.metadata.shared
    return Compiled(
        family=family,
        launch=name,
        kernel=kernel.metadata.name,
        architecture=gpu.capability,
        num_warps=num_warps,
        registers=registers,
        shared_bytes=shared,
        stack_bytes=stack,
        spills=count["LDL"] + count["STL"],
        occupancy=_occupancy(gpu, num_warps, registers, shared),
        instructions=len(opcodes) - count["NOP"],
        loads=_widths(opcodes, "LDG", "LDGSTS"),
        stores=_widths(opcodes, "STG"),
        hgmma=count["HGMMA"],
        hmma=count["HMMA"],
        tma=count["UTMALDG"] + count["UTMASTG"],
        local_loads=len(re.findall(r"ttg\.local_load.*-> tensor<\d+x\d+x", kernel.asm["ttgir"])),
        copies_ahead=max(
            map(int, re.findall(r"async_wait.*num = (\d+)", kernel.asm["ttgir"])), default=0
        ),
    )


def _widths(opcodes: list[str], *names: str) -> dict[str, int]:
    counts = Counter()
    for opcode in opcodes:
        name, *parts = opcode.split(".")
        if name in names:
            narrow = [x[1:] for x in parts if x in ("U8", "S8", "U16", "S16")]
            counts[next((x for x in parts if x in ("64", "128")), (narrow or ["32"])[0])] += 1
    return dict(sorted(counts.items(), key=lambda item: int(item[0])))


def _occupancy(gpu: launch.Gpu, num_warps: int, registers: int, shared: int) -> float:
    by_registers = 65536 // (-(-registers // 8) * 8 * launch.WARP * num_warps)
    by_shared = (gpu.shared_bytes + 1024) // (shared + 1024)  # the system reserves 1 KiB
    programs = min(by_registers, by_shared, 64 // num_warps, 32)
    return programs * num_warps / 64


def families() -> list[str]:
    files = (Path(__file__).parent / "launches").glob("[!_]*.py")
    return sorted(file.stem for file in files)


def compile_apart(family: str, dtype: str = "bfloat16", *capabilities: int) -> list[Compiled]:
    """compile_family for TARGETS, or for DEVICES by capability.

    In a process of its own, because TRITON_INTERPRET turns the compiler off.
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", __name__, family, dtype, *map(str, capabilities)]
    process = subprocess.run(
        command, cwd=KERNELS, env=environment, capture_output=True, text=True, check=False
    )
    if process.returncode:
        raise RuntimeError(process.stderr)
    return [Compiled(**json.loads(line)) for line in process.stdout.splitlines()]


def main(family: str, dtype: str = "bfloat16", *capabilities: str) -> None:
    targets = tuple(DEVICES[int(x)] for x in capabilities) or TARGETS
    for compiled in compile_family(family, dtype, targets):
        print(json.dumps(asdict(compiled)))


if __name__ == "__main__":
    import_module("codegen.compiler").main(*sys.argv[1:])  # the module that the launches import
