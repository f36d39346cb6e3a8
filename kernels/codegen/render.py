#!/usr/bin/env python
"""Writes kernels/CODEGEN.md: what the compiler makes of every Triton kernel. Needs no GPU.

python kernels/codegen/render.py            # all families
python kernels/codegen/render.py rms_norm   # only these; the other sections stay
python kernels/codegen/render.py --check    # write nothing, exit with 1 if the file is out of date
"""

import re
import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import triton

from codegen.compiler import KERNELS, Compiled, compile_apart, families

PATH = KERNELS / "CODEGEN.md"
HEAD = f"""# Compiled Triton kernels

Written by `python kernels/codegen/render.py`, checked by `--check`; triton {triton.__version__}.

Every kernel at the shapes of LLaMA2-7B, OpenLLaMA-3B and CLIP ViT-L/14 in bf16, compiled for sm_80
and sm_90 by the launchers that production calls. Loads and stores are the program's global ones,
count x bits (asynchronous copies are loads); occupancy is the share of the threads of a
multiprocessor. HGMMA and HMMA are tensor-core products, TMA bulk tensor copies.
"""
COLUMNS = (
    *("launch", "kernel", "sm", "warps", "registers", "shared bytes", "stack", "spills"),
    *("occupancy", "loads", "stores", "HGMMA", "HMMA", "TMA"),
)


def section(kernels: list[Compiled]) -> str:
    """The section of one family."""
    lines = [COLUMNS, ["---"] * len(COLUMNS)]
    for x in kernels:
        loads, stores = (
            " ".join(f"{n}x{bits}" for bits, n in counts.items()) for counts in (x.loads, x.stores)
        )
        lines.append(
            [x.launch, f"`{x.kernel}`", x.architecture, x.num_warps, x.registers, x.shared_bytes]
            + [x.stack_bytes, x.spills, f"{x.occupancy:.0%}", loads, stores]
            + [x.hgmma, x.hmma, x.tma]
        )
    table = "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
    return f"## {kernels[0].family}\n\n{table}\n"


def rendered(wanted: list[str], old: str) -> str:
    """The file with fresh sections of the wanted families."""
    sections = {x.split("\n", 1)[0]: f"## {x}".strip() for x in re.split(r"^## ", old, flags=re.M)}
    sections |= {family: section(compile_apart(family)).strip() for family in wanted}
    body = [sections[family] for family in families() if family in sections]
    return "\n\n".join((HEAD.strip(), *body)) + "\n"


def main(arguments: list[str]) -> None:
    check = "--check" in arguments
    wanted = [x for x in arguments if x != "--check"] or families()
    old = PATH.read_text() if PATH.exists() else ""
    new = rendered(wanted, old)
    if not check:
        PATH.write_text(new)
    elif new != old:
        sys.exit(f"{PATH} is out of date. Run: python kernels/codegen/render.py")


if __name__ == "__main__":
    main(sys.argv[1:])
