"""What an optimizer step returns: its numbers, on their way from the device to the host."""

import time
from typing import NamedTuple

import torch
from torch import Tensor

from mmalign.data.loader import Step


class StepNumbers(NamedTuple):
    """Over all ranks. The last three are flags, 1.0 or 0.0."""

    loss: float  # token mean of the step's global batch
    gradient_norm: float  # before clipping
    finite: float  # the step changed the weights
    stop: float  # a rank was asked to stop
    save_failed: float  # a rank could not write a checkpoint


class StepResult:
    """Begins the copy to the host; `wait` is called one step later, so the host runs ahead."""

    def __init__(self, step: Step, learning_rate: float, numbers: Tensor):
        """numbers (5,), those of StepNumbers, on any device."""
        self.step, self.learning_rate = step, learning_rate
        self.ready_at = time.perf_counter()
        self.copied: torch.cuda.Event | None = None
        self.numbers = numbers
        if numbers.is_cuda:
            self.numbers = torch.empty_like(numbers, device="cpu", pin_memory=True)
            self.numbers.copy_(numbers, non_blocking=True)
            self.copied = torch.cuda.Event()
            self.copied.record()

    @property
    def number(self) -> int:
        """The step counted from 1, as in metrics.jsonl."""
        return self.step.index + 1

    def wait(self) -> StepNumbers:
        """Blocks until the step has finished; from then on ready_at is when it did."""
        if self.copied is not None:
            self.copied.synchronize()
            self.ready_at, self.copied = time.perf_counter(), None
        return StepNumbers(*self.numbers.tolist())
