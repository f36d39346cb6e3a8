"""Run folders and evaluation outputs that change, are shared, damaged or interrupted."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
import zlib

import pytest

from mmalign.files import read_json_lines
from tests.faults.conftest import ROOT, Case, options


def steps(case: Case) -> list[int]:
    return [record["step"] for record in read_json_lines(case.run / "metrics.jsonl")]


def begin(case: Case, **changes: object) -> subprocess.Popen:
    """A training in a process of its own, with what it prints in scratch/log."""
    command = [sys.executable, "scripts/train.py", "tiny-finetune"]
    with open(case.scratch / "log", "w") as log:
        return subprocess.Popen(
            [*command, *options(case.training(changes))], cwd=ROOT, stdout=log, stderr=log
        )


def wait_for_steps(case: Case, process: subprocess.Popen, number: int) -> None:
    metrics, end = case.run / "metrics.jsonl", time.monotonic() + 60
    while not metrics.exists() or metrics.read_text().count("\n") < number:
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize(
    "name, part, named",
    [
        ("39-data-replaced-before-resume", "data.json", "data file"),
        ("40-base-weights-replaced-before-resume-of-lora", "decoder", "decoder"),
        ("41-tokenizer-replaced-before-resume", "decoder", "tokenizer"),
    ],
    ids=lambda value: value if value[0].isdigit() else "",
)
def test_an_input_that_was_replaced_is_refused(case, name, part, named):
    used = case.scratch / part
    copy = shutil.copy if part == "data.json" else shutil.copytree
    copy(case.folder / part if part == "data.json" else case.base / part, used)
    option = "data__path" if part == "data.json" else "model__decoder"
    changes = {option: used} | ({"lora__rank": 4} if name.startswith("40") else {})
    case.train_four_of_six(**changes)
    others = {"39": "other.json", "40": "decoder", "41": "tokenizer"}[name[:2]]
    if used.is_file():
        shutil.copy(case.folder / others, used)
    else:
        shutil.copytree(case.folder / others, used, dirs_exist_ok=True)
    case.train(num_steps=6, **changes).refused(f"the {named} {used}", "has changed")


def test_50_a_second_start_in_one_run_folder(case):
    first = begin(case, num_steps=60)
    wait_for_steps(case, first, 5)
    case.train(num_steps=60).refused("is in use by process", str(first.pid))
    assert first.wait(60) == 0 and steps(case) == list(range(1, 61))


def test_51_an_evaluation_over_another_models(case):
    case.evaluate().succeeded()
    before = (case.output / "results.json").read_bytes()
    ended = case.evaluate(model=case.folder / "decoder")
    ended.refused(str(case.base / "decoder"), "--overwrite")
    assert (case.output / "results.json").read_bytes() == before
    case.evaluate("--overwrite", model=case.folder / "decoder").succeeded()


def test_52_a_failed_evaluation_keeps_the_last(case):
    case.evaluate(limit=1).succeeded()
    before = (case.output / "results.json").read_bytes()
    (case.output / "items.jsonl").unlink()
    (case.output / "items.jsonl").mkdir()
    case.evaluate().refused("items.jsonl")
    assert (case.output / "results.json").read_bytes() == before


def test_54_a_connection_is_lost(case):
    process = begin(case, num_steps=2000, checkpoint__every=0)
    wait_for_steps(case, process, 6)
    process.send_signal(signal.SIGHUP)
    assert process.wait(60) == 75
    [checkpoint] = (case.run / "checkpoints").iterdir()
    assert checkpoint.name == f"step_{steps(case)[-1]}"


def test_55_the_disk_fills_up_between_checkpoints(case):
    disk = case.scratch / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        (disk / "run").mkdir()
        case.run.symlink_to(disk / "run")
        process = begin(case, num_steps=3000, checkpoint__every=0, checkpoint__keep=1)
        wait_for_steps(case, process, 9)
        with open(disk / "fill", "wb", buffering=0) as file:
            for size in (4096, 1):
                try:
                    while file.write(b"x" * size):
                        pass
                except OSError:
                    pass
        assert process.wait(60) == 1
        text = (case.scratch / "log").read_text()
        assert "Traceback" not in text and "o space left" in text.splitlines()[-1], text
        assert "There is no earlier checkpoint" in text or "is safe" in text
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_59_code_in_a_checkpoint(case):
    case.train_four_of_six()
    step, executed = case.run / "checkpoints/step_4", case.scratch / "EXECUTED"
    data = pickle.dumps(Touch(str(executed)))
    (step / ".metadata").write_bytes(data)
    manifest = json.loads((step / "manifest.json").read_text())
    manifest["files"][".metadata"] = {"bytes": len(data), "crc32": zlib.crc32(data)}
    (step / "manifest.json").write_text(json.dumps(manifest))
    case.train(num_steps=6).refused("checkpoints/step_4")
    assert not executed.exists()


class Touch:
    def __init__(self, path: str):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch '{self.path}'",)


def test_64_a_checkpoint_under_another_step(case):
    case.train(num_steps=4).succeeded()
    shutil.rmtree(case.run / "export")
    shutil.rmtree(case.run / "checkpoints/step_4")
    os.rename(case.run / "checkpoints/step_1", case.run / "checkpoints/step_4")
    ended = case.train(num_steps=4)
    ended.succeeded("step 4", "says step 1", "corrupt_step_4", "Resuming from step 3")


def test_65_a_key_of_a_manifest_is_damaged(case):
    case.train_four_of_six()
    path = case.run / "checkpoints/step_4/manifest.json"
    path.write_text(path.read_text().replace("crc32", "crc33", 1))
    ended = case.train(num_steps=6)
    ended.succeeded("corrupt_step_4", "Resuming from step 3")
    assert steps(case) == [1, 2, 3, 4, 5, 6]


def test_66_config_json_of_a_run_is_torn(case):
    case.train().succeeded()
    os.truncate(case.run / "config.json", 500)
    case.train().refused(str(case.run / "config.json"))


def test_67_a_line_of_metrics_is_damaged(case):
    case.train_four_of_six()
    lines = (case.run / "metrics.jsonl").read_text().splitlines()[:4]
    lines[1] = "xx{"
    (case.run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    ended = case.train(num_steps=6)
    assert "metrics.jsonl, line 2" in ended.text
    assert steps(case) == [1, 3, 4, 5, 6]


def test_73_scores_that_cannot_be(case):
    case.evaluate(output=case.scratch / "a").succeeded()
    for score in ("NaN", "5", '"1"'):
        shutil.copytree(case.scratch / "a", case.scratch / "b", dirs_exist_ok=True)
        path = case.scratch / "b/items.jsonl"
        first, rest = path.read_text().split("\n", 1)
        item = json.loads(first)
        before = f'"score": {json.dumps(item["score"])}'
        assert before in first
        path.write_text(first.replace(before, f'"score": {score}') + "\n" + rest)
        folders = [str(case.scratch / name) for name in "ab"]
        ended = case.call("compare", *folders, "--output", str(case.scratch / "c"))
        ended.refused("items.jsonl", f"{item['task']} document {item['doc_id']}")
