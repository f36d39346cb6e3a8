#!/usr/bin/env python
"""Writes kernels/CODEGEN.md: what the compiler makes of every Triton kernel. Needs no GPU.

python scripts/render_codegen.py            # all families
python scripts/render_codegen.py rms_norm   # these, the others as they stand
"""

import re
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY)]  # the tests hold the shapes

import triton  # noqa: E402

from tests.kernels import codegen  # noqa: E402

PATH = REPOSITORY / "kernels/CODEGEN.md"
HEAD = f"""# Compiled Triton kernels

Written by `scripts/render_codegen.py`, checked by `tests/kernels/test_codegen.py`; triton \
{triton.__version__}.

Every kernel at the shapes of LLaMA2-7B, OpenLLaMA-3B and CLIP ViT-L/14 in bf16, compiled for sm_80
and sm_90 by the launchers that production calls. Loads and stores are the program's global ones,
count x bits (asynchronous copies are loads); occupancy is the share of the threads a
multiprocessor can hold. HGMMA and HMMA are tensor-core products, TMA bulk tensor copies.
"""


def main(wanted: list[str]) -> None:
    new = {family: codegen.render(codegen.compile_apart(family)).strip() for family in wanted}
    old = PATH.read_text() if PATH.exists() else ""
    sections = {x.split("\n", 1)[0]: f"## {x}".strip() for x in re.split(r"^## ", old, flags=re.M)}
    sections |= new
    body = [sections[family] for family in codegen.families() if family in sections]
    PATH.write_text("\n\n".join((HEAD.strip(), *body)) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:] or codegen.families())
