"""What the tables of RESULTS.md say of a hand-made file."""

import copy

import pytest

from bench import render
from bench.render import draw_roofline
from mmalign.errors import UserError
from mmalign.files import write_json

PEAKS = {
    "copy_bytes_per_second": 3e12,
    "matmul_flops_per_second": 800e12,
    "matmul": "bf16 8192x8192x8192",
}
CONTENT = {
    "machine_info": {"device": "NVIDIA H100 80GB HBM3", "driver": "580.1", "torch": "2.11.0"},
    "commit_info": {"id": "0123456789abcdef", "dirty": True},
    "datetime": "2026-11-23T10:00:00+00:00",
    "command": "pytest bench",
    "measured_peaks": PEAKS,
    "gpu": {"sm_clock_mhz": 1980.0, "power_watts": 650.4, "throttled": 0.25},
    "not_measured": {"liger-kernel": {"liger-kernel is not installed": ["rms_norm"]}},
    "benchmarks": [],
}
CASE = "llama2-7b, 16384 tokens, bf16"


def entry(benchmark: str, variant: str, seconds: float, case: str = CASE, **info) -> dict:
    params = {"benchmark": benchmark, "case": case, "direction": "forward", "variant": variant}
    return {"params": params, "stats": {"median": seconds}, "extra_info": info}


def norm(variant: str, seconds: float) -> dict:
    moved = 300_000_000
    share = moved / seconds / PEAKS["copy_bytes_per_second"]
    info = {"bytes": moved, "flops": 10**8, "bound": "copy", "share_of_peak": share}
    return entry("rms_norm", variant, seconds, **info)


def step(variant: str, seconds: float, samples_per_second: float) -> dict:
    info = {"samples_per_second": samples_per_second, "peak_memory_bytes": 3 * 10**9}
    return entry("train_step", variant, seconds, case="finetune", **info)


@pytest.fixture
def content() -> dict:
    found = copy.deepcopy(CONTENT)
    found["benchmarks"] = [
        norm("mmalign triton", 125e-6),  # 300 MB in 125 us: 2400 GB/s, 80% of 3000
        norm("mmalign reference", 1000e-6),
        norm("torch eager", 500e-6),
        norm("quack", 150e-6),
        step("mmalign", 4 / 3, 3.0),
        step("transformers, padded", 1.0, 2.0),  # faster, on shorter samples
    ]
    return found


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.split("|")[1:-1]]


def lines_with(text: str, *words: str) -> list[str]:
    return [line for line in text.splitlines() if all(word in line for word in words)]


def test_run_machine_and_peaks(content):
    text = render.render({"h100": {"all.json": content}})
    assert "`pytest bench`, 2026-11-23, commit 0123456789 with changes." in text
    assert "driver 580.1, torch 2.11.0." in text
    assert "SM clock 1980 MHz, power 650 W; throttled in 25% of the samples." in text
    assert "copy 3,000 GB/s, bf16 8192x8192x8192 800 TFLOP/s." in text
    assert "- liger-kernel (rms_norm): liger-kernel is not installed" in text


def test_best_of_ours_beside_the_best_peer(content):
    (line,) = lines_with(render.render({"h100": {"all.json": content}}), CASE)
    assert cells(line)[3:] == ["mmalign triton", "125 us", "2,400.0 GB/s", "80%", "quack", "1.20x"]


def test_programs_show_every_variant_and_compare_rates(content):
    text = render.render({"h100": {"all.json": content}})
    head, ours, theirs = map(cells, [*lines_with(text, "samples/s"), *lines_with(text, "finetune")])
    assert head == ["case", "variant", "time", "samples/s", "memory", "ours over it"]
    assert ours[1:] == ["mmalign", "1.333 s", "3", "3.00 GB", ""]
    assert theirs[1:] == ["transformers, padded", "1 s", "2", "3.00 GB", "1.50x"]


def test_the_verdict_of_a_gpu_stands_before_its_benchmarks(content, tmp_path):
    (tmp_path / "h100").mkdir()
    write_json(tmp_path / "h100/all.json", content)
    (tmp_path / "h100/verdict.md").write_text("14 of 15 reached\n")
    text = render.render(render.read(tmp_path))
    assert 0 < text.index("14 of 15 reached") < text.index("### all.json")


def test_check_tells_whether_the_document_is_current(content, tmp_path, monkeypatch):
    (tmp_path / "results/h100").mkdir(parents=True)
    document = tmp_path / "RESULTS.md"
    document.write_text("by hand\n")
    monkeypatch.setattr(render, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(render, "PATH", document)
    write_json(tmp_path / "results/h100/all.json", content)
    with pytest.raises(SystemExit, match="python -m bench.render"):
        render.main(["--check"])
    render.main([])
    assert document.read_text().startswith("by hand\n\n<!--") and "quack" in document.read_text()
    with pytest.raises(SystemExit) as current:
        render.main(["--check"])
    assert not current.value.code


def test_roofline_is_drawn(content, tmp_path):
    draw_roofline({"all.json": content}, tmp_path / "roofline.png")
    assert (tmp_path / "roofline.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"benchmarks": [{}]}', '{"benchmarks": 5}'])
def test_a_file_of_something_else_is_named(tmp_path, content):
    path = tmp_path / "other.json"
    path.write_text(content)
    for name in (path, tmp_path / "--nope"):
        with pytest.raises(UserError, match=f"^{name}"):
            render.main([str(name)])
