"""The real libraries on a GPU, those that are installed."""

import pytest
import torch
from mmalign_kernels import adamw_step, dispatch, full_attention, libraries
from mmalign_kernels.libraries import LIBRARIES

from .accuracy import compare, results
from .packed_samples import offsets
from .test_attention import Case
from .test_rms_norm import hugging_face_add_norm, hugging_face_norm, our_add_norm, our_norm, rows

ATTENTION = [name for name, library in LIBRARIES.items() if "rotary_attention" in library.families]
HALVES = (torch.bfloat16, torch.float16)
LENGTHS = [1, 37, 130, 300, 37, 1]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture
def library(request):
    version, reason = libraries.find(request.param)
    if reason:
        pytest.skip(f"{request.param} {reason}")
    capability, needed = torch.cuda.get_device_capability(), LIBRARIES[request.param].capability
    if capability < needed:
        pytest.skip(f"{request.param} needs compute capability {needed}, this is {capability}")
    with torch.device("cuda"), dispatch.use_backend(request.param):
        yield request.param


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("causal", (True, False), ids=("causal", "full"))
@pytest.mark.parametrize("heads", ((2, 2, 64), (4, 2, 100), (4, 1, 128)), ids=str)
@pytest.mark.parametrize("library", ATTENTION, indirect=True)
def test_rotary_attention_equals_hugging_face(library, heads, causal, dtype):
    case = Case(lengths=LENGTHS, heads=heads, causal=causal)
    compare(case.ours, case.hugging_face, (case.qkv,), dtype)


@pytest.mark.parametrize("library", ATTENTION, indirect=True)
def test_full_attention_of_image_patches(library):
    """The CLIP tower: 257 tokens an image; the reference in fp32 is the measure."""
    qkv = torch.randn(4 * 257, 3 * 2 * 64, dtype=torch.bfloat16, requires_grad=True)

    def ours(qkv):
        return full_attention(qkv, offsets([257] * 4), 257, 2)

    found = results(ours, (qkv,))
    with dispatch.use_backend("reference"):
        expected = results(ours, (qkv.detach().float().requires_grad_(),))
    for name, value in expected.items():
        error = (found[name].float() - value).square().mean().sqrt()
        assert error <= 8e-3 * value.square().mean().sqrt(), name


@pytest.mark.parametrize("library", ["apex"], indirect=True)
@pytest.mark.parametrize("dtype", (*HALVES, torch.float32))
def test_apex_norms_equal_hugging_face(library, dtype):
    weight = (1 + torch.randn(3200) / 4).requires_grad_()
    x, residual = rows(199, 3200), rows(199, 3200, spread=False)
    compare(our_norm, hugging_face_norm, (x, weight), dtype)
    compare(our_add_norm, hugging_face_add_norm, (x, residual, weight), dtype)


@pytest.mark.parametrize("library", ["apex"], indirect=True)
@pytest.mark.parametrize("clip", (False, True))
def test_apex_adamw_equals_the_reference(library, clip):
    weights = [torch.randn(33, 70), torch.randn(199)]
    grads = [[torch.randn_like(p) for p in weights] for _ in range(5)]
    scale = torch.tensor(0.3) if clip else None
    settings = dict(learning_rate=1e-2, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)
    found = []
    for backend in (library, "reference"):
        params = [p.clone() for p in weights]
        moments = [[torch.zeros_like(p) for p in weights] for _ in range(2)]
        with dispatch.use_backend(backend):
            for step, given in enumerate(grads, 1):
                given = [grad.clone() for grad in given]
                adamw_step(params, given, *moments, step=step, grad_scale=scale, **settings)
        found.append(params)
    torch.testing.assert_close(*found, rtol=2e-6, atol=2e-7)
