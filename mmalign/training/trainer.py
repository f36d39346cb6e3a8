"""The training loop of both stages.

config -> data check -> model -> steps (micro-batches -> loss -> gradients -> AdamW) -> export

The host never waits for the step that it has just launched: a step's numbers are read, checked and
logged when the next one is on its way, and before anything is saved.
"""

import logging
import time

import torch

from mmalign.config import TrainConfig
from mmalign.data.check import CheckReport, check_samples
from mmalign.data.loader import Step, StepLoader, num_steps_of, timed
from mmalign.distributed import Ranks, start_ranks
from mmalign.errors import UserError
from mmalign.evaluation.during_training import EvaluationDuringTraining
from mmalign.flops import Workload
from mmalign.tokenizer import Tokenizer
from mmalign.training.build import build_dataset, build_model, resolve, sample_cost
from mmalign.training.checkpoint import CheckpointError, Checkpoints
from mmalign.training.export import export
from mmalign.training.guards import LossWatch, UpdateGate
from mmalign.training.heartbeat import Heartbeat
from mmalign.training.launched import Launched
from mmalign.training.memory.table import plan_run
from mmalign.training.metrics import Metrics
from mmalign.training.optimizer import AdamW
from mmalign.training.out_of_memory import explain_out_of_memory, memory_history
from mmalign.training.profile import StepProfiler
from mmalign.training.profile.ranges import stage
from mmalign.training.readout import Readout
from mmalign.training.run_folder import check_shared, write_config
from mmalign.training.schedule import learning_rate_at
from mmalign.training.sharding import ParallelModel, is_sharded
from mmalign.training.shortcuts import frozen_prefix
from mmalign.training.stop_signal import Stopped, StopSignal
from mmalign.training.telemetry import Telemetry

log = logging.getLogger("mmalign")


def train(config: TrainConfig) -> None:
    """Runs the stage that `config` describes, or continues it from its latest checkpoint."""
    timeout = config.parallel.timeout_minutes
    with start_ranks(config.device, timeout) as ranks, memory_history(ranks.device):
        config = plan_run(resolve(config), ranks)  # refuses what the memory cannot hold
        with explain_out_of_memory(config, ranks):
            trainer = Trainer(config, ranks)
        trainer.run()
        export(trainer.model, config, trainer.tokenizer, ranks)


class Trainer:
    def __init__(self, config: TrainConfig, ranks: Ranks):
        self.config, self.ranks = config, ranks
        torch.manual_seed(config.seed)
        with ranks.main_first():
            write_config(config)
        check_shared(config.run_dir, ranks)
        self.tokenizer = Tokenizer.from_pretrained(config.model.tokenizer)
        self.dataset = build_dataset(config, self.tokenizer)
        with ranks.main_first():
            self.report = self._check_data()
        self.num_steps = config.num_steps or num_steps_of(
            len(self.report.kept), config.global_batch_size, config.num_epochs
        )
        folder, sharded = config.run_dir / "checkpoints", is_sharded(config.parallel, ranks)
        self.checkpoints = Checkpoints(folder, config.checkpoint.keep, ranks, collective=sharded)
        self.first_step = self.checkpoints.latest_step()
        self.profiler = StepProfiler(config, self.num_steps, self.first_step, ranks)
        self.prefix_ids = frozen_prefix(config, self.report)
        self.loader = self._loader()  # refuses what does not fit before any weight is read
        self.evaluation = None
        if config.evaluation.every:
            self.evaluation = EvaluationDuringTraining(
                config, ranks, self.tokenizer, self.report, self.num_steps
            )
        self.model = build_model(config, self.tokenizer, self.prefix_ids)
        self.workload = Workload.of(self.model, config)
        self.telemetry = Telemetry(config, ranks)
        self.parallel = ParallelModel(self.model, config, ranks)
        self.optimizer = AdamW(
            self.model.trainable_parameters(), config.optimizer, config.seed, ranks.world_size
        )
        self.gate = UpdateGate(config.on_non_finite, ranks.device)
        self.heartbeat = Heartbeat(ranks, config.parallel.timeout_minutes)
        self._resume()

    # ---- before the first step ----

    def _check_data(self) -> CheckReport:
        report = check_samples(
            self.dataset, self.config.run_dir / "data_check.npz", progress=self.ranks.is_main
        )
        if report.skipped and self.ranks.is_main:
            log.warning("%d samples skipped (listed in skipped_samples.txt)", len(report.skipped))
            lines = "".join(f"{error}\n" for error in report.skipped)
            (self.config.run_dir / "skipped_samples.txt").write_text(lines)
        return report

    def _resume(self) -> None:
        state = self.optimizer.state()
        if self.ranks.is_main:
            self.checkpoints.check_disk(state)
        if self.first_step:
            self.checkpoints.load(self.first_step, state)
            self.optimizer.step_count = self.first_step
            if self.ranks.is_main:
                log.info("continuing %s after step %d", self.config.run_dir, self.first_step)

    # ---- the loop ----

    def run(self) -> None:
        """All remaining steps. Saves before it leaves, for whatever reason it leaves."""
        self.done = self.first_step  # steps behind the weights, as far as the host has seen
        self.updating = False  # true while the weights are between two steps
        self.in_flight: Launched | None = None
        self.stop = StopSignal()
        self.metrics = self._metrics() if self.ranks.is_main else None
        earlier = self.metrics.earlier_losses if self.metrics else ()
        self.watch = LossWatch(self.config.loss_spike_factor, earlier)
        try:
            with self.heartbeat, self.telemetry, self.profiler:
                if self.evaluation:
                    self.evaluation.catch_up(self.first_step, self.model)
                self._run_steps()
                self._save()
                self.checkpoints.finish()
        except CheckpointError:
            raise
        except BaseException:
            self._save_before_leaving()
            raise
        finally:
            self.stop.restore()
            if self.metrics:
                self.metrics.close()

    def _run_steps(self) -> None:
        every = self.config.checkpoint.every
        self.over_at = time.perf_counter()  # when the last step was over, or what followed it
        self.heartbeat.at(self.first_step + 1, "waiting for data")
        for step, data_seconds in self.profiler.watch(timed(self.loader), self.model):
            self.heartbeat.at(step.index + 1, "computing")
            with explain_out_of_memory(self.config, self.ranks, step):
                launched = self.train_step(step, data_seconds)
            before, self.in_flight = self.in_flight, launched
            self._read(before)
            if self.evaluation and self.evaluation.is_due(launched.number):
                self._evaluate(launched)
            if every and launched.number % every == 0:
                self._save()
            self.heartbeat.at(launched.number + 1, "waiting for data")

    def train_step(self, step: Step, data_seconds: float) -> Launched:
        """Launches one optimizer step on exactly the samples of `step`."""
        # dropout is a function of the step, so a continued run draws the same masks
        torch.manual_seed(hash((self.config.seed, step.index, self.ranks.rank)) % 2**63)
        optimizer = self.config.optimizer
        learning_rate = learning_rate_at(
            step.index, self.num_steps, optimizer.learning_rate, optimizer.warmup_ratio
        )
        numbers = self._loss_and_gradients(step, learning_rate)
        loss, stop, failed = self.ranks.sum(numbers).unbind()
        with stage("gradient norm"):
            norm = self.optimizer.gradient_norm()
        allowed = self.gate.allows(loss, norm)
        self.updating = True
        with stage("optimizer"):
            self.optimizer.step(learning_rate, norm, allowed)
            self.optimizer.zero_grad()
        self.updating = False
        readout = Readout(torch.stack((loss, norm, allowed.float(), stop, failed)))
        return Launched(step, learning_rate, data_seconds, readout)

    def _loss_and_gradients(self, step: Step, learning_rate: float) -> torch.Tensor:
        """(3,) of this process: share of the loss, whether to stop, whether a save has failed.

        The flags travel with the loss, so that all processes act on them after the same step.
        """
        numbers = torch.zeros(3, device=self.ranks.device)
        if self.stop.requested:
            numbers[1].fill_(1.0)
        if self.checkpoints.failed:
            numbers[2].fill_(1.0)
        for i, batch in enumerate(step.batches):
            last = i == len(step.batches) - 1
            if last and self.config.optimizer.update_in_backward:
                self.updating = True
                self.optimizer.arm(learning_rate, self.gate.open)
            numbers[0] += self.parallel.backward(batch, step.num_loss_tokens, last)
        return numbers

    def _read(self, launched: Launched | None) -> None:
        """Waits for a step's numbers, logs them, and does what they ask for."""
        if launched is None:
            return
        self.heartbeat.at(launched.number, "waiting for the result")
        loss, norm, allowed, stop, failed = launched.readout.wait()
        ids = launched.step.sample_ids
        try:
            self.gate.check(launched.number, loss, norm, bool(allowed), ids)
        except UserError:
            if self.gate.stops:
                self.in_flight = None  # the gate is shut: later steps change nothing either
            else:
                self.done = launched.number
            # an update in the backward pass has taken what was finite of the step
            self.updating = self.config.optimizer.update_in_backward
            if not self.updating:
                self._save()
            self.checkpoints.finish()
            raise
        self.done = launched.number
        if self.metrics:
            self._log(launched, loss, norm, bool(allowed))
        if failed:
            self.checkpoints.wait()
            raise CheckpointError("another process could not write a checkpoint: see its message")
        if stop:
            self._save()
            self.checkpoints.finish()
            raise Stopped(
                f"stopped by a signal after step {self.done}; everything is saved. "
                "The same command continues."
            )

    def _evaluate(self, launched: Launched) -> None:
        launched.readout.wait()  # what follows is not the step's time
        self.heartbeat.at(launched.number, "evaluating")
        self.evaluation.after(launched.number, self.model)
        self._flush()
        self.over_at = time.perf_counter()

    def _flush(self) -> None:
        """Reads the step in flight, if there is one."""
        launched, self.in_flight = self.in_flight, None
        self._read(launched)

    def _log(self, launched: Launched, loss: float, norm: float, allowed: bool) -> None:
        record = launched.record(loss, norm, self.over_at, self.telemetry, self.workload)
        self.over_at = launched.readout.ready_at
        if not allowed:
            record["skipped"] = True
        elif self.watch.see(launched.number, loss, launched.step.sample_ids):
            record["loss_spike"] = True
        if self.evaluation:
            record |= self.evaluation.fields(launched.number)
        self.metrics.log(record)

    def _save(self) -> None:
        """Begins to save the state after the last step; it is written while the loop goes on."""
        self._flush()
        self.heartbeat.at(self.done, "saving")
        self.checkpoints.start(self.done, self.optimizer.state())
        self.over_at = time.perf_counter()

    def _save_before_leaving(self) -> None:
        """After an error. Unsharded, every process holds the whole state, so it saves it alone."""
        try:
            self.checkpoints.wait()
            if self.parallel.sharded:  # no process can save without the others
                if self.done != self.checkpoints.newest:
                    remains = self.checkpoints.what_remains()
                    log.error("step %d could not be saved. %s", self.done, remains)
                return
            self._flush()
            if not self.updating and self.done not in (self.first_step, self.checkpoints.newest):
                self.checkpoints.save_alone(self.done, self.optimizer.state())
        except (UserError, OSError, RuntimeError) as error:  # the first error is the one to show
            log.error("could not save step %d: %s", self.done, error)

    # ---- what the loop is made of ----

    def _loader(self) -> StepLoader:
        config = self.config
        return StepLoader(
            self.dataset,
            self.report,
            global_batch_size=config.global_batch_size,
            micro_batch_tokens=config.micro_batch_tokens,
            seed=config.seed,
            num_steps=self.num_steps,
            start_step=self.first_step,
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
            require_images=config.stage == "pretrain",
            prefix_length=len(self.prefix_ids),
            cost=sample_cost(config, len(self.prefix_ids)),
        )

    def _metrics(self) -> Metrics:
        config = self.config
        return Metrics(
            config.run_dir, config.stage, self.first_step, self.num_steps, config.tensorboard
        )
