"""scripts/gpu_verify.sh without a GPU: its command line, its arithmetic, its failures."""

import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from fnmatch import filter as filter_names
from fnmatch import translate
from types import SimpleNamespace

import pytest
import torch

from bench import ceilings, documents, verify, verify_build, verify_correctness, verify_train
from bench.models import Size
from bench.shapes import SMALL_DECODER, SMALL_VISION
from bench.targets import TARGETS
from mmalign.evaluation.scoring import plan_scoring

CUDA = torch.cuda.is_available()


def gpu_verify(*words: str) -> subprocess.CompletedProcess:
    command = ["bash", "scripts/gpu_verify.sh", *words]
    env = dict(os.environ, PYTHON=sys.executable)
    return subprocess.run(command, cwd=verify.REPOSITORY, env=env, capture_output=True, text=True)


# ---- the command line ----


def test_parts_are_handed_on(tmp_path):
    words = ["--part", "build", "train", "--dry-run", "--results", str(tmp_path)]
    parts = verify.parse([*words, "--data-root", "data", "--tokenizer", "llama"])
    assert [options.part for options in parts] == ["build", "train"]
    (again,) = verify.parse(parts[1].arguments())
    assert again.part == "train" and again.dry_run and again.results == tmp_path
    assert again.data_root.name == "data" and again.tokenizer.name == "llama"
    assert len(verify.parse([])) == 5


def test_real_documents_need_their_tokenizer(capsys):
    with pytest.raises(SystemExit):
        verify.parse(["--data-root", "data"])
    assert "--tokenizer" in capsys.readouterr().err


@pytest.mark.skipif(CUDA, reason="needs a machine without CUDA")
def test_without_a_gpu_it_says_what_can_be_done():
    done = gpu_verify("--part", "build")
    assert done.returncode == 1 and "--dry-run" in done.stderr


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setattr(verify, "find_spec", lambda name: None if name == "pynvml" else name)
    assert verify.missing_packages() == ["nvidia-ml-py"]


@pytest.mark.skipif(CUDA, reason="a dry run pretends a GPU")
def test_dry_run_lists_what_the_targets_speak_of():
    done = gpu_verify("--part", "kernels", "--dry-run")
    assert done.returncode == 0, done.stdout + done.stderr
    form = r"^(\w.*, (?:forward|backward|both|step)): [\d.]+ MB, [\d.]+ GFLOP: (.*)$"
    cases = re.findall(form, done.stdout, re.M)
    for target in TARGETS:
        if target.part != "kernels":
            continue
        pattern = translate(f"{target.benchmark}, {target.case}, {target.direction}")
        variants = [set(names.split("; ")) for case, names in cases if re.match(pattern, case)]
        for wanted in filter(None, (target.variant, target.over)):
            assert any(filter_names(names, wanted) for names in variants), (target.text, wanted)


def test_a_stopped_command_has_its_last_words():
    program = (
        "import sys, time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: sys.exit(2)\nsys.exit(3)"
    )
    assert verify.run([sys.executable, "-c", program], 1) == verify.INTERRUPTED


# ---- reading what tools say ----

JUNIT = """<?xml version="1.0"?><testsuites><testsuite name="pytest" errors="0" failures="1"
 skipped="2" tests="9" time="12.5"><testcase classname="tests.kernels.test_swiglu" name="test_odd">
<failure message="AssertionError: error 3e-2">where</failure></testcase>
<testcase classname="tests.kernels.test_swiglu" name="test_even"/></testsuite></testsuites>"""


def test_report_of_the_gpu_tests(tmp_path):
    (tmp_path / "junit.xml").write_text(JUNIT)
    counts, failure = verify_correctness.read_report(tmp_path / "junit.xml")
    assert counts.seconds == 12.5
    assert counts.extra == {"tests": 9, "failures": 1, "errors": 0, "skipped": 2, "passed": 6}
    assert failure.case == "tests.kernels.test_swiglu::test_odd"
    assert failure.extra == {"outcome": "failure", "message": "AssertionError: error 3e-2\nwhere"}


def test_compiler_figures():
    said = """ptxas info    : Compiling entry function '_Z1a' for 'sm_90a'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 56 registers, used 1 barriers
ptxas info    : Compiling entry function '_Z1b' for 'sm_90a'
    8 bytes stack frame, 16 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers"""
    figures = verify_build.compiler_figures(said)
    assert figures == {"kernels": 2, "most_registers": 255, "spilled_bytes": 16}


# ---- training ----

FULL = verify_train.CASES[1]


def test_memory_of_full_fine_tuning():
    """6 bytes of a trained matrix's number beside its gradient: bf16, two bf16 moments."""
    decoder = FULL.size.decoder
    hidden, inner = decoder.hidden_size, decoder.intermediate_size
    layer = 4 * hidden**2 + 3 * hidden * inner
    rows = decoder.vocab_size + 3
    matrices = 32 * layer + 2 * rows * hidden + 1024 * hidden
    vectors = 32 * 2 * hidden + 2 * hidden  # with fp32 moments
    vision = FULL.size.vision
    tower_layer = 4 * (1024**2 + 1024) + 2 * 1024 * 4096 + 1024 + 4096 + 4 * 1024
    embeddings = 1024 + 3 * 14 * 14 * 1024 + 257 * 1024 + 4 * 1024
    tower = vision.num_hidden_layers * tower_layer + embeddings
    fixed = FULL.plan(8192, torch.device("cpu")).fixed()
    assert fixed["weights"] == 2 * (matrices + vectors + tower)
    assert fixed["optimizer state"] == 4 * matrices + 8 * vectors


def measured_sizes(monkeypatch, memory: float, fits: int) -> dict[int, str | None]:
    """{tokens of a micro-batch: why it was skipped} on a card where `fits` tokens run."""
    card = SimpleNamespace(total_memory=memory)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 79e9)
    monkeypatch.setattr(verify_train, "build_model", lambda case, device: torch.nn.Module())

    def measure(case, model, tokens, measured):
        if tokens > fits:
            raise torch.OutOfMemoryError
        return SimpleNamespace(case=case.title(tokens), skipped=None)

    monkeypatch.setattr(verify_train, "measure_steps", measure)
    options = verify.Options("train")
    records = list(verify_train.measure_case(FULL, options, {}))
    return {int(re.search(r"(\d+) tokens", r.case)[1]): r.skipped for r in records}


def test_what_cannot_fit_is_not_tried(monkeypatch):
    skipped = measured_sizes(monkeypatch, 48e9, fits=10**6)
    assert set(skipped) == {4096, 8192}
    assert all("GB are planned; the card has 48 GB" in reason for reason in skipped.values())


def test_out_of_memory_ends_a_case(monkeypatch):
    skipped = measured_sizes(monkeypatch, 141e9, fits=4096)
    assert skipped[4096] is None
    assert skipped[8192] == "out of memory with 8192 tokens a micro-batch, after 79 GB"


def test_step_is_the_recipes_batch():
    batches = verify_train.step_batches(FULL, 4096)
    assert sum(len(batch.cu_seqlens) - 1 for batch in batches) == 32
    assert max(len(batch.input_ids) for batch in batches) <= 4096
    assert sum(len(batch.pixel_values) for batch in batches) == 32


def test_a_measured_step_on_a_cpu():
    """A few samples of a tiny model: the numbers of the record agree with one another."""
    decoder = replace(SMALL_DECODER, hidden_size=64, intermediate_size=96, num_hidden_layers=2)
    decoder = replace(decoder, num_attention_heads=2, num_key_value_heads=2, head_dim=32)
    tower = replace(SMALL_VISION, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    case = verify_train.Case(Size("tiny", decoder, tower), "tiny-finetune", (2048,))
    rates = {"matrix_reference": "square", "matrix_flops_per_second": {"square": 1e12}}
    model = verify_train.build_model(case, torch.device("cpu"))
    before = {name: p.detach().clone() for name, p in model.trainable_parameters().items()}
    record = verify_train.measure_steps(case, model, 2048, rates, num_samples=3, rounds=(0, 1))
    assert record.extra["samples"] == 3
    assert record.extra["tokens_per_second"] * record.seconds == pytest.approx(
        record.extra["tokens"]
    )
    assert record.share * record.seconds * 1e12 == pytest.approx(record.flops)
    assert record.extra["recompute"].startswith("--recompute none")
    assert record.extra["planned_bytes"] > sum(p.nbytes for p in model.parameters())
    assert any(not p.equal(before[name]) for name, p in model.trainable_parameters().items())


# ---- evaluation and ceilings ----

REAL = [  # requests, tokens computed by the tree, by lm-evaluation-harness: of the real sets
    (documents.truthfulqa, 9_996, 58_983, 1_242_477),
    (documents.ethics, 39_936, 1_229_878, 1_921_428),
]


@pytest.mark.parametrize("make, requests, tokens, harness", REAL)
def test_drawn_documents_are_as_long_as_the_real_ones(make, requests, tokens, harness):
    numbers = documents.NumberTokenizer()
    plan = plan_scoring(numbers, make(32000), 4096, 32000, 16384, progress=False)
    found = len(plan.unique_of), plan.num_tokens, plan.num_tokens_harness
    for value, real in zip(found, (requests, tokens, harness), strict=True):
        assert math.isclose(value, real, rel_tol=0.05)


def test_fp8_products_are_of_the_operands_given():
    a, b = (torch.randn(32, 16), torch.randn(16, 48))
    product = ceilings._fp8_product(a, b)()
    rounded = [x.to(torch.float8_e4m3fn).float() for x in (a, b)]
    torch.testing.assert_close(product.float(), rounded[0] @ rounded[1], rtol=1e-2, atol=1e-2)


def test_ceilings_of_a_cpu():
    found = ceilings.ceilings("cpu")
    assert found["copy_bytes_per_second"] > 0
    assert found["matrix_flops_per_second"][found["matrix_reference"]] > 0
