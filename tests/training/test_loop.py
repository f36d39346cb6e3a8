"""What must not change a run (micro-batches, processes, being killed), and what must stop it."""

import importlib.metadata
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mmalign.command import Stopped
from mmalign.errors import UserError
from mmalign.files import read_json_lines
from mmalign.training.loop import train
from tests.training.helpers import exported_weights, losses, small_config, small_loop

REPOSITORY = Path(__file__).resolve().parents[2]


def command_line(config, *launcher: str) -> list[str]:
    """scripts/train.py with the settings of small_config."""
    flags = {
        "--run-dir": config.run_dir,
        "--model.decoder": config.model.decoder,
        "--model.vision-tower": config.model.vision_tower,
        "--model.projector": config.model.projector,
        "--data.path": config.data.path,
        "--data.image-root": config.data.image_root,
        "--data.template": config.data.template,
        "--data.shuffle": config.data.shuffle,
        "--num-steps": config.num_steps,
        "--optimizer.learning-rate": config.optimizer.learning_rate,
        "--optimizer.warmup-ratio": config.optimizer.warmup_ratio,
        "--global-batch-size": config.global_batch_size,
        "--micro-batch-tokens": config.micro_batch_tokens,
        "--precision": config.precision,
        "--checkpoint.every": config.checkpoint.every,
        "--device": "cpu",
    }
    arguments = [str(part) for pair in flags.items() if pair[1] != "" for part in pair]
    script = str(REPOSITORY / "scripts" / "train.py")
    return [sys.executable, *launcher, script, f"tiny-{config.stage}", *arguments]


def run_command(command: list[str]) -> subprocess.CompletedProcess:
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # bits depend on it
    environment = os.environ | threads
    return subprocess.run(
        command,
        env=environment,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def assert_same_losses(one: Path, other: Path) -> None:
    torch.testing.assert_close(
        torch.tensor(losses(one)), torch.tensor(losses(other)), atol=2e-5, rtol=0
    )


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_micro_batches_change_nothing(small_world, tmp_path, stage):
    numbers_of_micro_batches = set()
    for tokens in (4096, 800, 400) if stage == "finetune" else (4096, 200, 100):
        config = small_config(small_world, tmp_path / str(tokens), stage, micro_batch_tokens=tokens)
        train(config)
        records = read_json_lines(config.run_dir / "metrics.jsonl")
        numbers_of_micro_batches.add(max(record["micro_batches"] for record in records))
        assert_same_losses(tmp_path / "4096", config.run_dir)
    assert len(numbers_of_micro_batches) == 3 and min(numbers_of_micro_batches) == 1


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_two_processes_equal_one(small_world, tmp_path, stage):
    tokens = 500 if stage == "finetune" else 150
    alone = small_config(small_world, tmp_path / "one", stage, micro_batch_tokens=tokens)
    train(alone)
    pair = replace(alone, run_dir=tmp_path / "two")
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    result = run_command(command_line(pair, *launcher))
    assert result.returncode == 0, result.stderr[-3000:]
    assert (pair.run_dir / "report.md").exists()
    assert_same_losses(alone.run_dir, pair.run_dir)
    ours, theirs = exported_weights(alone.run_dir), exported_weights(pair.run_dir)
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        torch.testing.assert_close(weight, theirs[name], atol=1e-4, rtol=1e-3, msg=name)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_a_killed_run_continues_to_the_same_bits(small_world, tmp_path, stage, precision):
    whole = small_config(small_world, tmp_path / "whole", stage, precision=precision)
    whole = replace(whole, lora=replace(whole.lora, rank=4 if stage == "finetune" else 0))
    whole = replace(whole, data=replace(whole.data, shuffle=True))
    whole = replace(whole, checkpoint=replace(whole.checkpoint, every=2))
    train(whole)

    killed = replace(whole, run_dir=tmp_path / "killed")
    result = train_interrupted(killed, "kill", step=3)
    assert result.returncode == -signal.SIGKILL, result.stderr[-3000:]
    assert len(losses(killed.run_dir)) >= 3
    train(killed)  # the same command
    assert losses(whole.run_dir) == losses(killed.run_dir)
    ours, theirs = exported_weights(whole.run_dir), exported_weights(killed.run_dir)
    assert ours.keys() == theirs.keys() and ours
    assert all(torch.equal(weight, theirs[name]) for name, weight in ours.items())


def train_interrupted(config, fate: str, step: int) -> subprocess.CompletedProcess:
    path = config.run_dir.with_suffix(".pickle")
    path.write_bytes(pickle.dumps(config))
    return run_command(
        [sys.executable, "-m", "tests.training.train_interrupted", str(path), fate, str(step)]
    )


def test_sigterm_saves_and_the_same_command_continues(small_world, tmp_path):
    config = small_config(small_world, tmp_path / "run", num_steps=2000)
    config = replace(config, checkpoint=replace(config.checkpoint, every=0))
    process = subprocess.Popen(command_line(config), stderr=subprocess.PIPE, text=True)
    metrics = config.run_dir / "metrics.jsonl"
    while not metrics.exists() or len(losses(config.run_dir)) < 3:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == Stopped.exit_code and "everything is saved" in stderr, stderr
    done = len(losses(config.run_dir))
    assert (config.run_dir / "checkpoints" / f"step_{done}").is_dir()


def test_changed_settings_are_refused(small_world, tmp_path):
    config = small_config(small_world, tmp_path, "pretrain")
    train(config)
    changed = replace(config, optimizer=replace(config.optimizer, learning_rate=1.0))
    with pytest.raises(UserError, match=r"optimizer.learning_rate was 0.01, now 1.0"):
        train(changed)


def test_bad_image_mid_run_keeps_every_finished_step(small_world, tmp_path):
    """The image breaks after the check: the step fails by name, the steps before it are saved."""
    images = tmp_path / "images"
    images.mkdir()
    for file in small_world.images.iterdir():
        (images / file.name).write_bytes(file.read_bytes())
    config = small_config(small_world, tmp_path / "run", "pretrain")
    config = replace(config, data=replace(config.data, image_root=str(images), check_images=False))
    (images / "20.png").write_bytes((images / "20.png").read_bytes()[:200])
    with pytest.raises(UserError, match="caption-20"):
        train(config)
    assert len(losses(config.run_dir)) == 2  # samples 16 to 23 are the third step
    assert (config.run_dir / "checkpoints" / "step_2").is_dir()


def test_non_finite_loss_names_the_samples(small_world, tmp_path):
    config = small_config(small_world, tmp_path, optimizer={"learning_rate": 1e30})
    with pytest.raises(UserError, match=r"loss of step \d+ is (nan|inf).*caption-|visual-"):
        small_loop(config).run()  # train() refuses such a rate
    assert list((tmp_path / "checkpoints").glob("step_*"))


def test_a_run_that_learns_nothing_says_so(small_world, tmp_path, caplog):
    settings = {"num_steps": 1, "global_batch_size": 30, "data": {"num_samples": 8}}
    small_loop(small_config(small_world, tmp_path / "short", **settings))
    assert "the only step has learning rate 0" in caplog.text
    assert "--global-batch-size 30 is more than the 8 usable samples" in caplog.text
    config = small_config(small_world, tmp_path / "skips", num_steps=3, on_non_finite="skip")
    loop = small_loop(config)
    loop.trainer.model.projector.weight.data.fill_(float("nan"))
    caplog.clear()
    loop.run()
    assert "all 3 steps were skipped" in caplog.text


def test_full_disk_keeps_the_last_checkpoint(small_world, tmp_path):
    """Writes really fail (a limit on file sizes stands in for the full disk) at the second save."""
    config = small_config(small_world, tmp_path / "run", num_steps=8)
    config = replace(config, checkpoint=replace(config.checkpoint, every=2))
    result = train_interrupted(config, "fill-disk", step=3)
    assert result.returncode == 1
    assert "checkpoint of step 4" in result.stderr and "Step 2 is safe" in result.stderr
    checkpoints = config.run_dir / "checkpoints"
    assert [path.name for path in checkpoints.iterdir()] == ["step_2"]
    train(config)  # with space again the same command finishes
    assert len(losses(config.run_dir)) == 8


def test_disk_is_checked_before_the_first_step(small_world, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("mmalign.training.checkpoint.shutil.disk_usage", lambda path: usage)
    with pytest.raises(UserError, match="GiB free"):
        train(small_config(small_world, tmp_path))
    assert not (tmp_path / "metrics.jsonl").exists()


def test_skipped_samples_are_counted_and_listed(small_world, tmp_path):
    samples = json.loads(small_world.finetune_json.read_text())
    samples[1]["image"] = "missing.png"
    data = tmp_path / "data.json"
    data.write_text(json.dumps(samples))
    config = small_config(small_world, tmp_path / "run", data={"path": str(data)})
    with pytest.raises(UserError, match="visual-1.*missing.png"):
        train(config)
    assert not (config.run_dir / "metrics.jsonl").exists()
    skipping = replace(config, run_dir=tmp_path / "skipping")
    train(replace(skipping, data=replace(config.data, on_bad_sample="skip")))
    listed = (skipping.run_dir / "skipped_samples.txt").read_text().splitlines()
    assert len(listed) == 1 and "visual-1" in listed[0]


def test_text_only_trains_the_decoder_alone(small_world, tmp_path):
    config = small_config(small_world, tmp_path, data={"text_only": True, "template": "llama_2"})
    train(config)
    assert losses(tmp_path)[-1] < losses(tmp_path)[0]
    assert [path.name for path in (tmp_path / "export").iterdir()] == ["llama"]
    config_file = json.loads((tmp_path / "export" / "llama" / "config.json").read_text())
    assert config_file["vocab_size"] == 330  # no row for image tokens that it never saw


def test_config_json_says_what_ran(small_world, tmp_path):
    train(small_config(small_world, tmp_path, "pretrain", num_steps=1))
    saved = json.loads((tmp_path / "config.json").read_text())
    # the package of a CUDA build may lack the "+cu130" of torch.__version__
    assert saved["versions"]["torch"] == importlib.metadata.version("torch")
    assert saved["stage"] == "pretrain" and saved["data"]["template"] == "v1"


def test_print_config_needs_no_data():
    script = str(REPOSITORY / "scripts" / "train.py")
    arguments = ["finetune-7b", "--num-steps", "7", "--data.shuffle", "False", "--print-config"]
    printed = json.loads(run_command([sys.executable, script, *arguments]).stdout)
    assert printed["num_steps"] == 7 and printed["data"]["shuffle"] is False
    assert printed["global_batch_size"] == 32


def test_typing_errors_get_a_suggestion():
    script = str(REPOSITORY / "scripts" / "train.py")
    result = run_command([sys.executable, script, "tiny-pretrain", "--data.shufle", "False"])
    assert result.returncode == 2 and "--data.shuffle" in result.stderr + result.stdout


@pytest.mark.parametrize("name", ["export", "report.md"])
def test_what_stands_in_the_way_of_the_export_is_found_first(small_world, tmp_path, name):
    wrong = tmp_path / name
    wrong.touch() if name == "export" else wrong.mkdir()
    with pytest.raises(UserError, match=f"{name} is in the way"):
        train(small_config(small_world, tmp_path))
    assert sorted(x.name for x in tmp_path.iterdir()) == [".lock", name]
