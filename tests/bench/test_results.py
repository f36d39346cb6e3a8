"""RESULTS.md: current, and what its tables say of a hand-made set of records."""

from dataclasses import asdict

import pytest

from bench.record import Record, read_parts
from bench.roofline import draw
from bench.targets import verdicts
from scripts.render_results import MARKER, PATH, RESULTS, render

CEILINGS = {
    "copy_bytes_per_second": 3e12,
    "matrix_flops_per_second": {
        "bf16 8192x8192x8192": 800e12,
        "llama2-7b qkv forward bf16": 700e12,
        "llama2-7b qkv grad_weight fp8": 1200e12,
    },
    "matrix_reference": "bf16 8192x8192x8192",
}
MACHINE = {
    "name": "nvidia-h100-80gb-hbm3",
    "device": "NVIDIA H100 80GB HBM3",
    "driver": "580.1",
    "torch": "2.11.0",
}
RUN = {"date": "2026-11-23", "command": "pytest bench", "commit": "0123456789abcdef"}
CASE = "llama2-7b, 16384 tokens, bf16"


def part(*records: Record) -> dict:
    rows = [asdict(record) | {"run": RUN} for record in records]
    return {"machine": MACHINE, "ceilings": CEILINGS, "records": rows}


def norm(variant: str, seconds: float | None, case: str = CASE, **fields) -> Record:
    if seconds is not None:
        moved = 300_000_000
        fields |= {"bytes": moved, "flops": 10**8, "ceiling": "copy"}
        fields["share"] = moved / seconds / CEILINGS["copy_bytes_per_second"]
    return Record("rms_norm", case, "forward", variant, seconds, **fields)


@pytest.fixture
def kernels() -> dict:
    return part(
        norm("mmalign triton", 125e-6),  # 300 MB in 125 us: 2400 GB/s, 80% of 3000
        norm("mmalign reference", 1000e-6),
        norm("torch eager", 500e-6),
        norm("quack", 150e-6),
        norm("liger-kernel", None, skipped="liger-kernel is not installed"),
        norm("mmalign triton", 110e-6, case="openllama-3b, 16384 tokens, bf16"),
        norm("mmalign triton", 900e-6, case="llama2-7b, 2048 tokens, bf16"),
    )


def lines_with(text: str, *words: str) -> list[str]:
    return [line for line in text.splitlines() if all(word in line for word in words)]


def test_results_are_current():
    _, found, written = PATH.read_text().partition(MARKER)
    assert found, f"{PATH.name} has lost its marker"
    assert written.lstrip() == render(read_parts(RESULTS)), "run scripts/render_results.py"


def test_machine_and_ceilings(kernels):
    text = render({MACHINE["name"]: {"kernels": kernels}})
    assert "`pytest bench`, 2026-11-23, commit 0123456789." in text
    assert "driver 580.1, torch 2.11.0." in text
    assert "copy 3,000 GB/s, product bf16 8192x8192x8192 800 TFLOP/s." in text
    assert "| llama2-7b qkv, bf16 | 700 TFLOP/s |" in text
    assert "1,200 TFLOP/s" in text


def test_best_of_ours_beside_the_best_peer(kernels):
    text = render({MACHINE["name"]: {"kernels": kernels}})
    (line,) = lines_with(text, CASE, "quack")
    cells = [cell.strip() for cell in line.split("|")[1:-1]]
    assert cells[3:] == ["mmalign triton", "125 us", "2,400.0 GB/s", "80%", "quack", "1.20x"]
    assert "- liger-kernel (rms_norm): liger-kernel is not installed" in text


def test_missed_and_unmeasured_targets(kernels):
    text = render({MACHINE["name"]: {"kernels": kernels}})
    share = "memory-bound kernels"
    (missed,) = lines_with(text, share, CASE)
    assert "| 85% | 80% | missed by 6% |" in missed
    (met,) = lines_with(text, share, "openllama-3b")
    assert "| 85% | 91% | met |" in met
    assert not lines_with(text, share, "2048 tokens")
    (unmeasured,) = lines_with(text, "attention forward in CUDA")
    assert "| not measured yet |" in unmeasured


def step(variant: str, samples_per_second: float, stage: str = "finetune") -> Record:
    case = f"{stage}, 12 layers, 768 wide, 4 samples, fp32"
    extra = {"samples_per_second": samples_per_second}
    return Record("train_step", case, "step", variant, 4 / samples_per_second, extra=extra)


def test_ratio_targets_compare_rates():
    """Batches differ in length, so samples a second are compared and not seconds."""
    grouped = "transformers, padded, grouped by length"
    content = part(step("mmalign", 3.0), step("transformers, padded", 2.0), step(grouped, 2.5))
    found = {
        (v.target.over, v.target.bound): v
        for v in verdicts("cpu-some-2-cores", "train", content["records"])
        if v.where.startswith("train_step, finetune, 12 layers")
    }
    random = found["transformers, padded", 1.7]
    assert random.value == pytest.approx(1.5) and not random.met
    assert random.distance == "13%"  # 1.7 / 1.5
    close = found["transformers, padded, grouped by length", 1.25]
    assert close.value == pytest.approx(1.2) and close.distance == "4%"


def test_programs_show_every_variant():
    content = part(step("mmalign", 3.0), step("transformers, padded", 2.0))
    text = render({"cpu": {"train": content}})
    head, ours, theirs = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in lines_with(text, "|")
        if "variant" in line or "train_step" not in line and "fp32 |" in line
    ]
    assert head == ["case", "variant", "time", "samples/s", "ours is faster"]
    assert ours[1:] == ["mmalign", "1.333 s", "3", ""]
    assert theirs[1:] == ["transformers, padded", "2 s", "2", "1.50x"]


def recipe(tokens: int, tokens_per_second: float) -> Record:
    case = f"pretrain-7b, llama2-7b, {tokens} tokens a micro-batch, bf16"
    extra = {"tokens_per_second": tokens_per_second, "mfu": 0.61}
    return Record("train_recipe", case, "step", "mmalign", 1.0, extra=extra)


def test_best_case_decides_a_target_of_the_whole():
    content = part(recipe(8192, 20_000), recipe(16384, 23_000))
    found = verdicts(MACHINE["name"], "train", content["records"])
    (tokens,) = [v for v in found if v.target.text == "pretrain-7b: tokens"]
    assert tokens.value == 23_000 and tokens.met and "16384" in tokens.where
    assert not [v for v in verdicts("nvidia-h200", "train", content["records"])]


def test_seconds_are_at_most():
    score = Record("score_7b", "ethics, llama2-7b", "score", "mmalign", 54.0)
    found = verdicts(MACHINE["name"], "evaluate", part(score)["records"])
    (ethics,) = [v for v in found if "ETHICS" in v.target.text]
    assert not ethics.met and ethics.distance == "20%"


def test_roofline_is_drawn(kernels, tmp_path):
    draw(kernels, tmp_path / "machine/roofline.png")
    assert (tmp_path / "machine/roofline.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_recorded():
    assert render({}) == "No benchmark has been recorded yet.\n"
