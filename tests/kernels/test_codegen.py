"""What the compiler makes of every Triton kernel on sm_80 and sm_90, without a GPU."""

import pytest
from codegen import compiler


@pytest.fixture
def backend():
    """Nothing runs here, so nothing runs once per backend."""


@pytest.mark.parametrize("family", compiler.families())
def test_every_kernel_compiles_well(family):
    wanted = compiler.launches(family)
    kinds = "MEMORY_BOUND", "READERS", "WRITERS", "PERSISTENT", "MATRIX"
    memory_bound, readers, writers, persistent, matrix = (
        getattr(wanted, kind, set()) for kind in kinds
    )
    kernels = compiler.compile_apart(family)
    assert {x.architecture for x in kernels} == {80, 90}
    named = memory_bound | readers | writers | persistent | matrix
    assert {x.kernel for x in kernels} >= named, "never launched"
    for x in kernels:
        assert x.stack_bytes == 0 and x.spills == 0, x
        assert x.shared_bytes <= compiler.SHARED_PER_PROGRAM[x.architecture], x
        if x.kernel in memory_bound | readers:
            assert x.vector_loads > 0.5, x  # the others: indices and statistics of a row
        if x.kernel in memory_bound | writers:
            assert x.vector_stores > 0.5, x
        if x.kernel in persistent:
            assert x.occupancy >= 0.25, x
        if x.kernel in matrix:
            assert x.hgmma if x.architecture == 90 else x.hmma, x
