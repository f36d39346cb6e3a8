"""csrc/ compiles for every architecture, keeps everything in registers and moves 128 bits."""

from functools import cache

import pytest

from csrc.build import ARCHITECTURES

from . import machine_code
from .machine_code import count

FLOATS = ("float", "__half", "__nv_bfloat16")
STREAMING = {  # name -> share of the bits of global accesses that must move 128 at a time
    **{f"rms_norm_fwd_kernel<{t}, {adds}>": 0.9 for t in FLOATS for adds in ("false", "true")},
    **{
        f"rms_norm_bwd_kernel<{t}, {adds}, {needs}>": 0.9
        for t in FLOATS
        for adds in ("false", "true")
        for needs in ("false", "true")
    },
}
# AdamW's whole tiles: per thread four runs of parameter, gradient, and two fp32 moments
ADAMW_ACCESSES = {
    "adamw_kernel<0, float, 0>": (16, 12),  # loads, stores of 128 bits
    "adamw_kernel<1, __nv_bfloat16, 0>": (8, 8),  # bf16: 64 bits, where its neighbours move 128
    "adamw_kernel<2, __nv_bfloat16, 0>": (8, 8),
    "adamw_kernel<2, float, 0>": (12, 8),
}


@pytest.fixture(scope="module")
def kernels(cuda_library_file):
    return machine_code.kernels(cuda_library_file)


@cache
def _hopper(library):
    return machine_code.instructions(library, "sm_90a")


@pytest.fixture(scope="module")
def hopper(cuda_library_file):
    return _hopper(cuda_library_file)


def test_no_stack_no_spills(kernels):
    for architecture in ARCHITECTURES:
        names = {x.name for x in kernels if x.architecture == f"sm_{architecture}"}
        assert names >= STREAMING.keys() | ADAMW_ACCESSES.keys()
    assert not [x for x in kernels if x.stack_bytes or x.local_bytes]


def test_no_local_memory_in_the_program(hopper):
    for name, opcodes in hopper.items():
        assert count(opcodes, "LDL") + count(opcodes, "STL") == 0, name


def _bits(opcodes, *parts):
    return sum(
        n * next((int(x) for x in ("128", "64") if x in opcode.split(".")), 32)
        for opcode, n in opcodes.items()
        if opcode.split(".")[0] in parts
    )


@pytest.mark.parametrize("name", STREAMING)
def test_rows_move_128_bits_at_a_time(name, hopper):
    opcodes = hopper[name]
    wide = 128 * sum(count(opcodes, x, "128") for x in ("LDG", "LDGSTS", "STG"))
    finishing = name.endswith("true>") and "bwd" in name  # adds up partial rows besides
    assert wide >= (0.75 if finishing else STREAMING[name]) * _bits(opcodes, "LDG", "LDGSTS", "STG")


@pytest.mark.parametrize("name", [x for x in STREAMING if "bwd" in x])
def test_backward_copies_ahead(name, hopper):
    """cp.async of every tensor for the stages before the loop, and again in it."""
    assert count(hopper[name], "LDGSTS", "128") >= 2 * 4 * (3 if ", true, " in name else 2)


@pytest.mark.parametrize("name", ADAMW_ACCESSES)
def test_adamw_moves_128_bits_at_a_time(name, hopper):
    opcodes, (loads, stores) = hopper[name], ADAMW_ACCESSES[name]
    assert count(opcodes, "LDG", "128") == loads and count(opcodes, "STG", "128") == stores


def test_adamw_rounds_every_product(hopper):
    """A fused multiply-add would part the split master from the fp32 run. Division and root use
    some inside, and nothing else may: as many for every kind of weight."""
    fused = {name: count(hopper[name], "FFMA") for name in ADAMW_ACCESSES}
    assert len(set(fused.values())) == 1, fused
