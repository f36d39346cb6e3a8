"""The training loop: config -> data check -> model -> steps -> export.

A step's numbers are read, checked and logged when the next step has been launched, and before
anything is saved, so the host never waits for the step that it has just launched.
"""

import logging
import time
from contextlib import nullcontext

import torch

from mmalign.config import TrainConfig
from mmalign.data.loader import StepLoader, num_steps_of
from mmalign.distributed import DistributedContext, start_distributed
from mmalign.errors import UserError
from mmalign.evaluation.during_training import EvaluationDuringTraining
from mmalign.flops import Workload, step_flops
from mmalign.tokenizer import Tokenizer
from mmalign.training.build import (
    build_dataset,
    build_loader,
    build_model,
    check_data,
    resolve,
    shared_prefix,
)
from mmalign.training.checkpoint import CheckpointError, Checkpoints
from mmalign.training.export import export
from mmalign.training.guards import LossSpikeDetector, Stopped, StopSignal
from mmalign.training.heartbeat import Heartbeat
from mmalign.training.memory.table import plan_run
from mmalign.training.metrics import Metrics
from mmalign.training.out_of_memory import explain_out_of_memory, memory_history
from mmalign.training.profile import StepProfiler, steps_to_profile
from mmalign.training.run_folder import check_shared, write_config
from mmalign.training.step_result import StepNumbers, StepResult
from mmalign.training.telemetry import Telemetry
from mmalign.training.trainer import Trainer
from mmalign.validation import validate

log = logging.getLogger("mmalign")


def train(config: TrainConfig) -> None:
    """Runs the stage that `config` describes, or resumes it from its latest checkpoint."""
    validate(config)
    timeout = config.parallel.timeout_minutes
    with start_distributed(config.device, timeout) as ranks, memory_history(ranks.device):
        config = plan_run(resolve(config), ranks)  # refuses what does not fit in memory
        tokenizer = Tokenizer.from_pretrained(config.model.tokenizer)
        with explain_out_of_memory(config, ranks):
            loop = build_loop(config, ranks, tokenizer)
        loop.run()
        export(loop.trainer.model, config, tokenizer, ranks)


def build_loop(
    config: TrainConfig, ranks: DistributedContext, tokenizer: Tokenizer
) -> "TrainingLoop":
    """All that is read from files, the cheap checks first; the weights come last."""
    torch.manual_seed(config.seed)
    with ranks.main_first():
        write_config(config)
    check_shared(config.run_dir, ranks)
    dataset = build_dataset(config, tokenizer)
    report = check_data(config, dataset, ranks)
    num_steps = config.num_steps or num_steps_of(
        len(report.kept), config.global_batch_size, config.num_epochs
    )
    if num_steps == 1 and config.optimizer.warmup_ratio and ranks.is_main:
        log.warning(
            "the only step has learning rate 0, with which warm-up begins, so nothing is learned: "
            "raise --num-steps, or set --optimizer.warmup-ratio 0"
        )
    steps_to_profile(config.profile, num_steps)
    checkpoints = Checkpoints(
        config.run_dir / "checkpoints",
        config.checkpoint.keep,
        ranks,
        collective=config.parallel.is_sharded(ranks.world_size),
    )
    first_step = checkpoints.latest_step()
    prefix_ids = shared_prefix(config, report)
    loader = build_loader(config, dataset, report, ranks, num_steps, first_step, len(prefix_ids))
    evaluation = None
    if config.evaluation.every:
        evaluation = EvaluationDuringTraining(config, ranks, tokenizer, report, num_steps)
    trainer = Trainer(config, ranks, build_model(config, tokenizer, prefix_ids), num_steps)
    if ranks.is_main:
        checkpoints.check_disk(trainer.state())
    if first_step:
        trainer.resume(checkpoints, first_step)
        if ranks.is_main:
            log.info("resuming %s after step %d", config.run_dir, first_step)
    return TrainingLoop(trainer, loader, checkpoints, evaluation, first_step)


class TrainingLoop:
    """Runs the trainer's steps over the loader; logs, evaluates and saves."""

    def __init__(
        self,
        trainer: Trainer,
        loader: StepLoader,
        checkpoints: Checkpoints,
        evaluation: EvaluationDuringTraining | None,
        first_step: int,
    ):
        """first_step: optimizer steps that the trainer's weights have behind them."""
        config, ranks, model = trainer.config, trainer.ranks, trainer.model
        self.trainer, self.loader, self.checkpoints = trainer, loader, checkpoints
        self.evaluation, self.first_step = evaluation, first_step
        self.config, self.ranks = config, ranks
        vision = model.vision_tower.config if model.vision_tower else None
        self.workload = Workload.from_config(config, model.decoder.config, vision)
        self.profiler = StepProfiler(trainer, self.workload, first_step)
        self.telemetry = Telemetry(config, ranks)
        self.heartbeat = Heartbeat(ranks, config.parallel.timeout_minutes)
        self.stop = StopSignal()
        self.metrics: Metrics | None = None
        if ranks.is_main:
            name, num_steps = config.stage, trainer.num_steps
            self.metrics = Metrics(config.run_dir, name, first_step, num_steps, config.tensorboard)
        earlier = self.metrics.earlier_losses if self.metrics else ()
        self.spikes = LossSpikeDetector(config.loss_spike_factor, earlier)
        self.done = first_step  # the last step whose result the host has read
        self.pending: tuple[StepResult, float] | None = None  # not read yet; its data wait
        self.ended_at = time.perf_counter()  # of the last step and of what followed it

    def run(self) -> None:
        """All remaining steps. Saves before it leaves, whatever the reason."""
        with self.stop, self.metrics or nullcontext():
            try:
                with self.heartbeat, self.telemetry:
                    if self.evaluation:
                        self.evaluation.catch_up(self.first_step, self.trainer.model)
                    with self.profiler:
                        self._run_steps()
                    self._save()
                    self.checkpoints.finish()
                    self._warn_if_all_skipped()
            except CheckpointError:
                raise
            except BaseException:
                self._save_before_leaving()
                raise

    def _run_steps(self) -> None:
        every = self.config.checkpoint.every
        self.heartbeat.at(self.first_step + 1, "waiting for data")
        self.ended_at = waiting_since = time.perf_counter()
        for step in self.loader:
            data_seconds = time.perf_counter() - waiting_since
            number = step.index + 1  # as in metrics.jsonl
            self.heartbeat.at(number, "computing")
            with explain_out_of_memory(self.config, self.ranks, step):
                result = self.trainer.train_step(step, self.stop.requested, self.checkpoints.failed)
            previous, self.pending = self.pending, (result, data_seconds)
            self._read(previous)
            if self.evaluation and self.evaluation.is_due(number):
                self._evaluate(number)
            if every and number % every == 0:
                self._save()
            self.profiler.step_done(step)
            self.heartbeat.at(number + 1, "waiting for data")
            waiting_since = time.perf_counter()

    # ---- a step's numbers ----

    def _read(self, pending: tuple[StepResult, float] | None) -> None:
        """Waits for a step's numbers, logs them, and acts on its flags."""
        if pending is None:
            return
        result, data_seconds = pending
        self.heartbeat.at(result.number, "waiting for the result")
        numbers = result.wait()
        self._check_finite(result, numbers)
        self.done = result.number
        if self.metrics:
            self.metrics.log(self._record(result, numbers, data_seconds))
        if numbers.save_failed:
            self.checkpoints.wait()
            raise CheckpointError("another rank could not write a checkpoint: see its log")
        if numbers.stop:
            self._save()
            self.checkpoints.finish()
            raise Stopped(
                f"stopped by a signal after step {self.done}; everything is saved. "
                "Rerun the same command to resume."
            )

    def _check_finite(self, result: StepResult, numbers: StepNumbers) -> None:
        trainer = self.trainer
        try:
            trainer.guard.check(result.number, numbers, result.step.sample_ids)
        except UserError:
            if trainer.guard.stops_run:
                self.pending = None  # the guard is closed: later steps change nothing either
            else:
                self.done = result.number
            # an update in the backward pass has applied the finite gradients of this step
            trainer.updating = self.config.optimizer.update_in_backward
            if not trainer.updating:
                self._save()
            self.checkpoints.finish()
            raise

    def _record(self, result: StepResult, numbers: StepNumbers, data_seconds: float) -> dict:
        """The step's line of metrics.jsonl."""
        step, seconds = result.step, result.ready_at - self.ended_at
        self.ended_at = result.ready_at
        record = {
            "step": result.number,
            "loss": numbers.loss,
            "grad_norm": numbers.gradient_norm,
            "learning_rate": result.learning_rate,
            "tokens": step.num_tokens,
            "loss_tokens": step.num_loss_tokens,
            "samples": len(step.sample_ids),
            "micro_batches": len(step.batches),
            "seconds": seconds,
            "data_wait_seconds": data_seconds,
            **self.telemetry.record(
                tokens=step.num_tokens,
                samples=len(step.sample_ids),
                flops=step_flops(self.workload, step.batches).total,
                seconds=seconds,
                data_seconds=data_seconds,
            ),
        }
        if not numbers.finite:
            record["skipped"] = True
        elif self.spikes.update(result.number, numbers.loss, step.sample_ids):
            record["loss_spike"] = True
        return record | (self.evaluation.fields(result.number) if self.evaluation else {})

    def _warn_if_all_skipped(self) -> None:
        num_skipped = self.trainer.guard.num_skipped  # the last ones in a row
        if num_skipped and num_skipped == self.done - self.first_step and self.metrics:
            log.warning(
                "all %d steps were skipped: the weights are those that training began with. "
                "Lower --optimizer.learning-rate, or inspect the samples named above",
                num_skipped,
            )

    def _flush(self) -> None:
        """Reads the pending step, if there is one."""
        pending, self.pending = self.pending, None
        self._read(pending)

    # ---- between steps ----

    def _evaluate(self, number: int) -> None:
        assert self.pending is not None and self.evaluation is not None
        self.pending[0].wait()  # the evaluation is not part of the step's time
        self.heartbeat.at(number, "evaluating")
        self.evaluation.after(number, self.trainer.model)
        self._flush()
        self.ended_at = time.perf_counter()

    def _save(self) -> None:
        """Begins to save the state after the last step; it is written while the loop goes on."""
        self._flush()
        self.heartbeat.at(self.done, "saving")
        self.checkpoints.start(self.done, self.trainer.state())
        self.ended_at = time.perf_counter()

    def _save_before_leaving(self) -> None:
        """After an error. Unsharded, every rank holds the whole state, so it saves alone."""
        try:
            self.checkpoints.wait()
            if self.trainer.parallel.sharded:  # no rank can save without the others
                if self.done != self.checkpoints.newest:
                    remains = self.checkpoints.what_remains()
                    log.error("step %d could not be saved. %s", self.done, remains)
                return
            self._flush()
            saved = (self.first_step, self.checkpoints.newest)
            if not self.trainer.updating and self.done not in saved:
                self.checkpoints.save_alone(self.done, self.trainer.state())
        except Stopped:  # a pending step asked for it, and is saved
            return
        except (UserError, OSError, RuntimeError) as error:  # the first error is the one to show
            log.error("could not save step %d: %s", self.done, error)
