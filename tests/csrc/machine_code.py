"""What the compiler made of every kernel in a library, read with Triton's cuobjdump."""

import re
import subprocess
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import triton


@dataclass(frozen=True)
class Kernel:
    """One kernel on one architecture."""

    name: str  # with template arguments
    architecture: str
    registers: int
    stack_bytes: int
    shared_bytes: int  # static; from sm_90 on with the KiB that the system reserves
    local_bytes: int


def kernels(library: Path) -> list[Kernel]:
    text = _cuobjdump(library, "-res-usage")
    found = []
    for part in re.split(r"^arch = ", text, flags=re.M)[1:]:
        figures = re.findall(
            r"Function (\S+):\n\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", part
        )
        names = _demangled([name for name, *_ in figures])
        for name, (_, *numbers) in zip(names, figures, strict=True):
            found.append(Kernel(name, part.split(None, 1)[0], *map(int, numbers)))
    return found


def instructions(library: Path, architecture: str) -> dict[str, Counter]:
    """Kernel -> opcode, with its modifiers -> how often it stands in the program text."""
    return {name: Counter(text) for name, text in programs(library, architecture).items()}


@cache  # a listing takes seconds
def programs(library: Path, architecture: str) -> dict[str, list[str]]:
    """Kernel -> its opcodes in the order of the program text."""
    text = _cuobjdump(library, "-arch", architecture, "-sass")
    _, *parts = re.split(r"^\s*Function : (\S+)$", text, flags=re.M)
    opcode = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)")
    opcodes = [opcode.findall(body) for body in parts[1::2]]
    return dict(zip(_demangled(parts[0::2]), opcodes, strict=True))


def count(opcodes: Counter, *parts: str) -> int:
    """Instructions whose name has all the parts between its dots: LDG, 128."""
    return sum(n for opcode, n in opcodes.items() if set(parts) <= set(opcode.split(".")))


def _cuobjdump(library: Path, *options: str) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    command = [tool, *options, library]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _demangled(names: list[str]) -> list[str]:
    """rms_norm_fwd_kernel<float, true>; enumerators are numbers."""
    done = subprocess.run(
        ["c++filt"], input="\n".join(names), check=True, capture_output=True, text=True
    )
    lines = done.stdout.splitlines()
    noise = r"\(anonymous namespace\)::|mmalign::|^void |\(mmalign::\w+\)(?=\d)"
    return [re.sub(noise, "", line).partition("(")[0] for line in lines]
