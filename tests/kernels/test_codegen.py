"""What the compiler makes of every Triton kernel, without a GPU.

By default a minute of it: production's kernels on sm_90, and what once failed. All of it, after
changing a kernel, takes half an hour of two cores (Triton keeps what has not changed):

    MMALIGN_CODEGEN=all python -m pytest -n 2 tests/kernels/test_codegen.py
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from codegen import compiler
from mmalign_kernels.triton import launch, launch_attention

# of which a loop over keys or queries waits for a tile while two others are on their way
PIPELINED = {"_attention_fwd_kernel", "_attention_dq_kernel", "_attention_dkv_kernel"}
# On Hopper products read operands where they are. One in registers is loaded from shared memory
# again in every step; _attention_dkv_kernel loads the figures of its queries so.
FROM_MEMORY = {"_attention_fwd_kernel", "_attention_dq_kernel", "_prefix_attention_kernel"}
FROM_MEMORY |= {"_join_prefix_kernel", "_prefix_dq_kernel"}
# Instructions per 128 bits of every thread. While memory moves these 512 bytes of a warp, Hopper's
# multiprocessor issues 141 (H100) or 99 (H200). Random rounding of moments is not memory-bound.
BUDGET = 70
OVER_BUDGET = {"_adamw_rounding_kernel": 120}
PRODUCTS = [x for x in compiler.families() if hasattr(compiler.launches(x), "MATRIX")]
ALL = os.environ.get("MMALIGN_CODEGEN") == "all"
PRODUCTION = (80, 90) if ALL else (90,)
ON_DEVICE = [(x, y) for x in PRODUCTS for y in compiler.OTHERS]
TESTS = [(x, "test_", "triton") for x in compiler.DEVICES]
if not ALL:
    ON_DEVICE = [("full_attention", 89), ("full_attention", 120)]
    TESTS = [  # wide rows of fp64; heads of 4 and 2 columns in fp64
        (80, "test_rms_norm", "triton and add and shape1 and dtype3"),
        (90, "test_attention", "triton and gradcheck"),
        (120, "test_attention", "triton and gradcheck"),
    ]
FOLDER = Path(__file__).parent


@pytest.fixture
def backend():
    """Nothing runs here, so nothing runs once per backend."""


@pytest.mark.parametrize("capability", PRODUCTION)
@pytest.mark.parametrize("family", compiler.families())
def test_every_kernel_compiles_well(family, capability):
    wanted = compiler.launches(family)
    kinds = "MEMORY_BOUND", "READERS", "WRITERS", "PERSISTENT", "MATRIX"
    memory_bound, readers, writers, persistent, matrix = (
        getattr(wanted, kind, set()) for kind in kinds
    )
    kernels = compiler.compile_apart(family, "bfloat16", capability)
    named = memory_bound | readers | writers | persistent | matrix
    assert {x.kernel for x in kernels} >= named, "never launched"
    for x in kernels:
        assert x.architecture == capability
        assert x.stack_bytes == 0 and x.spills == 0, x
        assert x.shared_bytes <= compiler.DEVICES[capability].shared_bytes, x
        if x.kernel in memory_bound | readers:
            assert x.vector_loads > 0.5, x  # the others: indices and statistics of a row
        if x.kernel in memory_bound | writers:
            assert x.vector_stores > 0.5, x
        if x.kernel in memory_bound | readers | writers | OVER_BUDGET.keys():
            assert x.per_access <= OVER_BUDGET.get(x.kernel, BUDGET), x
        if x.kernel in persistent:
            assert x.occupancy >= 0.25, x
        if x.kernel in matrix:
            has_64_rows = capability == 90 and "one token" not in x.launch
            assert x.hgmma if has_64_rows else x.hmma, x
        if x.kernel in PIPELINED:
            assert x.copies_ahead >= 2, x
        if x.kernel in FROM_MEMORY and x.hgmma:
            assert x.local_loads == 0, x


@pytest.mark.skipif(not ALL, reason="MMALIGN_CODEGEN=all")
@pytest.mark.parametrize("capability", PRODUCTION)
def test_attention_in_fp32_stays_in_registers(capability):
    """Its products take no matrix unit, and a thread holds whole rows of both operands."""
    for x in compiler.compile_apart("rotary_attention", "float32", capability):
        assert x.stack_bytes == 0 and x.spills == 0, x


@pytest.mark.parametrize(("family", "capability"), ON_DEVICE)
def test_products_fit_other_devices(family, capability):
    kernels = compiler.compile_apart(family, "bfloat16", capability)
    assert {x.architecture for x in kernels} == {capability}
    for x in kernels:
        assert x.shared_bytes <= compiler.DEVICES[capability].shared_bytes, x


@pytest.mark.parametrize(("capability", "modules", "tests"), TESTS)
def test_what_tests_launch_fits_every_device(capability, modules, tests):
    """Their dtypes, head_dims and widths, which production has not: conftest.py compiles them."""
    apart = ("test_codegen", "test_costs", "test_device", "test_libraries", "test_attention_triton")
    files = [x for x in sorted(FOLDER.glob(f"{modules}*.py")) if not x.stem.startswith(apart)]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", tests, *files]
    environment = os.environ | {"MMALIGN_TESTS_ON_META": str(capability)}
    process = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stdout[-6000:]


DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@pytest.mark.parametrize("gpu", compiler.DEVICES.values(), ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_every_width_fit(dtype, gpu):
    """What persistent kernels copy ahead, and 16 KiB for sums of fp64 on their way to memory."""
    rest = 1024 * (16 if dtype == torch.float64 else 1)
    with compiler.pretend(gpu):
        for columns in range(1, 16385):
            x = torch.empty(0, columns, dtype=dtype, device="meta")
            rows, block, warps = launch.row_tile(x)
            copied = rows * block * x.element_size()
            for num_inputs in (1, 2, 3):
                stages = launch.stages(x, num_inputs)
                assert (stages - 1) * num_inputs * copied + rest <= gpu.shared_bytes, columns
                assert stages == launch.STAGES or copied * warps > launch.STAGES * 8192, columns


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
