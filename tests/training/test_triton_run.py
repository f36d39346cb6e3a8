"""Both stages and an evaluation, as a user runs them, on Triton's kernels alone.

Every operation must come from mmalign_kernels/triton. On a CPU its interpreter runs the kernels,
in fp32; losses, gradients and scores then equal the reference's to fp32 rounding.
"""

import csv
import json
import os
import runpy
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from mmalign_kernels import dispatch
from mmalign_kernels.adamw import join_master

from mmalign.config import OptimizerConfig
from mmalign.files import read_json_lines
from mmalign.training.optimizer import AdamW
from tests.training.helpers import small_config
from tests.training.test_loop import command_line

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
TRAINED = {
    *("adamw_update", "layer_norm_fwd", "quick_gelu_fwd", "full_attention_fwd"),
    *("project_image_features_fwd", "project_image_features_bwd"),
    *("rotary_attention_fwd", "rotary_attention_bwd", "swiglu_fwd", "swiglu_bwd_in_place"),
    *("add_rms_norm_fwd", "rms_norm_bwd", "linear_cross_entropy_fwd", "linear_cross_entropy_bwd"),
    # rows without a target leave the last layer and come back to its queries
    *("pack_rows_fwd", "pack_rows_bwd", "unpack_rows_fwd", "unpack_rows_bwd"),
    # stage 1's frozen prefix, computed once through a cache and joined in every layer
    *("rms_norm_fwd", "prefix_attention_update"),
    *("shared_prefix_attention_fwd", "shared_prefix_attention_bwd"),
}
SCORED = {"rms_norm_fwd", "add_rms_norm_fwd", "swiglu_fwd", "target_logprobs_fwd"}
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="fp32 on a CPU, in Triton's interpreter"
)


@pytest.fixture
def ran(monkeypatch) -> Counter:
    """Operations that ran, by name; an implementation outside triton/ fails the test."""
    counts = Counter()
    choose = dispatch.implementation

    def implementation(operation, *where):
        function = choose(operation, *where)
        folder = Path(function.__code__.co_filename).parent.name
        assert folder == "triton" or dispatch.forced_backend() == "reference", operation
        counts[operation] += 1
        return function

    monkeypatch.setattr(dispatch, "implementation", implementation)
    return counts


@pytest.fixture
def script(monkeypatch, set_backend):
    """Runs a script in this process, under MMALIGN_BACKEND."""

    def run(backend: str, name: str, *arguments) -> None:
        set_backend(backend)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        runpy.run_path(str(SCRIPTS / f"{name}.py"), run_name="__main__")

    return run


@pytest.fixture(scope="module")
def documents(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data")
    file = root / "ethics" / "justice" / "justice_test.csv"
    file.parent.mkdir(parents=True)
    with file.open("w", newline="") as stream:
        texts = ("the red circle is small", "no it is a square", "the circle is red", "it is small")
        rows = ((number % 2, text) for number, text in enumerate(texts, start=1))
        csv.writer(stream).writerows([("label", "scenario"), *rows])  # a whole group
    return root


def train(script, backend: str, world, run_dir: Path, stage: str, projector) -> list[dict]:
    config = small_config(
        world, run_dir, stage, global_batch_size=2, micro_batch_tokens=320, num_steps=2,
        model={"projector": str(projector) if projector else ""},
    )  # fmt: skip
    script(backend, "train", *command_line(config)[2:])
    return read_json_lines(run_dir / "metrics.jsonl")


def scores(script, backend: str, run_dir: Path, documents: Path) -> torch.Tensor:
    output = run_dir / "evaluation"
    script(
        backend, "evaluate", "--model", run_dir, "--tasks", "ethics_justice",
        "--data-root", documents, "--output", output,
    )  # fmt: skip
    items = [json.loads(line) for line in (output / "items.jsonl").read_text().splitlines()]
    return torch.tensor([[x["loglikelihood"] for x in item["choices"]] for item in items])


def test_stages_and_scores_equal_the_reference(small_world, documents, tmp_path, script, ran):
    found = {}
    for backend in ("reference", "triton"):
        pretrain, finetune = (tmp_path / backend / stage for stage in ("pretrain", "finetune"))
        ran.clear()
        first = train(script, backend, small_world, pretrain, "pretrain", None)
        second = train(script, backend, small_world, finetune, "finetune", pretrain)
        assert ran.keys() == TRAINED
        ran.clear()
        found[backend] = first + second, scores(script, backend, finetune, documents)
        assert ran.keys() >= SCORED and any("attention" in name for name in ran)
    (expected, expected_scores), (steps, triton_scores) = found["reference"], found["triton"]
    assert len(steps) == 4 and max(step["micro_batches"] for step in steps) > 1
    for name in ("loss", "grad_norm"):
        ours, theirs = (torch.tensor([x[name] for x in run]) for run in (steps, expected))
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=0)
    assert triton_scores.shape == (4, 2) and triton_scores.unique().numel() == 8
    torch.testing.assert_close(triton_scores, expected_scores, rtol=2e-5, atol=0)


def test_optimizer_of_bf16_weights(ran):
    """The trainer's optimizer on exact masters: the interpreter only reads its bf16 gradients."""
    start, gradient = torch.randn(2, 300, generator=torch.Generator().manual_seed(0)).bfloat16()
    found = {}
    for backend in ("reference", "triton"):
        weight = torch.nn.Parameter(start.clone())
        optimizer = AdamW({"weight": weight}, OptimizerConfig(weight_decay=0.1))
        with dispatch.use_backend(backend):
            for _ in range(3):
                weight.grad = gradient.clone()
                optimizer.step(1e-3, optimizer.gradient_norm())
        master = join_master(weight.detach(), optimizer.remainder["weight"])
        found[backend] = torch.stack(
            (master, optimizer.exp_avg["weight"], optimizer.exp_avg_sq["weight"])
        )
    assert ran["adamw_update"] == 6
    torch.testing.assert_close(found["triton"], found["reference"], rtol=1e-6, atol=1e-9)
