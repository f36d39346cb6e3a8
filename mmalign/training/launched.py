"""A step whose work is on its way to the device."""

from dataclasses import dataclass

from mmalign.data.loader import Step
from mmalign.flops import Workload, step_flops
from mmalign.training.readout import Readout
from mmalign.training.telemetry import Telemetry


@dataclass(frozen=True)
class Launched:
    step: Step
    learning_rate: float
    data_seconds: float
    readout: Readout  # loss, gradient norm, allowed, stop, failed

    @property
    def number(self) -> int:
        """Counted from 1, as in metrics.jsonl."""
        return self.step.index + 1

    def record(
        self, loss: float, norm: float, began: float, telemetry: Telemetry, workload: Workload
    ) -> dict:
        """The step's line of metrics.jsonl; began: when the step before was over."""
        step, seconds = self.step, self.readout.ready_at - began
        return {
            "step": self.number,
            "loss": loss,
            "grad_norm": norm,
            "learning_rate": self.learning_rate,
            "tokens": step.num_tokens,
            "loss_tokens": step.num_loss_tokens,
            "samples": len(step.sample_ids),
            "micro_batches": len(step.batches),
            "seconds": seconds,
            "data_wait_seconds": self.data_seconds,
            **telemetry.record(
                tokens=step.num_tokens,
                samples=len(step.sample_ids),
                flops=step_flops(workload, step).total,
                seconds=seconds,
                data_seconds=self.data_seconds,
            ),
        }
