"""What the compiler makes of every Triton kernel on sm_80 and sm_90, without a GPU."""

from functools import cache
from importlib import import_module

import pytest
import triton

from . import codegen

FAMILIES = codegen.families()


@pytest.fixture
def backend():
    """Nothing runs here, so nothing runs once for each backend."""


@cache
def compiled(family):
    return codegen.compile_apart(family)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_kernel_compiles_well(family):
    wanted = import_module(f"{__package__}.codegen_{family}")
    kinds = "MEMORY_BOUND", "READERS", "WRITERS", "PERSISTENT", "MATRIX"
    memory_bound, readers, writers, persistent, matrix = (
        getattr(wanted, kind, set()) for kind in kinds
    )
    kernels = compiled(family)
    assert {x.architecture for x in kernels} == {80, 90}
    named = memory_bound | readers | writers | persistent | matrix
    assert {x.kernel for x in kernels} >= named, "never launched"
    for x in kernels:
        assert x.stack_bytes == 0 and x.spills == 0, x
        assert x.shared_bytes <= codegen.SHARED_PER_PROGRAM[x.architecture], x
        if x.kernel in memory_bound | readers:
            assert x.wide_loads > 0.5, x  # the others: indices and figures of a row
        if x.kernel in memory_bound | writers:
            assert x.wide_stores > 0.5, x
        if x.kernel in persistent:
            assert x.occupancy >= 0.25, x
        if x.kernel in matrix:
            assert x.hgmma if x.architecture == 90 else x.hmma, x


@pytest.mark.parametrize("family", FAMILIES)
def test_committed_table_is_current(family):
    table = (codegen.REPOSITORY / "kernels/CODEGEN.md").read_text()
    if f"triton {triton.__version__}." not in table:
        pytest.skip(f"kernels/CODEGEN.md is of another triton than {triton.__version__}")
    message = f"kernels/CODEGEN.md: run python scripts/render_codegen.py {family}"
    assert codegen.render(compiled(family)) in table, message
