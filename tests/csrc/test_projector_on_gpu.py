"""The Hopper projector against nn.Linear, masked_scatter and LlamaRMSNorm at its own shapes."""

import pytest
import torch
from mmalign_kernels import dispatch, project_image_features
from mmalign_kernels.cuda import library as cuda_library
from mmalign_kernels.cuda import projector as projector_cuda

from tests.kernels.accuracy import assert_same_bits, compare
from tests.kernels.test_projector import hugging_face, ours
from tests.kernels.test_rms_norm import EPS

pytestmark = pytest.mark.gpu
DTYPES = (torch.bfloat16, torch.float16)
SHAPES = {  # columns, features, image rows, packed rows
    "one block, less than a tile": (40, 24, 3, 5),
    "one row": (256, 64, 1, 1),
    "images only": (480, 72, 300, 300),
    "two blocks": (512, 520, 129, 640),
    "OpenLLaMA-3B": (3200, 1024, 199, 511),
    "every cluster several times": (4096, 1024, 6912, 8192),
    "three passes": (5120, 1024, 513, 777),
    "eight passes": (16384, 64, 130, 140),
}


@pytest.fixture(autouse=True)
def on_hopper():
    reason = cuda_library.missing() if torch.cuda.is_available() else "no CUDA device"
    if not reason and torch.cuda.get_device_capability() != (9, 0):
        reason = "no Hopper GPU"
    if reason:
        pytest.skip(f"the kernels of csrc/: {reason}")
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)  # memory that nothing wrote is NaN
    with torch.device("cuda"), dispatch.use_backend("cuda"):
        yield
    torch.use_deterministic_algorithms(False)


def inputs(columns, features, images, tokens):
    """The embeddings that images replace are NaN."""
    positions = torch.randperm(tokens)[:images].sort().values
    hidden_states = torch.randn(tokens, columns)
    hidden_states[positions] = torch.nan
    tensors = (
        torch.randn(images, features),
        torch.randn(columns, features) / features**0.5,
        torch.randn(columns),
        hidden_states,
        1 + torch.randn(columns) / 4,
    )
    return positions, tuple(x.requires_grad_() for x in tensors)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_hugging_face(shape, dtype):
    positions, tensors = inputs(*SHAPES[shape])
    compare(ours(positions), hugging_face(positions), tensors, dtype)


@pytest.mark.parametrize("tokens", (1, 6000))
def test_no_image(tokens):
    positions, tensors = inputs(4096, 1024, 0, tokens)
    compare(ours(positions), hugging_face(positions), tensors, torch.bfloat16)


def test_narrow_positions_and_parts_of_larger_tensors():
    positions, tensors = inputs(3200, 1024, 300, 400)
    image_features, weight, bias, hidden_states, norm_weight = (x.bfloat16() for x in tensors)
    expected = ours(positions)(image_features, weight, bias, hidden_states, norm_weight)
    columns_apart = image_features.t().contiguous().t()
    found = ours(positions.int())(columns_apart, weight, bias, hidden_states, norm_weight)
    for x, y in zip(found, expected, strict=True):
        assert torch.equal(x, y)


def test_order_of_images_does_not_matter():
    positions, tensors = inputs(4096, 1024, 5000, 5500)
    tensors = [x.detach().bfloat16() for x in tensors]
    order = torch.randperm(len(positions))
    expected = ours(positions)(*tensors)
    found = ours(positions[order])(tensors[0][order], *tensors[1:])
    for x, y in zip(found, expected, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("repetition", range(3))
def test_same_bits(repetition):
    positions, tensors = inputs(4096, 1024, 6912, 8192)
    tensors[3].data.nan_to_num_()
    assert_same_bits(ours(positions), tuple(x.detach().bfloat16() for x in tensors))


def test_rows_past_2_31_elements():
    tokens, columns, images = (1 << 31) // 4096 + 300, 4096, 200
    positions = torch.arange(tokens - 250, tokens - 50)
    _, (image_features, weight, bias, _, norm_weight) = inputs(columns, 64, images, images)
    hidden_states = torch.randn(tokens, columns, dtype=torch.bfloat16)
    small = [x.detach().bfloat16() for x in (image_features, weight, bias)]
    norm_weight = norm_weight.detach().bfloat16()
    found = projector_cuda.project_image_features_fwd(
        *small, hidden_states, positions, norm_weight, EPS
    )
    last = projector_cuda.project_image_features_fwd(
        *small, hidden_states[-300:].clone(), positions - (tokens - 300), norm_weight, EPS
    )
    for x, y in zip(found, last, strict=True):
        assert torch.equal(x[-300:], y)


def test_fp32_is_refused():
    positions, tensors = inputs(40, 24, 3, 5)
    with pytest.raises(RuntimeError, match="image_features is Float, expected BFloat16 or Half"):
        project_image_features(*tensors[:4], positions, tensors[4], EPS)
