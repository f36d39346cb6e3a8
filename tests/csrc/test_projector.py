"""The built projector kernel without a GPU: machine code, schema, fake kernel, argument checks."""

import pytest
import torch
from mmalign_kernels.cuda import library as cuda_library
from mmalign_kernels.cuda import projector as projector_cuda
from torch._subclasses.fake_tensor import FakeTensorMode

from csrc.build import ARCHITECTURES

from . import machine_code
from .machine_code import count

NAMES = [
    f"projector_kernel<{t}, {columns}>"
    for t in ("__half", "__nv_bfloat16")
    for columns in (224, 256)
]
NAME = "project_image_features_fwd"


@pytest.fixture(scope="module")
def hopper(cuda_library_file):
    return machine_code.instructions(cuda_library_file, "sm_90a")


@pytest.fixture(autouse=True)
def library(cuda_library_file, monkeypatch):
    monkeypatch.setenv("MMALIGN_CUDA_LIBRARY", str(cuda_library_file))
    cuda_library.load()


def test_in_registers_everywhere_and_empty_but_for_hopper(cuda_library_file):
    found = [x for x in machine_code.kernels(cuda_library_file) if x.name in NAMES]
    assert len(found) == len(NAMES) * len(ARCHITECTURES)
    for kernel in found:
        assert not kernel.stack_bytes and not kernel.local_bytes
        expected = 168 if kernel.architecture == "sm_90a" else 8  # 384 threads on 65,536 registers
        assert kernel.registers <= expected


@pytest.mark.parametrize("name", NAMES)
def test_tiles_come_by_tma_for_the_cluster_and_go_through_wgmma(name, hopper):
    opcodes = hopper[name]
    assert count(opcodes, "UTMALDG", "2D", "MULTICAST") == 1
    assert count(opcodes, "UTMALDG", "2D") == 2
    columns = name.rstrip(">").split()[-1]
    assert (
        count(opcodes, "HGMMA", f"64x{columns}x16", "F32") == 4
    )  # a stage; not waited for one by one
    assert count(opcodes, "WARPGROUP", "DEPBAR") == 2
    assert not count(opcodes, "HMMA") and not count(opcodes, "LDL") and not count(opcodes, "STL")


@pytest.mark.parametrize("name", NAMES)
def test_a_cluster_meets_over_shared_memory(name, hopper):
    opcodes = hopper[name]
    assert count(opcodes, "UCGABAR_ARV") == count(opcodes, "UCGABAR_WAIT") == 2
    assert count(opcodes, "STAS", "64") >= 1  # sums of two rows, signalled on the barrier there
    assert count(opcodes, "USETMAXREG") >= 1
    memory = 2 * count(opcodes, "MEMBAR", "ALL", "GPU")  # at the cluster's two barriers alone
    assert memory <= 4


@pytest.mark.parametrize("name", NAMES)
def test_rows_move_128_bits_at_a_time(name, hopper):
    opcodes = hopper[name]
    tile = int(name.rstrip(">").split()[-1])
    stores = 2 * 2 * tile // 32  # new and normalised, of two rows
    assert count(opcodes, "STG", "128") >= stores
    assert count(opcodes, "STG") - count(opcodes, "STG", "128") <= 20  # rstd
    assert count(opcodes, "LDG", "128") >= 2 * tile // 32


def tensors(dtype=torch.bfloat16, images=3, tokens=5, features=24, columns=40, **replaced):
    shapes = {
        "image_features": (images, features),
        "weight": (columns, features),
        "bias": (columns,),
        "hidden_states": (tokens, columns),
        "image_positions": (images,),
        "norm_weight": (columns,),
    }
    made = {name: torch.ones(shape, dtype=dtype) for name, shape in shapes.items()}
    made["image_positions"] = torch.arange(images)
    return made | replaced


def test_schema_is_the_operations():
    schema = torch.ops.mmalign_cuda.project_image_features_fwd.default._schema
    declared = torch.ops.mmalign.project_image_features_fwd.default._schema
    assert [x.name for x in schema.arguments] == [x.name for x in declared.arguments]
    assert len(schema.returns) == len(declared.returns)


@pytest.mark.parametrize("images", (0, 3))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_fake_promises_what_the_operation_declares(dtype, images):
    with FakeTensorMode(), torch.device("cuda"):
        arguments = tensors(dtype, images)
        found = projector_cuda.project_image_features_fwd(**arguments, eps=1e-5)
        declared = torch.ops.mmalign.project_image_features_fwd(**arguments, eps=1e-5)
        for ours, theirs in zip(found, declared, strict=True):
            assert (ours.shape, ours.dtype, ours.device) == (
                theirs.shape,
                theirs.dtype,
                theirs.device,
            )


def half(*shape):
    return torch.ones(shape, dtype=torch.bfloat16)


LAST = "expected BFloat16 or Half"


@pytest.mark.parametrize(
    ("words", "arguments"),
    [
        ("image_features is not on a CUDA device", {}),
        (f"image_features is Float, {LAST}", {"image_features": torch.ones(3, 24)}),
        (r"image_features has shape \(24,\), expected 2 dimensions", {"image_features": half(24)}),
        ("image_features of shape .* is not contiguous", {"image_features": half(24, 3).t()}),
        ("image_features does not start at", {"image_features": half(73)[1:].view(3, 24)}),
        (r"image_features has 12 columns, .* multiples of 8", {"image_features": half(3, 12)}),
        (r"image_features has 0 columns", {"image_features": half(3, 0)}),
        (r"weight has shape \(40, 16\), expected \(40, 24\)", {"weight": half(40, 16)}),
        ("weight is Half, expected BFloat16", {"weight": half(40, 24).half()}),
        ("weight of shape .* is not contiguous", {"weight": half(24, 40).t()}),
        (r"bias has shape \(41,\), expected \(40,\)", {"bias": half(41)}),
        ("bias of shape .* is not contiguous", {"bias": half(80)[::2]}),
        (r"norm_weight has shape \(40, 1\)", {"norm_weight": half(40, 1)}),
        ("norm_weight does not start at", {"norm_weight": half(41)[1:]}),
        ("hidden_states is Half, expected BFloat16", {"hidden_states": half(5, 40).half()}),
        ("hidden_states of shape .* is not contiguous", {"hidden_states": half(40, 5).t()}),
        (r"hidden_states has 44 columns, .* up to 16384", {"hidden_states": half(5, 44)}),
        (r"hidden_states has 16392 columns", {"hidden_states": half(5, 16392)}),
        (
            r"image_positions has shape \(2,\), expected \(3,\)",
            {"image_positions": torch.arange(2)},
        ),
        ("image_positions is Short", {"image_positions": torch.arange(3).short()}),
        (
            "image_positions of shape .* is not contiguous",
            {"image_positions": torch.arange(6)[::2]},
        ),
    ],
)
def test_wrong_arguments(words, arguments):
    operation = cuda_library.operation(NAME)
    with pytest.raises(RuntimeError, match=f"{NAME}: {words}"):
        operation(**tensors(**arguments), eps=1e-5)


def test_more_rows_than_the_kernel_counts():
    hidden_states = torch.empty(1 << 31, 0, dtype=torch.bfloat16)
    with pytest.raises(
        RuntimeError, match=r"hidden_states has 2147483648 rows, .* less than 2\^31"
    ):
        arguments = tensors(columns=8, hidden_states=hidden_states)
        cuda_library.operation(NAME)(**arguments, eps=1e-5)
