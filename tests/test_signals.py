"""A signal during a data check, an evaluation or an export, and a reader that goes away."""

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from mmalign.data.dataset import ConversationDataset
from mmalign.evaluation import evaluation as evaluation_module
from mmalign.model.hf import export as export_module
from tests.evaluation.test_during_training import TASKS, data_root  # noqa: F401  a fixture
from tests.training.conftest import small_world  # noqa: F401  a fixture
from tests.training.helpers import small_config
from tests.training.train_processes import start

ROOT = Path(__file__).resolve().parents[1]


def slow_check(rank: int) -> None:
    encode = ConversationDataset.encode

    def tell_and_encode(self, index: int):
        print("checking", flush=True)
        time.sleep(0.5)  # 48 samples: 24 seconds
        return encode(self, index)

    ConversationDataset.encode = tell_and_encode


def slow_export(rank: int) -> None:
    tensors = export_module._module_tensors

    def tell_and_read(*arguments):
        for tensor in tensors(*arguments):
            print("exporting", flush=True)
            time.sleep(0.5)
            yield tensor

    export_module._module_tensors = tell_and_read


@pytest.mark.parametrize("slow, num_workers", [(slow_check, 0), (slow_check, 2), (slow_export, 0)])
def test_sigterm_is_obeyed_at_once(small_world, tmp_path, slow, num_workers):  # noqa: F811
    config = small_config(small_world, tmp_path / "run", num_steps=2)
    config = replace(config, data=replace(config.data, num_workers=num_workers))
    running = start(config, prepare=slow)
    end = time.monotonic() + 60
    while "ing\n" not in running.outputs()[0] and time.monotonic() < end:
        time.sleep(0.01)
    began = time.monotonic()
    running.send(signal.SIGTERM)
    assert running.wait(60) == [1] and time.monotonic() - began < 10
    text = running.outputs()[0]
    assert "stopped by a signal" in text and "Traceback" not in text
    start(config).succeed()


def run_script(monkeypatch, capsys, name: str, *arguments: object) -> tuple[object, str]:
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "scripts" / f"{name}.py"), run_name="__main__")
    return ended.value.code, capsys.readouterr().err


def test_ctrl_c_is_one_line(small_world, data_root, tmp_path, monkeypatch, capsys):  # noqa: F811
    def interrupt(*_, **__):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(10)

    monkeypatch.setattr(ConversationDataset, "encode", interrupt)
    data = ["--data.path", small_world.finetune_json, "--data.image-root", small_world.images]
    data += ["--model.tokenizer", small_world.decoder, "--data.num-workers", 0]
    for name in ("check_data", "preview_batch"):
        code, text = run_script(monkeypatch, capsys, name, *data)
        assert code == 130 and text.endswith("interrupted\n") and "Traceback" not in text
    monkeypatch.setattr(evaluation_module, "run_plan", interrupt)
    model = ["--model", small_world.decoder, "--data-root", data_root, "--device", "cpu"]
    output = tmp_path / "out"
    code, text = run_script(
        monkeypatch, capsys, "evaluate", *model, "--output", output, "--tasks", *TASKS
    )
    assert code == 130 and text.endswith("interrupted\n") and "Traceback" not in text
    assert [path.name for path in output.iterdir()] == [".lock"]


def test_head_is_quiet(small_world, tmp_path):  # noqa: F811
    path = tmp_path / "data.json"
    path.write_text(json.dumps(json.loads(small_world.finetune_json.read_text()) * 10))
    command = f"{sys.executable} scripts/preview_batch.py --data.path {path} --json"
    command += f" --data.image-root {small_world.images} --model.tokenizer {small_world.decoder}"
    result = subprocess.run(
        ["bash", "-c", f"{command} | head -n 1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert json.loads(result.stdout)["id"]
    said = [line.partition(":")[0] for line in result.stderr.splitlines()]
    assert said == ["data", "images"]
