"""--wandb: what wandb writes of an offline run, and that its failures stop nothing."""

import importlib.util
import json
import logging
import os
import pickle
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from mmalign.config import CheckpointConfig
from mmalign.errors import UserError
from mmalign.files import read_json, read_json_lines
from mmalign.training.loop import train
from mmalign.training.metrics import Metrics
from mmalign.training.run_folder import write_config
from tests.conftest import REPOSITORY
from tests.training.helpers import small_config

needs_wandb = pytest.mark.skipif(
    importlib.util.find_spec("wandb") is None, reason="wandb is not installed (pip install wandb)"
)
RECORD = {"loss": 1.5, "tokens_per_second": 1.0, "samples_per_second": 1.0}
RECORD |= {"tflops_per_second": 1.0, "data_wait_share": 0.0, "memory_peak_bytes": 1}
RECORD |= {"throttle_reasons": ["power cap"]}


def records(path: Path) -> Iterator[bytes]:
    """Of a .wandb file: a header of 7 bytes, then LevelDB's log format (blocks of 32 KiB)."""
    content, position, parts = path.read_bytes(), 7, []
    while len(content) - position >= 7:
        if (left := 32768 - position % 32768) < 7:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, position)
        parts.append(content[position + 7 : position + 7 + length])
        position += 7 + length
        if kind in (1, 4):  # a whole record, the last part of one
            yield b"".join(parts)
            parts = []


def offline_run(path: Path) -> SimpleNamespace:
    """What `wandb sync` would send: id, name and config, and the values of every step."""
    from wandb.proto.wandb_internal_pb2 import Record

    found = SimpleNamespace(steps={})
    for content in records(path):
        record = Record.FromString(content)
        if record.HasField("run"):
            found.id, found.name = record.run.run_id, record.run.display_name
            found.project = record.run.project
            found.config = {x.key: json.loads(x.value_json) for x in record.run.config.update}
        if record.HasField("history"):
            items = {x.key or x.nested_key[0]: x.value_json for x in record.history.item}
            values = {name: json.loads(text) for name, text in items.items()}
            found.steps.setdefault(record.history.step.num, {}).update(values)
    return found


@needs_wandb
def test_an_offline_run_has_every_step_and_a_resumed_one_its_id(small_world, tmp_path):
    run_dir = tmp_path / "stopped, killed and resumed"
    config = small_config(small_world, run_dir, checkpoint=CheckpointConfig(2), wandb="project")
    (tmp_path / "config.pickle").write_bytes(pickle.dumps(config))
    command = [sys.executable, "-m", "tests.training.train_interrupted", tmp_path / "config.pickle"]
    environment = os.environ | {"WANDB_MODE": "offline", "PYTHONPATH": os.pathsep.join(sys.path)}
    for fate, step, code in (("stop", 1, 1), ("kill", 5, -signal.SIGKILL), ("stop", 99, 0)):
        process = subprocess.run(
            [*command, fate, str(step)],
            check=False,
            cwd=REPOSITORY,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert process.returncode == code, process.stderr
    paths = sorted(run_dir.glob("wandb/offline-run-*/run-*.wandb"))
    stopped, resumed = offline_run(paths[0]), offline_run(paths[-1])  # the killed one left nothing
    assert stopped.id == resumed.id == (run_dir / "wandb_run_id").read_text()
    assert (resumed.project, resumed.name) == ("project", "stopped, killed and resumed")
    written = read_json(run_dir / "config.json")
    assert resumed.config["optimizer"] == written["optimizer"]
    assert resumed.config["versions"] == written["versions"]
    lines = {line["step"]: line for line in read_json_lines(run_dir / "metrics.jsonl")}
    assert sorted(stopped.steps) == [*range(1, max(stopped.steps) + 1)]
    assert sorted(resumed.steps) == [1, 2, 3, 4, 5, 6]
    for step, values in resumed.steps.items():
        assert {name: values[name] for name in lines[step].keys() - {"step"}} == {
            name: x for name, x in lines[step].items() if name != "step"
        }


class FakeRun:
    """What is used of wandb's run, and what it refuses."""

    def __init__(self, fails: str = "", step: int = 0):
        self.fails, self.step, self.calls = fails, step, []

    def __getattr__(self, name):
        def call(*arguments, **options):
            self.calls.append((name, arguments, options))
            if name == self.fails:
                raise RuntimeError("the service is gone")

        return call


@pytest.fixture
def fake_wandb(monkeypatch):
    """Installs a stand-in for the package, whose init returns the given run or raises it."""

    def install(run):
        def init(**options):
            if isinstance(run, Exception):
                raise run
            run.options = options
            return run

        module = ModuleType("wandb")
        module.init, module.Settings = init, dict
        monkeypatch.setitem(sys.modules, "wandb", module)
        return run

    return install


def test_scores_join_their_step_and_what_the_service_has_is_not_repeated(
    fake_wandb, small_world, tmp_path
):
    run = fake_wandb(FakeRun(step=3))
    config = small_config(small_world, tmp_path, wandb="project")
    write_config(config)
    with Metrics(config, 1, 6) as metrics:
        for step in (2, 3):
            metrics.log(RECORD | {"step": step})
        metrics.amend({"truthfulqa_mc2": 0.5})
    values = {name: x for name, x in RECORD.items() if name != "throttle_reasons"}
    assert run.calls == [
        ("log", (values,), {"step": 3}),
        ("log", ({"truthfulqa_mc2": 0.5},), {"step": 3}),
        ("finish", (), {"exit_code": 0}),
    ]
    assert run.options["resume"] == "allow" and run.options["project"] == "project"


@pytest.mark.parametrize(
    "run, calls",
    [
        (OSError("no network"), None),
        (FakeRun(fails="log"), ["log"]),
        (FakeRun(fails="finish"), ["log"] * 2 + ["finish"]),
    ],
)
def test_its_failure_is_said_once_and_stops_nothing(
    run, calls, fake_wandb, small_world, tmp_path, caplog
):
    fake_wandb(run)
    with caplog.at_level(logging.WARNING, "mmalign"):
        train(small_config(small_world, tmp_path, wandb="project", num_steps=2))
    said = [x for x in caplog.messages if "Weights & Biases" in x]
    assert len(said) == 1 and "metrics.jsonl has its numbers" in said[0]
    assert [x["step"] for x in read_json_lines(tmp_path / "metrics.jsonl")] == [1, 2]
    assert calls is None or [name for name, *_ in run.calls] == calls


@pytest.mark.parametrize("is_folder", [False, True])
def test_without_the_package_nothing_starts(is_folder, monkeypatch, small_world, tmp_path):
    if is_folder:  # of offline runs, where the command was started
        (tmp_path / "wandb").mkdir()
        monkeypatch.delitem(sys.modules, "wandb", raising=False)
        monkeypatch.setattr(sys, "path", [str(tmp_path)])
    else:
        monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb"):
        train(small_config(small_world, tmp_path / "run", wandb="project"))
    assert not (tmp_path / "run").exists()
