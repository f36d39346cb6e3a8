"""The verdict of a made-up run: what it says is known here."""

from pathlib import Path

import pytest
from mmalign_kernels import cuda

from bench import verdict
from bench.records import Records, read_records
from bench.verdict import problems, render

SHAPE = "llama2-7b, 16384 tokens, bf16"
PREDICTIONS = {"seconds": {"h200": {f"rms_norm, {SHAPE}, forward": 70e-6, "scoring, ethics": 3.0}}}
MACHINE = {"kind": "machine", "part": "peaks", "device": "NVIDIA H200"}


def measured(benchmark: str, direction: str, variant: str, seconds: float, **more) -> dict:
    """more: case, and what is said besides."""
    names = {"benchmark": benchmark, "case": more.pop("case", SHAPE), "direction": direction}
    info = {"bytes": 268_435_456, "flops": 1, "bound": "copy"} | more
    record = {"kind": "measured", "part": "kernels", "variant": variant, "seconds": seconds}
    return record | names | {"info": info}


def both(benchmark: str, direction: str, cuda_us: float, triton_us: float) -> list[dict]:
    times = {"mmalign cuda": cuda_us, "mmalign triton": triton_us}
    return [measured(benchmark, direction, name, us * 1e-6) for name, us in times.items()]


def norms(cuda_us: float, triton_us: float = 100) -> list[dict]:
    ways = [(name, way) for name in ("rms_norm", "add_rms_norm") for way in ("forward", "backward")]
    return [record for name, way in ways for record in both(name, way, cuda_us, triton_us)]


def row(text: str, *words: str) -> list[str]:
    """The cells of the one line of a table that has all of the words."""
    [line] = [x for x in text.splitlines() if x.startswith("|") and all(w in x for w in words)]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_an_operation_stands_beside_its_prediction_and_its_best_peer():
    records = [MACHINE, *both("rms_norm", "forward", 90, 80)]
    records.append(measured("rms_norm", "forward", "liger-kernel", 100e-6))
    records.append(measured("rms_norm", "forward", "torch eager", 300e-6))
    cells = row(render(records, PREDICTIONS), SHAPE, "liger-kernel")
    assert cells[3:7] == ["triton", "80 us", "70 us", "1.14"]
    assert cells[-3:] == ["liger-kernel", "100 us", "1.25x"]
    assert "3,355.4 GB/s" in cells


@pytest.mark.parametrize(("us", "shown"), [(84, "1.20"), (85, "1.21 !"), (55, "0.79 !")])
def test_a_missed_prediction_is_marked(us, shown):
    records = [MACHINE, *both("rms_norm", "forward", 999, us)]
    records.append(measured("rms_norm", "forward", "torch eager", 1.0))
    assert row(render(records, PREDICTIONS), SHAPE, "torch eager")[6] == shown


def test_another_card_has_no_predictions():
    other = MACHINE | {"device": "NVIDIA A100-SXM4-80GB"}
    text = render([other, *both("rms_norm", "forward", 90, 80)], PREDICTIONS)
    assert text.startswith("NVIDIA A100") and "predicted" not in text


def part(name: str, status: str, **more) -> dict:
    record = {"kind": "part", "part": "run", "what": name, "status": status, "seconds": 0}
    return record | {"expected": 85, "note": ""} | more


def winners(records: list[dict]) -> str:
    text = render([*records, part("kernels", "done")], PREDICTIONS)
    [line] = [x for x in text.splitlines() if "MEASURED_CUDA" in x]
    return line.partition("= ")[2].partition("`")[0]


def test_families_of_csrc_that_win():
    assert winners([]) == "frozenset()"
    assert winners(norms(90)) == 'frozenset({"rms_norm"})'
    assert winners(norms(99)) == "frozenset()"  # within the noise
    assert winners(norms(90)[:4]) == "frozenset()"  # the operation with the addition is missing
    one_slower = [*norms(50)[:-2], *both("add_rms_norm", "backward", 106, 100)]
    assert winners(one_slower) == "frozenset()"
    one_wrong = norms(50)
    del one_wrong[2]  # cuda's time
    assert winners(one_wrong) == "frozenset()"


@pytest.mark.parametrize("records", [[], [part("kernels", "cut short")]])
def test_csrc_is_not_decided_by_a_part_of_its_kernels(records):
    text = render([*norms(50), *records], PREDICTIONS)
    assert "MEASURED_CUDA" not in text and "undecided" in text


def test_csrc_is_decided_by_all_that_it_has():
    files = {path.stem for path in Path(cuda.__file__).parent.glob("[!_]*.py")}
    assert verdict.FAMILIES.keys() == files - {"library"}


def step(recipe: str, tokens_per_second: float, **more) -> dict:
    case = f"{recipe}, llama2-7b, 32 samples"
    info = {"tokens_per_second": tokens_per_second, "mfu": 0.6, "case": case} | more
    record = measured("train_recipe", "step", "mmalign, 8192 tokens per micro-batch", 1.25, **info)
    del record["info"]["bytes"]
    return record


def test_targets():
    records = [MACHINE, step("finetune-7b", 15_700), step("pretrain-7b", 21_000)]
    case = "toy world's ethics, about 400 documents of each task, llama2-7b, bf16"
    scoring = measured("scoring", "score", "mmalign", 4.4, case=case)
    del scoring["info"]["bytes"]
    attention = {"mmalign triton": 100e-6, "torch_varlen through mmalign": 125e-6}
    for variant, seconds in attention.items():
        records.append(measured("rotary_attention", "forward", variant, seconds))
    text = render([*records, scoring], PREDICTIONS)
    assert row(text, "finetune-7b, tokens/s")[1:] == ["15,700", "15,600", "yes"]
    assert row(text, "pretrain-7b, tokens/s")[1:] == ["21,000", "22,000", "no"]
    assert row(text, "all of ethics")[1:] == ["44.0 s", "45 s", "yes"]
    assert row(text, "over torch varlen")[1:] == ["1.25x", "1.3x", "no"]
    assert row(text, "scoring", "4.4 s")[4:6] == ["3 s", "1.47 !"]


def test_memory_stands_beside_its_plan():
    record = step("finetune-7b", 15_700, planned_bytes=90 * 10**9, device_bytes=93 * 10**9)
    assert row(render([MACHINE, record], PREDICTIONS), "8192 tokens")[-2:] == ["93.0 GB", "90.0 GB"]


def test_what_is_wrong_is_said():
    wrong = {"kind": "wrong", "part": "kernels", "what": "swiglu", "reason": "off by 0.5"}
    skipped = part("tests", "skipped", note="takes about 85 s, 30 of 450 are left")
    text = render([wrong, skipped], PREDICTIONS)
    assert problems([wrong, skipped]) == ["kernels: swiglu: off by 0.5"]
    assert "- kernels: swiglu: off by 0.5" in text
    assert row(text, "tests")[1:] == ["skipped", "0", "85", skipped["note"]]


def test_records_of_a_process_that_was_killed_while_it_wrote(tmp_path):
    path = tmp_path / "verification.jsonl"
    assert read_records(path) == []
    Records(path, "peaks").write("machine", device="NVIDIA H200")
    with path.open("a") as file:
        file.write('{"kind": "meas')
    [record] = read_records(path)
    assert record == MACHINE
    assert render([record], PREDICTIONS).startswith("NVIDIA H200.")
