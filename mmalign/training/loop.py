"""The training loop: config -> data check -> model -> steps -> export.

A step's numbers are read, checked and logged when the next step has been launched, and before
anything is saved, so the host never waits for the step that it has just launched.
"""

import logging
import time
from contextlib import nullcontext

import torch

from mmalign import openmp
from mmalign.command import Stopped, StopSignal, reason
from mmalign.config import TrainConfig
from mmalign.data.dataset import ConversationDataset
from mmalign.data.loader import StepLoader, num_steps_of
from mmalign.distributed import DistributedContext, start_distributed
from mmalign.errors import UserError
from mmalign.evaluation.during_training import EvaluationDuringTraining
from mmalign.flops import Workload, step_flops
from mmalign.ownership import owned, require_names
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
from mmalign.training.guards import LossSpikeDetector, explain_non_finite
from mmalign.training.heartbeat import Heartbeat
from mmalign.training.inputs import RunInputs
from mmalign.training.memory.table import plan_run
from mmalign.training.metrics import Metrics
from mmalign.training.out_of_memory import explain_out_of_memory, memory_history
from mmalign.training.profile import StepProfiler, steps_to_profile
from mmalign.training.run_folder import FILES, FOLDERS, check_shared, write_config
from mmalign.training.step_result import StepNumbers, StepResult
from mmalign.training.telemetry import Telemetry
from mmalign.training.trainer import Trainer
from mmalign.training.warm_up import compiled_kernels
from mmalign.training.weights_and_biases import require_wandb
from mmalign.validation import validate

log = logging.getLogger("mmalign")


def train(config: TrainConfig) -> None:
    """Runs the stage that `config` describes, or resumes it from its latest checkpoint."""
    validate(config)
    require_wandb(config)
    timeout = config.parallel.timeout_minutes
    with (
        StopSignal() as stop,
        start_distributed(config.device, timeout) as ranks,
        memory_history(ranks.device),
    ):
        config = resolve(config)
        with owned(config.run_dir, "--run-dir", ranks):
            require_names(config.run_dir, FILES, FOLDERS)
            if ranks.is_main:
                log.info("%s", openmp.describe())
            tokenizer = Tokenizer.from_pretrained(config.model.tokenizer)
            dataset = build_dataset(config, tokenizer)
            config = plan_run(config, ranks, dataset)  # refuses what does not fit in memory
            with explain_out_of_memory(config, ranks), compiled_kernels(config, ranks, tokenizer):
                loop = build_loop(config, ranks, tokenizer, dataset, stop)
            loop.run()
            export(loop.trainer.model, config, tokenizer, ranks)


def build_loop(
    config: TrainConfig,
    ranks: DistributedContext,
    tokenizer: Tokenizer,
    dataset: ConversationDataset,
    stop: StopSignal,
) -> "TrainingLoop":
    """All that is read from files, the cheap checks first; the weights come last."""
    torch.manual_seed(config.seed)
    inputs = RunInputs(config.run_dir)
    with ranks.main_first():
        write_config(config)
    check_shared(config.run_dir, ranks)
    with ranks.main_first():
        if ranks.is_main:
            inputs.check(config, tokenizer)
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
    evaluation = None
    if config.evaluation.every:
        evaluation = EvaluationDuringTraining(config, ranks, tokenizer, report, num_steps, stop)
    run = ""
    if ranks.is_main:
        inputs.check_evaluation(config.evaluation)
        inputs.check_images(dataset, report)
        run = inputs.settle(config, num_steps)
    checkpoints = Checkpoints(
        config.run_dir / "checkpoints",
        config.checkpoint.keep,
        ranks,
        collective=config.parallel.is_sharded(ranks.world_size),
        facts={"run": ranks.broadcast_from_main(run), "precision": config.precision},
    )
    first_step = checkpoints.latest_step()
    prefix_ids = shared_prefix(config, report)
    loader = build_loader(config, dataset, report, ranks, num_steps, first_step, len(prefix_ids))
    trainer = Trainer(config, ranks, build_model(config, tokenizer, prefix_ids), num_steps)
    if ranks.is_main:
        checkpoints.check_disk(trainer.state())
    if first_step:
        trainer.resume(checkpoints, first_step)
        if ranks.is_main:
            log.info("resuming %s after step %d", config.run_dir, first_step)
    return TrainingLoop(trainer, loader, checkpoints, evaluation, first_step, stop)


class TrainingLoop:
    """Runs the trainer's steps over the loader; logs, evaluates and saves."""

    def __init__(
        self,
        trainer: Trainer,
        loader: StepLoader,
        checkpoints: Checkpoints,
        evaluation: EvaluationDuringTraining | None,
        first_step: int,
        stop: StopSignal,
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
        self.stop = stop
        self.metrics: Metrics | None = None
        if ranks.is_main:
            self.metrics = Metrics(config, first_step, trainer.num_steps)
        earlier = self.metrics.earlier_losses if self.metrics else ()
        self.spikes = LossSpikeDetector(config.loss_spike_factor, earlier)
        self.done = first_step  # the last step whose result the host has read
        self.pending: tuple[StepResult, float] | None = None  # not read yet; its data wait
        self.ended_at = time.perf_counter()  # of the last step and of what followed it

    def run(self) -> None:
        """All remaining steps. Saves before it leaves, whatever the reason."""
        with self.metrics or nullcontext():
            try:
                with self.stop.raising(False), self.heartbeat, self.telemetry:
                    if self.evaluation:
                        self.evaluation.catch_up(self.first_step, self.trainer.model)
                    with self.profiler:
                        self._run_steps()
                    self._save()
                    self.checkpoints.finish()
                    self._warn_if_all_skipped()
                    if self.ranks.any(self.stop.requested):
                        raise Stopped("after the last step")
            except CheckpointError:
                raise
            except Stopped:
                self.checkpoints.wait()
                raise
            except BaseException as error:
                unsaved = self._save_before_leaving()
                if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
                    raise UserError(
                        f"after step {self.done}: {reason(error)}. {unsaved}"
                        f"{self.checkpoints.what_remains()} Fix this and rerun the same command "
                        "to resume."
                    ) from error
                if unsaved:
                    log.error("%s%s", unsaved, self.checkpoints.what_remains())
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
            raise Stopped(f"after step {self.done}")

    def _check_finite(self, result: StepResult, numbers: StepNumbers) -> None:
        trainer = self.trainer
        try:
            trainer.guard.check(result.number, numbers, result.step.sample_ids)
        except UserError as error:
            if trainer.guard.stops_run:
                self.pending = None  # the guard is closed: later steps change nothing either
            else:
                self.done = result.number
            # an update in the backward pass has applied the finite gradients of this step
            trainer.updating = self.config.optimizer.update_in_backward
            if not trainer.updating:
                self._save()
            self.checkpoints.finish()
            advice = explain_non_finite(trainer.model) if trainer.guard.stops_run else ""
            raise UserError(f"{error}{advice} {self.checkpoints.what_remains()}") from error

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
        return record

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
        """After the step is saved: a signal ends the evaluation at once."""
        assert self.evaluation is not None
        self._save()
        self.heartbeat.at(number, "evaluating")
        self.evaluation.after(number, self.trainer.model)
        if self.metrics:
            self.metrics.amend(self.evaluation.scores)
        self.ended_at = time.perf_counter()

    def _save(self) -> None:
        """Begins to save the state after the last step; it is written while the loop goes on."""
        self._flush()
        self.heartbeat.at(self.done, "saving")
        self.checkpoints.start(self.done, self.trainer.state())
        self.ended_at = time.perf_counter()

    def _save_before_leaving(self) -> str:
        """After an error. Unsharded, every rank holds the whole state, so it saves alone.

        Returns a sentence on what could not be saved, or nothing.
        """
        try:
            self.checkpoints.wait()
            if self.trainer.parallel.sharded:  # no rank can save without the others
                unsaved = self.done != self.checkpoints.newest
                return f"Step {self.done} could not be saved. " if unsaved else ""
            self._flush()
            saved = (self.first_step, self.checkpoints.newest)
            if not self.trainer.updating and self.done not in saved:
                self.checkpoints.save_alone(self.done, self.trainer.state())
        except Stopped:  # a pending step asked for it, and is saved
            pass
        except (UserError, OSError, RuntimeError) as error:  # the first error is the one to show
            return f"Step {self.done} could not be saved ({error}). "
        return ""
