"""The benchmark files themselves, as far as a machine without a GPU can tell."""

from importlib import import_module
from itertools import pairwise
from unittest import mock

import pytest
import torch

from bench import bench_attention, peers, shapes
from bench.bench_attention import FULL, ROTARY, full_case, rotary_case
from bench.operation import OperationComparison, results
from mmalign.model.decoder import Decoder
from mmalign.model.vision_tower import VisionTower

OPERATIONS = ("adamw", "attention", "elementwise", "lm_head", "norms", "prefix_attention")
on_a_cpu_only = pytest.mark.skipif(shapes.ON_GPU, reason="what a CPU skips")


@pytest.fixture(scope="module")
def comparisons() -> list[OperationComparison]:
    found = []
    for name in OPERATIONS:
        module = import_module(f"bench.bench_{name}")
        for test in (x for n, x in vars(module).items() if n.startswith("test_")):
            [mark] = test.pytestmark
            found += mark.args[1]
    return found


def test_groups_have_names_of_their_own(comparisons):
    titles = [(c.benchmark, c.case, c.direction) for c in comparisons]
    assert len(set(titles)) == len(titles) > 20
    for comparison in comparisons:
        assert len(set(comparison.variants)) == len(comparison.variants)


def test_every_direction_has_a_cost(comparisons):
    for comparison in comparisons:
        figures = comparison.figures(comparison.variants[0], 1.0)
        assert figures["bytes"] > 0 and figures["flops"] >= 0


@on_a_cpu_only
def test_on_a_cpu_the_reference_meets_pytorch_and_the_rest_says_why_not(comparisons):
    for comparison in comparisons:
        runs = [v for v in comparison.variants if comparison.missing(v) is None]
        assert "mmalign reference" in runs and len(runs) >= 2
        for variant in set(comparison.variants) - set(runs):
            reason = comparison.missing(variant)
            words = ("GPU", "CUDA", "has no cuda kernel", "has no cpu kernel")
            assert any(word in reason for word in words)


def test_a_library_that_is_not_installed_is_named():
    absent = mock.patch.object(peers, "find_spec", return_value=None)
    with absent, mock.patch.object(peers, "ON_GPU", True):
        reason = peers.missing("liger-kernel")()
    assert reason == "liger-kernel is not installed"


@pytest.mark.parametrize(
    ("module", "config", "published"),  # parameters, as their model cards count them
    [
        (Decoder, shapes.LLAMA2_7B, 6_738_415_616),
        (Decoder, shapes.OPENLLAMA_3B, 3_426_473_600),
        (VisionTower, shapes.CLIP_VIT_L_14, 303_179_776),
    ],
)
def test_shapes_are_those_of_the_published_models(module, config, published):
    with torch.device("meta"):
        model = module(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == published


@pytest.mark.parametrize("mix", [*shapes.LENGTHS, shapes.ONE_LONG])
def test_sample_lengths(mix):
    lengths = shapes.sample_lengths(mix, 16384, longest=4096)
    assert sum(lengths) == 16384 and lengths == shapes.sample_lengths(mix, 16384, longest=4096)
    low, high = shapes.LENGTHS.get(mix, (300, 4096))
    assert all(low <= n <= high for n in lengths[:-1])
    assert (4096 in lengths) == (mix == shapes.ONE_LONG)
    offsets = shapes.cu_seqlens_of(lengths, "cpu").tolist()
    assert [end - begin for begin, end in pairwise(offsets)] == lengths


@on_a_cpu_only
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", ["cuDNN sdpa, padded", "torch.compile, flex_attention"])
def test_attention_of_gpu_libraries_means_the_same(name):
    """Their forward passes, on PyTorch's CPU kernels."""
    decoder = rotary_case(shapes.SMALL_DECODER, 512, "wide mix")
    for operation, case in ((ROTARY, decoder), (FULL, full_case(shapes.SMALL_VISION, 1))):
        variant = next(v for v in operation.variants if v.name == name)
        inputs = case.make()
        expected = results(operation.oracle, operation.oracle.function, inputs, ())
        with (
            mock.patch.object(bench_attention, "sdpa_kernel"),
            mock.patch.object(bench_attention, "compiled_rotate", bench_attention.rotate),
        ):
            actual = results(variant, variant.function, inputs, ())
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)
