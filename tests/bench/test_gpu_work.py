"""What a process of bench/gpu.py does with its items, on comparisons that only sleep or fail."""

from pathlib import Path

import pytest

from bench.comparison import COPY, Calls, Comparison, WrongResult
from bench.gpu_work import compare
from bench.records import Records, read_records
from bench.verdict import problems

PEAKS = {"copy_bytes_per_second": 1e9, "matmul_flops_per_second": 1e9, "matmul": "fp32"}


class Fake(Comparison):
    direction, case = "forward", "64 x"

    def __init__(self, benchmark: str, error: Exception | None = None):
        self.benchmark, self.error = benchmark, error
        self.variants = ["mmalign cuda", "mmalign triton", "liger-kernel", "torch.compile"]
        self.ran: list[str] = []

    def calls(self, variants) -> Calls:
        if self.error is not None and "mmalign triton" in variants:
            raise self.error
        return Calls({name: lambda name=name: self.ran.append(name) for name in variants})

    def figures(self, variant, seconds) -> dict:
        return {"bytes": 100, "flops": 1, "bound": COPY}


@pytest.fixture
def path(tmp_path) -> Path:
    found = tmp_path / "verification.jsonl"
    Records(found, "peaks").write("peaks", **PEAKS)
    return found


def run(path: Path, *comparisons: Fake) -> list[dict]:
    before = len(read_records(path))
    compare(Records(path, "kernels"), comparisons)
    return read_records(path)[before:]


def timed(records: list[dict]) -> list[tuple[str, str]]:
    return [(x["benchmark"], x["variant"]) for x in records if x["kind"] == "measured"]


def begin(path: Path, benchmark: str, *kinds: str) -> None:
    for kind in kinds:
        Records(path, "kernels").write(kind, what=f"{benchmark}, 64 x, forward")


def test_variants_that_take_long_to_compile_are_left_out(path):
    records = run(path, Fake("swiglu"))
    expected = ["mmalign cuda", "mmalign triton", "liger-kernel"]
    assert timed(records) == [("swiglu", name) for name in expected]
    assert all(x["seconds"] > 0 and x["info"]["bytes"] == 100 for x in records if "info" in x)


def test_what_has_ended_is_not_repeated(path):
    begin(path, "swiglu", "begin", "end")
    other, ended = Fake("rms_norm"), Fake("swiglu")
    assert {name for name, _ in timed(run(path, ended, other))} == {"rms_norm"}
    assert not ended.ran


def test_what_broke_its_process_is_repeated_once_without_csrc(path):
    begin(path, "swiglu", "begin")
    records = run(path, Fake("swiglu"))
    assert timed(records) == [("swiglu", "mmalign triton"), ("swiglu", "liger-kernel")]
    assert problems(records) == [
        "kernels: swiglu, 64 x, forward: interrupted; repeated without csrc/"
    ]
    begin(path, "rms_norm", "begin", "begin")
    assert timed(run(path, Fake("rms_norm"))) == []


def test_neither_a_wrong_result_nor_an_error_stops_the_next(path):
    wrong = Fake("swiglu", WrongResult("mmalign triton", "output 0 is off by 0.5 of its norm"))
    records = run(path, wrong, Fake("rms_norm", ValueError("no such shape")), Fake("layer_norm"))
    assert problems(records) == [
        "kernels: swiglu, 64 x, forward: mmalign triton: output 0 is off by 0.5 of its norm",
        "kernels: rms_norm, 64 x, forward: ValueError: no such shape",
    ]
    assert ("swiglu", "mmalign cuda") in timed(records)  # the other variants have times
    assert ("layer_norm", "mmalign triton") in timed(records)
