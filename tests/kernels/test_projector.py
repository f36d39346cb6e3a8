"""The fused projector and norm against nn.Linear, masked_scatter and LlamaRMSNorm."""

import pytest
import torch
import torch.nn.functional as F
from mmalign_kernels import project_image_features

from .accuracy import assert_same_bits, compare, results
from .test_rms_norm import EPS, hugging_face_norm

VISION, HIDDEN = 24, 40
NAMES = ("image_features", "weight", "bias", "hidden_states", "norm_weight")


@pytest.fixture(autouse=True)
def type_of_the_kernel(backend, request):
    """csrc/ takes bf16 and fp16; tests/csrc/test_projector_on_gpu.py has the cases in those."""
    params = getattr(request.node, "callspec", None) and request.node.callspec.params
    if backend == "cuda" and params.get("dtype") not in (torch.bfloat16, torch.float16):
        pytest.skip("the CUDA kernel takes bf16 and fp16")


def image_positions():
    return torch.cat((torch.arange(3, 9), torch.arange(20, 26)))


def inputs(trained=NAMES, num_images=12, num_tokens=31):
    shapes = ((num_images, VISION), (HIDDEN, VISION), HIDDEN, (num_tokens, HIDDEN), HIDDEN)
    tensors = dict(zip(NAMES, map(torch.randn, shapes), strict=True))
    return tuple(x.requires_grad_(name in trained) for name, x in tensors.items())


def ours(positions=None):
    positions = image_positions() if positions is None else positions

    def function(image_features, weight, bias, hidden_states, norm_weight):
        return project_image_features(
            image_features, weight, bias, hidden_states, positions, norm_weight, EPS
        )

    return function


def hugging_face(positions=None):
    """As LlavaForConditionalGeneration does it, for a projector of one linear layer."""
    positions = image_positions() if positions is None else positions

    def function(image_features, weight, bias, hidden_states, norm_weight):
        mask = torch.zeros(len(hidden_states), dtype=torch.bool)
        mask[positions] = True
        projected = F.linear(image_features, weight, bias)
        hidden_states = hidden_states.masked_scatter(mask[:, None], projected)
        return hidden_states, hugging_face_norm(hidden_states, norm_weight)

    return function


TRAINED = (NAMES, ("weight", "bias"), ("weight", "bias", "hidden_states"), ("norm_weight",))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16, torch.float64))
@pytest.mark.parametrize("trained", TRAINED, ids=" ".join)
def test_equals_hugging_face(trained, dtype):
    compare(ours(), hugging_face(), inputs(trained), dtype)


@pytest.mark.parametrize("trained", TRAINED, ids=" ".join)
def test_no_image(trained):
    none = image_positions()[:0]
    arguments = inputs(trained, num_images=0)
    found, expected = (results(f(none), arguments) for f in (ours, hugging_face))
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name])


@pytest.mark.usefixtures("sm_90_settings")
def test_tensor_descriptors():
    """The path of sm_90: tiles come by descriptor. It needs rows of a multiple of 16 bytes."""
    compare(ours(), hugging_face(), inputs(), torch.float16)


def test_only_images():
    everywhere = torch.arange(12).flip(0).int()
    arguments = inputs(num_tokens=12)
    found = results(ours(everywhere), arguments)
    expected = F.linear(*arguments[:3]).flip(0)
    torch.testing.assert_close(found["output 0"], expected)
    assert not found["gradient 3"].any()  # no embedding survived


def test_image_rows_ignore_their_embedding():
    arguments = inputs()
    before = results(ours(), arguments)
    with torch.no_grad():
        arguments[3][image_positions()] = torch.nan
    after = results(ours(), arguments)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_positions_matter():
    arguments = inputs()
    moved = results(ours(image_positions() + 1), arguments)
    for name, value in results(ours(), arguments).items():
        assert not torch.allclose(value, moved[name]), name


@pytest.mark.parametrize("used", (0, 1))
def test_one_of_two_outputs_unused(used):
    arguments = tuple(x.detach().double().requires_grad_() for x in inputs())
    found, expected = (
        torch.autograd.grad(f()(*arguments)[used].square().sum(), arguments[:4])
        for f in (ours, hugging_face)
    )
    torch.testing.assert_close(found, expected)


def test_gradcheck():
    arguments = tuple(x.detach().double().requires_grad_() for x in inputs(num_tokens=26))
    torch.autograd.gradcheck(ours(), arguments, fast_mode=True)


def test_same_bits():
    assert_same_bits(ours(), inputs())


def test_wrong_arguments():
    image_features, weight, bias, hidden_states, norm_weight = inputs()
    with pytest.raises(ValueError, match=r"weight has shape \(24, 40\), expected \(40, 24\)"):
        ours()(image_features, weight.t(), bias, hidden_states, norm_weight)
    with pytest.raises(ValueError, match=r"image_positions has shape \(5,\), expected \(12,\)"):
        ours(image_positions()[:5])(image_features, weight, bias, hidden_states, norm_weight)
    with pytest.raises(ValueError, match="weight is torch.bfloat16"):
        ours()(image_features, weight.bfloat16(), bias, hidden_states, norm_weight)
