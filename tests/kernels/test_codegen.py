"""What the compiler makes of every Triton kernel on sm_80 and sm_90, without a GPU."""

import os

import pytest
import torch
from codegen import compiler
from mmalign_kernels.triton import launch, launch_attention

# of which a loop over keys or queries waits for a tile while two others are on their way
PIPELINED = {"_attention_fwd_kernel", "_attention_dq_kernel", "_attention_dkv_kernel"}
ATTENTION = [x for x in compiler.families() if x.endswith("attention")]
PRODUCTS = [x for x in compiler.families() if hasattr(compiler.launches(x), "MATRIX")]


# All of these take half an hour of compiling: MMALIGN_CODEGEN=all, after changing a kernel. By
# default the pairs that once failed: fp64 where q is rotated, and tiles of small devices.
FAMILIES = [x for x in compiler.families() if x != "adamw"]
IN_DTYPE = [(x, y) for x in FAMILIES for y in ("float16", "float32", "float64")]
ON_DEVICE = [(x, y) for x in PRODUCTS for y in compiler.OTHERS]
if os.environ.get("MMALIGN_CODEGEN") != "all":
    IN_DTYPE = [("rotary_attention", "float64"), ("shared_prefix_attention", "float64")]
    ON_DEVICE = [("full_attention", 89), ("full_attention", 120)]


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
        assert x.shared_bytes <= _shared_bytes(x.architecture), x
        if x.kernel in memory_bound | readers:
            assert x.vector_loads > 0.5, x  # the others: indices and statistics of a row
        if x.kernel in memory_bound | writers:
            assert x.vector_stores > 0.5, x
        if x.kernel in persistent:
            assert x.occupancy >= 0.25, x
        if x.kernel in matrix:
            assert x.hgmma if x.architecture == 90 else x.hmma, x
        if x.kernel in PIPELINED:
            assert x.copies_ahead >= 2, x


@pytest.mark.parametrize("family", ATTENTION)
def test_hopper_reads_queries_where_they_are(family):
    """An operand in registers is loaded from shared memory again in every step."""
    for x in compiler.compile_apart(family):
        if x.architecture == 90 and x.kernel != "_attention_dkv_kernel":  # its figures of queries
            assert x.local_loads == 0, x


@pytest.mark.parametrize("family, dtype", IN_DTYPE)
def test_every_dtype_of_a_test_compiles(family, dtype):
    """Tests run on a GPU in dtypes and at head_dims that production has not."""
    for x in compiler.compile_apart(family, dtype):
        assert x.shared_bytes <= _shared_bytes(x.architecture), x


@pytest.mark.parametrize("family, capability", ON_DEVICE)
def test_products_fit_other_devices(family, capability):
    kernels = compiler.compile_apart(family, "bfloat16", capability)
    assert {x.architecture for x in kernels} == {capability}
    for x in kernels:
        assert x.shared_bytes <= _shared_bytes(capability), x


def _shared_bytes(capability):
    targets = {gpu.capability: gpu for gpu in compiler.TARGETS} | compiler.OTHERS
    return targets[capability].shared_bytes


def test_a_wide_head_is_refused():
    """It would exceed shared memory at launch, or spill hundreds of registers."""
    qkv = torch.empty(8, 3 * 256, dtype=torch.bfloat16, device="meta")
    for settings in (launch_attention.forward, launch_attention.backward, launch_attention.prefix):
        with pytest.raises(NotImplementedError, match="head_dim of at most 128, not 256"):
            settings(qkv, 256)


def test_the_device_says_how_much_shared_memory_a_program_has(monkeypatch):
    class Properties:
        major, minor, multi_processor_count, shared_memory_per_block_optin = 12, 0, 170, 101376

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)
    gpu = launch._cuda_device.__wrapped__(0)
    assert gpu == compiler.OTHERS[120] and gpu.is_small and not gpu.is_large
