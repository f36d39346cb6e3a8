"""Steps that are not finite, losses that jump, processes that are stuck, signals."""

import multiprocessing
import os
import signal
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from mmalign_kernels import adamw_step
from mmalign_kernels.dispatch import use_backend

from mmalign.config import ParallelConfig
from mmalign.data.loader import StepLoader
from mmalign.distributed import DistributedContext
from mmalign.errors import UserError
from mmalign.files import read_json_lines
from mmalign.training import loop, run_folder
from mmalign.training.build import build_model
from mmalign.training.checkpoint.writers import Together
from mmalign.training.guards import MAX_SKIPPED, MIN_LOSSES, LossSpikeDetector
from mmalign.training.heartbeat import Heartbeat
from mmalign.training.loop import train
from mmalign.training.sharding import ParallelModel
from mmalign.training.trainer import Trainer
from tests.training.helpers import exported_weights, losses, small_config
from tests.training.train_processes import Running, start


@pytest.mark.parametrize("scale", [0.0, float("nan")])
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_a_skipped_update_changes_nothing(backend, scale):
    """Split master: weights, remainders and moments stay, whatever the gradients are."""
    torch.manual_seed(0)
    tensors = [torch.randn(70).bfloat16(), torch.randn(70), torch.rand(70)]
    remainder = torch.randint(-(2**15), 2**15, (70,), dtype=torch.int16)
    before = [x.clone() for x in (*tensors, remainder)]
    with use_backend(backend):
        adamw_step(
            *([tensors[0]], [torch.full((70,), float("nan")).bfloat16()]),
            *([tensors[1]], [tensors[2]]),
            **{"step": 3, "learning_rate": 1.0, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8},
            weight_decay=0.1,
            grad_scale=torch.tensor(scale),
            remainders=[remainder],
        )
    assert all(torch.equal(x, y) for x, y in zip((*tensors, remainder), before, strict=True))


@pytest.fixture
def spoil(monkeypatch):
    """spoil(steps): the projector's gradient is NaN at the end of these steps, counted from 1."""
    finish_gradients, number = ParallelModel.finish_gradients, [0]

    def begin(steps):
        number[0] = 0

        def spoiled(self):
            finish_gradients(self)
            number[0] += 1
            if number[0] in steps:
                self.model.projector.weight.grad[0, 0] = float("nan")

        monkeypatch.setattr(ParallelModel, "finish_gradients", spoiled)

    return begin


def test_a_gradient_that_is_not_finite_stops_before_the_weights_see_it(
    small_world, tmp_path, spoil
):
    whole = small_config(small_world, tmp_path / "whole")
    train(whole)
    config = replace(whole, run_dir=tmp_path / "run")
    spoil({4})
    with pytest.raises(UserError, match=r"gradient norm of step 4 is nan.*visual-31") as raised:
        train(config)
    said = str(raised.value)
    places = [said.index(x) for x in ("All weights are finite", "preview_batch", "learning-rate")]
    assert places == sorted(places) and said.endswith("Step 3 is safe.")
    assert len(losses(config.run_dir)) == 3
    spoil({})
    train(config)  # from step 3, as if nothing had happened
    assert losses(whole.run_dir) == losses(config.run_dir)
    ours, theirs = exported_weights(whole.run_dir), exported_weights(config.run_dir)
    assert all(torch.equal(weight, theirs[name]) for name, weight in ours.items())


def test_broken_weights_are_named_before_anything_else(small_world, tmp_path, monkeypatch):
    """At the first step, so that there is nothing to be called safe."""

    def build_broken(*args):
        model = build_model(*args)
        model.decoder.norm.weight.data[3] = float("nan")
        return model

    monkeypatch.setattr(loop, "build_model", build_broken)
    found = r"loss of step 1 is nan.*weights are the cause: decoder.norm.weight holds NaN"
    with pytest.raises(UserError, match=found) as raised:
        train(small_config(small_world, tmp_path))
    assert "safe" not in str(raised.value) and "preview_batch" not in str(raised.value)
    assert str(raised.value).endswith("There is no earlier checkpoint.")


def test_skipping_leaves_the_step_out(small_world, tmp_path, spoil, caplog, monkeypatch):
    """Weights of a skipped step's end are those of its begin; the run goes on and can continue."""
    spoil({3})
    config = small_config(small_world, tmp_path / "run", on_non_finite="skip")
    config = replace(config, checkpoint=replace(config.checkpoint, every=2))
    weights, train_step = [], Trainer.train_step

    def watched(trainer, step, *flags):
        launched = train_step(trainer, step, *flags)
        weights.append(trainer.model.decoder.lm_head.weight.detach().clone())
        return launched

    monkeypatch.setattr(Trainer, "train_step", watched)
    train(config)
    same = [torch.equal(*pair) for pair in zip(weights, weights[1:], strict=False)]
    assert same == [False, True, False, False, False]
    records = read_json_lines(config.run_dir / "metrics.jsonl")
    assert [record["step"] for record in records if "skipped" in record] == [3]
    assert "gradient norm of step 3 is nan" in caplog.text
    assert all(weight.isfinite().all() for weight in exported_weights(config.run_dir).values())


def test_skipping_for_ever_is_an_error(small_world, tmp_path, spoil):
    spoil(set(range(3, 100)))
    config = small_config(small_world, tmp_path, on_non_finite="skip", num_steps=30)
    with pytest.raises(UserError, match=f"{MAX_SKIPPED}th step in a row"):
        train(config)
    assert len(losses(tmp_path)) in (MAX_SKIPPED + 2, MAX_SKIPPED + 1)


def test_loss_spikes_are_reported_with_their_samples(caplog):
    detector = LossSpikeDetector(factor=3.0, earlier_losses=[2.0] * (MIN_LOSSES - 1))
    assert not detector.update(20, 100.0, ["early"])  # too few losses to tell
    assert not detector.update(21, 5.9, ["fine"]) and not caplog.text
    assert detector.update(22, 6.1, ["a-7", "b-8"])
    assert "step 22: loss 6.1000 is more than 3 times the median 2.0000" in caplog.text
    assert "a-7, b-8" in caplog.text


def wait_for_steps(running: Running, run_dir: Path, number: int) -> None:
    while not (run_dir / "metrics.jsonl").exists() or len(losses(run_dir)) < number:
        assert running.processes[0].is_alive(), running.outputs()
        time.sleep(0.02)


def stall_rank_1(rank: int) -> None:
    """The data of its third step never come."""
    iterate = StepLoader.__iter__

    def stalling(loader):
        for step in iterate(loader):
            if rank == 1 and step.index == 2:
                time.sleep(300)
            yield step

    StepLoader.__iter__ = stalling


def test_a_stuck_process_is_named_with_its_step(small_world, tmp_path):
    config = small_config(small_world, tmp_path / "run")
    config = replace(config, parallel=ParallelConfig(timeout_minutes=0.1))
    running = start(config, 2, stall_rank_1)
    running.processes[0].join(60)
    assert running.processes[0].exitcode == 1
    running.send(signal.SIGKILL)  # as torchrun does when one process has failed
    running.wait()
    waiting, stuck = running.outputs()
    named = "no progress: rank 1 in step 3, waiting for data for"
    assert named in waiting and "rank 0 in step 3, computing for" in waiting, waiting
    assert named in stuck
    assert (config.run_dir / "checkpoints" / "step_2").is_dir()


def test_a_process_that_is_frozen_is_told_by_its_silence(monkeypatch):
    store, now = torch.distributed.HashStore(), time.time()
    for rank, step, when in ((1, 7, now - 100), (0, 8, now)):
        monkeypatch.setattr(time, "time", lambda when=when: when)
        beat = Heartbeat(DistributedContext(0, 1, torch.device("cpu")), timeout_minutes=1.0)
        beat.ranks, beat.store = DistributedContext(rank, 2, torch.device("cpu")), store
        beat.at(step, "computing")
        beat._publish()
    assert beat.report().startswith(
        "no progress: rank 1 in step 7, computing for 0 s when last heard of 100 s ago; "
        "rank 0 in step 8, computing for 0 s. "
    )


@pytest.mark.parametrize("sharding", ["none", "full"])
def test_who_loses_another_process_says_so_and_what_is_safe(small_world, tmp_path, sharding):
    """Unsharded, the process that is left has everything and saves it."""
    config = small_config(small_world, tmp_path / "run", num_steps=5000)
    config = replace(config, parallel=ParallelConfig(sharding=sharding))
    config = replace(config, checkpoint=replace(config.checkpoint, every=2))
    running = start(config, 2)
    wait_for_steps(running, config.run_dir, 3)
    os.kill(running.processes[1].pid, signal.SIGKILL)
    assert running.wait() == [1, -signal.SIGKILL]
    text, done = running.outputs()[0], len(losses(config.run_dir))
    assert "rank 0 lost its connection to a rank that exited" in text and "Traceback" not in text
    names = [path.name for path in (config.run_dir / "checkpoints").iterdir()]
    newest = max(int(name.removeprefix("step_")) for name in names)  # and no other name
    if sharding == "none":
        assert newest == done
    assert newest == done or f"Step {newest} is safe" in text, text


def killed_while_saving(rank: int) -> None:
    if rank == 1:
        Together.save = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)


def test_who_loses_another_process_while_saving_says_so(small_world, tmp_path):
    config = small_config(small_world, tmp_path / "run")
    config = replace(config, parallel=ParallelConfig(sharding="full"))
    running = start(config, 2, killed_while_saving)
    assert running.wait() == [1, -signal.SIGKILL]
    text = running.outputs()[0]
    assert "rank 0 lost its connection to a rank that exited; see that rank's log. " in text
    assert "no earlier checkpoint" in text and "Traceback" not in text, text


def on_a_disk_of_its_own(rank: int) -> None:
    os.chdir(tempfile.mkdtemp())
    run_folder.check_shared.__defaults__ = (0.0,)


def test_a_run_folder_that_not_all_nodes_see_is_refused(small_world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    running = start(small_config(small_world, Path("run")), 2, on_a_disk_of_its_own)
    assert running.wait() == [1, 1]
    for text in running.outputs():
        assert "--run-dir run: what process 0 writes there is not seen by process 1 on" in text


def in_a_group_of_its_own(rank: int) -> None:
    os.setpgid(0, 0)
    multiprocessing.set_start_method("fork", force=True)  # as where no test has started it


@pytest.mark.parametrize("sharding", ["none", "full"])
def test_a_signal_to_one_process_stops_all_after_the_same_step(small_world, tmp_path, sharding):
    """torchrun sends it to the process's group, where the loader's workers are, too."""
    config = small_config(small_world, tmp_path / "run", num_steps=5000, data={"num_workers": 1})
    config = replace(config, parallel=ParallelConfig(sharding=sharding))
    running = start(config, 2, in_a_group_of_its_own)
    wait_for_steps(running, config.run_dir, 2)
    number = signal.SIGTERM if sharding == "none" else signal.SIGUSR1
    os.killpg(running.processes[1].pid, number)
    assert running.wait() == [1, 1]
    done = len(losses(config.run_dir))
    assert [path.name for path in (config.run_dir / "checkpoints").iterdir()] == [f"step_{done}"]
    for text in running.outputs():
        assert f"stopped by a signal after step {done}; everything is saved" in text


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_step_on_a_gpu_never_waits(small_world, tmp_path, monkeypatch):
    """PyTorch raises at an operation in which the host waits for the device."""
    train_step = Trainer.train_step

    def watched(trainer, step, *flags):
        if step.index < 2:  # kernels are compiled and loaded
            return train_step(trainer, step, *flags)
        torch.cuda.set_sync_debug_mode("error")
        try:
            return train_step(trainer, step, *flags)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(Trainer, "train_step", watched)
    train(small_config(small_world, tmp_path, precision="bf16", device="cuda"))
    assert len(losses(tmp_path)) == 6
