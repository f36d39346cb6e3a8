"""csrc/ compiles for every architecture, keeps everything in registers and moves 128 bits."""

from functools import cache

import numpy as np
import pytest

from csrc.build import ARCHITECTURES

from . import machine_code
from .host_library import HostLibrary
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


@pytest.mark.parametrize("name", STREAMING)
def test_memory_has_more_to_do_than_the_issue_slots(name, hopper):
    """A multiprocessor of an H200 issues 99 instructions while a warp's 512 bytes arrive."""
    opcodes = hopper[name]
    accesses = _bits(opcodes, "LDG", "LDGSTS", "STG") / 128
    assert opcodes.total() - opcodes["NOP"] <= 70 * accesses


@pytest.mark.parametrize("name", [x for x in STREAMING if "bwd" in x])
def test_backward_copies_ahead(name, hopper):
    """cp.async of every tensor for the stages before the loop, and again in it."""
    assert count(hopper[name], "LDGSTS", "128") >= 2 * 4 * (3 if ", true, " in name else 2)


@pytest.mark.parametrize("name", ADAMW_ACCESSES)
def test_adamw_moves_128_bits_at_a_time(name, hopper):
    opcodes, (loads, stores) = hopper[name], ADAMW_ACCESSES[name]
    assert count(opcodes, "LDG", "128") == loads and count(opcodes, "STG", "128") == stores


ADAMW_BUDGET = {0: 85, 1: 125, 2: 170}  # instructions per element: moments fp32, bf16, 8-bit


def test_adamw_stays_in_its_budget(hopper_programs):
    """Whole tiles, 16 elements of a thread up to the first exit; calls of slow divisions as well,
    which are skipped."""
    for name in (x for x in hopper_programs if x.startswith("adamw_kernel")):
        program = hopper_programs[name]
        budget = ADAMW_BUDGET[int(name[-2])]
        assert program.index("EXIT") <= 16 * budget, name


def test_adamw_rounds_every_product(hopper):
    """A fused multiply-add would part the split master from the fp32 run. Division and root use
    some inside, and nothing else may: as many for every kind of weight."""
    fused = {name: count(hopper[name], "FFMA") for name in ADAMW_ACCESSES}
    assert len(set(fused.values())) == 1, fused


# KiB of shared memory per multiprocessor and per block with opt-in (CUDA programming guide)
SHARED_KIB = {80: (164, 163), 86: (100, 99), 89: (100, 99), 90: (228, 227), 120: (100, 99)}
LANES = {"float": 4, "__half": 8, "__nv_bfloat16": 8}


def _static_bytes(kernel):
    return max(kernel.shared_bytes - (0 if kernel.architecture == "sm_80" else 1024), 0)


@pytest.mark.parametrize("capability", SHARED_KIB)
@pytest.mark.parametrize("name", [x for x in STREAMING if "bwd" in x])
def test_every_width_of_rms_norm_bwd_can_launch(name, capability, kernels, host_library_file):
    """Static and dynamic shared memory together fit, and ask for what is beyond 48 KiB."""
    host, launch = HostLibrary(host_library_file), np.zeros(3, np.int32)
    static = max(_static_bytes(x) for x in kernels if x.name == name)
    per_multiprocessor, per_block = (1024 * x for x in SHARED_KIB[capability])
    dtype, adds, _ = name.partition("<")[2].rstrip(">").split(", ")
    lanes, tensors = LANES[dtype], 3 if adds == "true" else 2
    for columns in range(lanes, 4 * 512 * lanes + 1, lanes):
        host.rms_norm_backward(columns, lanes, tensors, per_multiprocessor, per_block, launch)
        threads, dynamic, opts_in = launch.tolist()
        assert 64 < threads <= 512 and 4 * threads * lanes >= columns
        assert static + dynamic <= per_block, columns
        assert opts_in or static + dynamic <= 48 * 1024, columns


def test_static_shared_memory_is_small(kernels):
    """row_threads.h reserves 1 KiB for it beside the stages; Hopper's kernels have none."""
    for x in kernels:
        alone = x.name.startswith(("projector", "rotary")) and "gradient" not in x.name
        assert _static_bytes(x) <= (0 if alone and x.architecture == "sm_90a" else 1024), x


def _before(program, stop, *parts):
    """Instructions with all these parts before the first one that `stop` names."""
    end = next(i for i, x in enumerate(program) if set(stop) <= set(x.split(".")))
    return sum(set(parts) <= set(x.split(".")) for x in program[:end])


@pytest.fixture(scope="module")
def hopper_programs(cuda_library_file):
    return machine_code.programs(cuda_library_file, "sm_90a")


@pytest.mark.parametrize("head_dim", (64, 128))
@pytest.mark.parametrize("dtype", ("__half", "__nv_bfloat16"))
def test_angles_of_four_rows_are_in_flight(dtype, head_dim, hopper_programs):
    """Warps that rotate queries load four positions, then all 16 vectors of angles, then store."""
    program = hopper_programs[f"rotary_attention_kernel<{dtype}, {head_dim}>"]
    first = next(i for i, x in enumerate(program) if x == "LDG.E.CONSTANT")
    rotating = program[first:]
    assert _before(rotating, ("LDG", "128", "CONSTANT"), "LDG") == 4
    assert _before(rotating, ("STS", "128"), "LDG", "128", "CONSTANT") == 4 * 4


ARITHMETIC = {"FADD", "FMUL", "FFMA", "HADD2"}  # HADD2 widens fp16


def _before_arithmetic(program):
    """128-bit loads before the first number is used."""
    opcodes = [x.split(".") for x in program]
    rest = opcodes[next(i for i, x in enumerate(opcodes) if "LDG" in x and "128" in x) :]
    end = next(i for i, x in enumerate(rest) if x[0] in ARITHMETIC)
    return sum("LDG" in x and "128" in x for x in rest[:end])


@pytest.mark.parametrize("name", [x for x in STREAMING if "fwd" in x])
def test_a_whole_row_is_in_flight(name, hopper_programs):
    """Four vectors of a thread, of the row and the residual or the weight; of an addition in 16
    bits half of them, as rms_norm.cu says."""
    halved = name.endswith("true>") and "<float" not in name
    assert _before_arithmetic(hopper_programs[name]) >= (4 if halved else 8)


@pytest.mark.parametrize("head_dim", (64, 128))
def test_four_heads_are_in_flight(head_dim, hopper_programs):
    """Angles, and two halves of each key; half of them of each output and its gradient."""
    kernels = {"rotate_keys_kernel": 4 + 4 * 2, "prepare_gradient_kernel": 2 * 2 * 2}
    for kernel, loads in kernels.items():
        program = hopper_programs[f"{kernel}<__nv_bfloat16, {head_dim}>"]
        assert _before_arithmetic(program) == loads, kernel


@pytest.mark.parametrize("dtype", FLOATS)
def test_sixteen_partial_rows_are_in_flight(dtype, hopper_programs):
    program = hopper_programs[f"rms_norm_bwd_kernel<{dtype}, false, true>"]
    starts = [i for i, x in enumerate(program) if x.startswith("ATOMG")]
    assert len(starts) == 2, "one step adds the rows of a team, one those of the teams"
    for start in starts:
        assert _before(program[start:], ("FADD",), "LDG", "128", "STRONG") == 16


@pytest.mark.parametrize("name", ADAMW_ACCESSES)
def test_adamw_loads_before_it_knows_whether_to_store(name, hopper_programs):
    program = hopper_programs[name]
    whole = program[next(i for i, x in enumerate(program) if x.startswith("LDG.E.128")) :]
    loads, _ = ADAMW_ACCESSES[name]
    assert _before(whole, ("EXIT",), "LDG", "128") == loads
    assert _before(whole, ("MUFU", "RSQ"), "LDG", "128") == loads
