"""Damaged bookkeeping of a run folder: rebuilt, passed over or named; never other weights."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch

from mmalign.config import TrainConfig
from mmalign.data.check import check_samples
from mmalign.evaluation.report import read_run
from mmalign.evaluation.report.sections import settings, training
from mmalign.evaluation.vision_model import choose_template, run_settings
from mmalign.tokenizer import Tokenizer
from mmalign.training.build import build_dataset, resolve
from mmalign.training.guards import LossSpikeDetector
from mmalign.training.inputs import RunInputs
from mmalign.training.loop import train
from mmalign.training.metrics import Metrics
from mmalign.training.run_folder import with_first_decision, write_config
from tests.fuzz.damage import damaged_bytes, damaged_json, ends_well
from tests.training.helpers import exported_weights, small_config
from tests.training.test_checkpoint import opened, saved, state

pytestmark = pytest.mark.fuzz
NUM_STEPS = 4
KEYS = ("step", "loss", "data", "lora", "inputs", "num_steps", "micro_batch_tokens")


@pytest.fixture(scope="module")
def good(small_world, tmp_path_factory) -> Path:
    """The folder of a finished run, and beside it checkpoints of a smaller state."""
    root = tmp_path_factory.mktemp("good")
    config = small_config(small_world, root / "run", num_steps=NUM_STEPS)
    config = replace(config, checkpoint=replace(config.checkpoint, every=1))
    train(config)
    saved(root / "checkpoints", 1, 2, 3)
    return root


class Readers:
    """What a start, the report and chat read of each file, checked against the good one."""

    def __init__(self, world, good: Path, folder: Path):
        self.folder, self.run_dir = folder, folder / "run"
        self.config = resolve(small_config(world, self.run_dir, num_steps=NUM_STEPS))
        self.tokenizer = Tokenizer.from_pretrained(self.config.model.tokenizer)
        self.dataset = build_dataset(self.config, self.tokenizer)
        self.report = check_samples(self.dataset, good / "run/data_check.npz", progress=False)
        self.lines = (good / "run/metrics.jsonl").read_text().splitlines()

    def manifest(self) -> None:
        """The newest checkpoint that is whole has the state that was saved."""
        checkpoints = opened(self.folder / "checkpoints")
        step = checkpoints.latest_step()
        assert step in (2, 3)
        found = state()
        checkpoints.load(step, found)
        assert all(torch.equal(found[x], y) for x, y in state(float(step)).items())

    def data_check(self) -> None:
        cache = self.run_dir / "data_check.npz"
        found = check_samples(self.dataset, cache, progress=False)
        for name, value in vars(self.report).items():
            np.testing.assert_equal(getattr(found, name), value)

    def metrics(self) -> None:
        """Lines that are as they were stay."""
        path = self.run_dir / "metrics.jsonl"
        found = path.read_bytes().decode(errors="replace").split("\n")[:-1]
        as_it_was = set(self.lines) & set(found)
        ends_well("read_run", (str(path),), lambda: training({"run": read_run(self.run_dir)}, "x"))
        config = TrainConfig(stage="finetune", run_dir=self.run_dir)
        with Metrics(config, NUM_STEPS, NUM_STEPS) as metrics:
            LossSpikeDetector(3.0, metrics.earlier_losses).update(5, 1.0, ["x"])
        kept = set(map(json.dumps, map(json.loads, path.read_text().splitlines())))
        assert len(as_it_was - kept) <= 1  # a false step may fit where a true one does not

    def settings(self) -> None:
        write_config(self.config)
        with_first_decision(replace(self.config, micro_batch_tokens="auto"))
        stages = {"run": self.run_dir}
        settings(stages, {"run": read_run(self.run_dir)})
        weights = self.run_dir / "export/llama"
        data = run_settings(weights)
        assert choose_template(weights, None, data)
        assert isinstance(data.flag("use_im_start_end", True), bool)

    def inputs(self) -> None:
        inputs = RunInputs(self.run_dir)
        inputs.check(self.config, self.tokenizer)
        inputs.check_images(self.dataset, self.report)
        inputs.settle(self.config, NUM_STEPS)


def damage_npz(path: Path, rng: Random) -> None:
    """Bytes, or one number of an array in an archive that is whole."""
    if rng.random() < 0.5:
        path.write_bytes(damaged_bytes(path.read_bytes(), rng))
        return
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    name = rng.choice([x for x in arrays if arrays[x].size and arrays[x].dtype.kind == "i"])
    arrays[name].flat[rng.randrange(arrays[name].size)] += rng.choice((-1, 1, 100))
    np.savez(path, **arrays)


def damage_lines(path: Path, rng: Random) -> None:
    lines = path.read_text().splitlines()
    number = rng.randrange(len(lines))
    if rng.random() < 0.3:
        path.write_bytes(damaged_bytes(path.read_bytes(), rng))
        return
    lines[number] = damaged_json(lines[number], rng, KEYS).decode(errors="replace")
    path.write_text("\n".join(lines) + "\n")


def damage_json(path: Path, rng: Random) -> None:
    path.write_bytes(damaged_json(path.read_text(), rng, KEYS))


def damage_any(path: Path, rng: Random) -> None:
    path.write_bytes(damaged_bytes(path.read_bytes(), rng))


FILES: dict[str, tuple[str, Callable]] = {
    "checkpoints/step_3/manifest.json": ("manifest", damage_json),
    "checkpoints/step_3/.metadata": ("manifest", damage_any),
    "checkpoints/step_3/__0_0.distcp": ("manifest", damage_any),
    "run/data_check.npz": ("data_check", damage_npz),
    "run/metrics.jsonl": ("metrics", damage_lines),
    "run/config.json": ("settings", damage_json),
    "run/inputs.json": ("inputs", damage_json),
}


def test_each_file_by_what_reads_it(small_world, good, tmp_path, seeds):
    folder, accepted = tmp_path / "folder", 0
    shutil.copytree(good, folder)
    readers = Readers(small_world, good, folder)
    for seed in seeds("run folders")[: -len(seeds("run folders")) // 25]:
        rng = Random(seed)
        name = rng.choice(sorted(FILES))
        reader, damage = FILES[name]
        damage(folder / name, rng)
        accepted += ends_well((seed, name), (str(folder),), getattr(readers, reader))
        top = name.split("/")[0]
        shutil.rmtree(folder / top)
        shutil.copytree(good / top, folder / top)
    assert accepted / len(seeds("run folders")) > 0.5  # most are rebuilt or passed over


def test_a_run_with_a_damaged_file_trains_the_same(small_world, good, tmp_path, seeds):
    expected = exported_weights(good / "run")
    for seed in seeds("run folders")[-len(seeds("run folders")) // 25 :]:
        rng, run_dir = Random(seed), tmp_path / str(seed)
        shutil.copytree(good / "run", run_dir)
        shutil.rmtree(run_dir / "export")
        for step in (3, 4):
            shutil.rmtree(run_dir / f"checkpoints/step_{step}", ignore_errors=True)
        name = rng.choice(["data_check.npz", "metrics.jsonl", "config.json", "inputs.json"])
        FILES[f"run/{name}"][1](run_dir / name, rng)
        config = small_config(small_world, run_dir, num_steps=NUM_STEPS)
        if ends_well((seed, name), (str(run_dir),), train, config):
            found = exported_weights(run_dir)
            assert found.keys() == expected.keys()
            assert all(torch.equal(weight, expected[x]) for x, weight in found.items())
        shutil.rmtree(run_dir)
