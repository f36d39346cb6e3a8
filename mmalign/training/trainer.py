"""The training loop of both stages.

config -> data check -> model -> steps (micro-batches -> loss -> gradients -> AdamW) -> export
"""

import logging
import math
import time
import warnings
from dataclasses import replace
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

from mmalign.config import TrainConfig
from mmalign.data.check import CheckReport, check_samples
from mmalign.data.loader import Step, StepLoader, num_steps_of
from mmalign.data.packing import PackedBatch
from mmalign.errors import UserError
from mmalign.model.hf_weights import export_llama, export_llava, save_projector
from mmalign.model.llava import Llava
from mmalign.tokenizer import Tokenizer
from mmalign.training.build import build_dataset, build_model, resolve
from mmalign.training.checkpoint import Checkpoints
from mmalign.training.flops import Workload, step_flops
from mmalign.training.metrics import Metrics
from mmalign.training.optimizer import AdamW
from mmalign.training.out_of_memory import explain_out_of_memory, memory_history
from mmalign.training.parallel import Ranks, start_ranks
from mmalign.training.profiler import StepProfiler
from mmalign.training.ranges import stage
from mmalign.training.run_folder import write_config
from mmalign.training.schedule import learning_rate_at
from mmalign.training.stop_signal import StopSignal
from mmalign.training.telemetry import Telemetry

log = logging.getLogger("mmalign")


def train(config: TrainConfig) -> None:
    """Runs the stage that `config` describes, or continues it from its latest checkpoint."""
    timeout = config.parallel.timeout_minutes
    with start_ranks(config.device, timeout) as ranks, memory_history(ranks.device):
        config = resolve(config)
        with explain_out_of_memory(config, ranks):
            trainer = Trainer(config, ranks)
        trainer.run()
        trainer.export()


class Trainer:
    def __init__(self, config: TrainConfig, ranks: Ranks):
        self.config, self.ranks = config, ranks
        torch.manual_seed(config.seed)
        with ranks.main_first():
            write_config(config)
        self.tokenizer = Tokenizer.from_pretrained(config.model.tokenizer)
        self.dataset = build_dataset(config, self.tokenizer)
        with ranks.main_first():
            self.report = self._check_data()
        self.num_steps = config.num_steps or num_steps_of(
            len(self.report.kept), config.global_batch_size, config.num_epochs
        )
        self.checkpoints = Checkpoints(config.run_dir / "checkpoints", config.checkpoint.keep)
        self.first_step = self.checkpoints.latest_step()
        self.profiler = StepProfiler(config, self.num_steps, self.first_step, ranks)
        self.loader = self._loader()  # refuses what does not fit before any weight is read
        self.model = build_model(config, self.tokenizer).to(ranks.device)
        self.workload = Workload.of(self.model, config)
        self.telemetry = Telemetry(config, ranks)
        self.optimizer = AdamW(self.model.trainable_parameters(), config.optimizer)
        self._resume()
        self.replica = self.model
        if ranks.world_size > 1:
            self.replica = _data_parallel(self.model)

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
        if self.first_step == 0:
            if self.ranks.is_main:
                self.checkpoints.check_disk(state)
            return
        self.checkpoints.load(self.first_step, state)
        self.optimizer.step_count = self.first_step
        if self.ranks.is_main:
            log.info("continuing %s after step %d", self.config.run_dir, self.first_step)

    # ---- the loop ----

    def run(self) -> None:
        """All remaining steps. Saves before it leaves, for whatever reason it leaves."""
        self.done = self.first_step  # optimizer steps that the weights have behind them
        self.updating = False  # true while the weights are between two steps
        metrics = self._metrics() if self.ranks.is_main else None
        stop = StopSignal()
        try:
            with self.telemetry, self.profiler:
                self._run_steps(metrics, stop)
            self._save()
        except BaseException:
            self._save_before_leaving()
            raise
        finally:
            stop.restore()
            if metrics:
                metrics.close()

    def _run_steps(self, metrics: Metrics | None, stop: StopSignal) -> None:
        for step, data_seconds in self.profiler.watch(timed(self.loader), self.model):
            with explain_out_of_memory(self.config, self.ranks, step):
                record = self.train_step(step, data_seconds)
            if metrics:
                metrics.log(record)
            if self.ranks.any(stop.requested):
                self._save()
                raise UserError(
                    f"stopped by a signal after step {self.done}; everything is saved. "
                    "The same command continues."
                )
            if self.config.checkpoint.every and self.done % self.config.checkpoint.every == 0:
                self._save()

    def train_step(self, step: Step, data_seconds: float) -> dict:
        """One optimizer step on exactly the samples of `step`; its line of metrics.jsonl."""
        started = time.perf_counter()
        # dropout is a function of the step, so a continued run draws the same masks
        torch.manual_seed(hash((self.config.seed, step.index, self.ranks.rank)) % 2**63)
        loss_value = self.ranks.sum(self._loss_and_gradients(step)).item()
        if not math.isfinite(loss_value):
            raise UserError(
                f"the loss of step {step.index + 1} is {loss_value}. Its samples: "
                f"{', '.join(step.sample_ids)}. Look at them with scripts/preview_batch.py, or "
                "lower --optimizer.learning-rate; the weights before this step are saved."
            )
        optimizer = self.config.optimizer
        learning_rate = learning_rate_at(
            step.index, self.num_steps, optimizer.learning_rate, optimizer.warmup_ratio
        )
        with stage("gradient norm"):
            gradient_norm = self.optimizer.gradient_norm()
        self.updating = True
        with stage("optimizer"):
            self.optimizer.step(learning_rate, gradient_norm)
            self.optimizer.zero_grad()
        self.done, self.updating = step.index + 1, False
        gradient_norm_value = gradient_norm.item()  # waits for the device: the step is over
        seconds = time.perf_counter() - started + data_seconds
        return {
            "step": self.done,
            "loss": loss_value,
            "grad_norm": gradient_norm_value,
            "learning_rate": learning_rate,
            "tokens": step.num_tokens,
            "loss_tokens": step.num_loss_tokens,
            "samples": len(step.sample_ids),
            "micro_batches": len(step.batches),
            "seconds": seconds,
            "data_wait_seconds": data_seconds,
            **self.telemetry.record(
                tokens=step.num_tokens,
                samples=len(step.sample_ids),
                flops=step_flops(self.workload, step).total,
                seconds=seconds,
                data_seconds=data_seconds,
            ),
        }

    def _loss_and_gradients(self, step: Step) -> torch.Tensor:
        """This process's share of the step's loss, a 0-dim tensor; its gradients are summed."""
        loss = torch.zeros((), device=self.ranks.device)
        for i, batch in enumerate(step.batches):
            self._synchronise_gradients(last=i == len(step.batches) - 1)
            with stage("copy to device"):
                batch = to_device(batch, self.ranks.device)
            with stage("forward"):
                # the mean over every supervised token of the global batch, not a mean of means
                share = self.replica(batch) / step.num_loss_tokens
            with stage("backward"):
                # DDP averages over the ranks, so each rank's share is scaled up by their number
                (share * self.ranks.world_size).backward()
            loss += share.detach()
        return loss

    def _synchronise_gradients(self, last: bool) -> None:
        if isinstance(self.replica, DistributedDataParallel):
            self.replica.require_backward_grad_sync = last  # one reduction a step

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
        )

    def _metrics(self) -> Metrics:
        return Metrics(
            self.config.run_dir,
            self.config.stage,
            self.first_step,
            self.num_steps,
            self.config.tensorboard,
        )

    def _save(self) -> None:
        if self.ranks.is_main:
            self.checkpoints.save(self.done, self.optimizer.state())
        self.ranks.barrier()

    def _save_before_leaving(self) -> None:
        """After an error: every rank holds the same state, so the failing one saves it alone."""
        if self.updating or self.done == self.first_step:
            return
        try:
            self.checkpoints.save(self.done, self.optimizer.state())
        except (UserError, FileExistsError, OSError) as error:  # the first error is the one to show
            log.error("could not save step %d: %s", self.done, error)

    # ---- after the last step ----

    def export(self) -> None:
        """Hugging Face folders and the projector, under run_dir/export."""
        if self.ranks.is_main:
            folder = self.config.run_dir / "export"
            try:
                self._write_export(folder)
            except OSError as error:
                raise UserError(
                    f"{folder} could not be written: {error}. All {self.num_steps} steps are safe "
                    "in the last checkpoint; free some space and give the same command again."
                ) from error
            log.info("exported to %s", folder)
        self.ranks.barrier()

    def _write_export(self, folder: Path) -> None:
        if not self.config.data.text_only:
            save_projector(self.model, folder / "projector.safetensors")
        if self.config.stage == "finetune":
            export_llama(self.model, folder / "llama", self.tokenizer)
            if not self.config.data.text_only:
                export_llava(self.model, folder / "llava", self.tokenizer)


def _data_parallel(model: Llava) -> DistributedDataParallel:
    with warnings.catch_warnings():  # torch 2.13 renamed broadcast_buffers, 2.11 has no other name
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        # the buffers are constants: every process has made its own
        return DistributedDataParallel(model, gradient_as_bucket_view=True, broadcast_buffers=False)


def to_device(batch: PackedBatch, device: torch.device) -> PackedBatch:
    if device.type == "cpu":
        return batch
    tensors = {
        name: value.to(device, non_blocking=True)
        for name, value in vars(batch).items()
        if isinstance(value, torch.Tensor)
    }
    return replace(batch, **tensors)


def timed(steps: StepLoader):
    """Each item with the seconds that it was waited for."""
    iterator = iter(steps)
    while True:
        started = time.perf_counter()
        step = next(iterator, None)
        if step is None:
            return
        yield step, time.perf_counter() - started
