"""Steps that must not change the weights, and losses worth a look."""

import logging
import math
import statistics
from collections import deque
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from mmalign.errors import UserError
from mmalign.model.shards import local
from mmalign.training.step_result import StepNumbers

log = logging.getLogger("mmalign")
MAX_SKIPPED = 10  # consecutive steps: the weights no longer change, so more will not help
WINDOW = 50  # losses that the median is taken of
MIN_LOSSES = 20  # below this a median says little


class NonFiniteGuard:
    """Decides on the device whether a step may change the weights, so the host need not wait.

    With on_non_finite "error" it stays closed after the first non-finite step: the host sees that
    step one step later, and saves the weights from before it.
    """

    def __init__(self, on_non_finite: str, device: torch.device):
        self.stops_run = on_non_finite == "error"
        self.open = torch.ones((), dtype=torch.bool, device=device)
        self.num_skipped = 0

    def allows(self, loss: Tensor, gradient_norm: Tensor) -> Tensor:
        """() bool: the loss and the gradients of all ranks are finite (and always have been)."""
        finite = torch.isfinite(loss) & torch.isfinite(gradient_norm)
        if self.stops_run:
            self.open = finite = finite & self.open
        return finite

    def check(self, step: int, numbers: StepNumbers, sample_ids: list[str]) -> None:
        """On the host: raises UserError for a non-finite step, or warns that it was skipped."""
        if numbers.finite:
            self.num_skipped = 0
            return
        what = f"the loss of step {step} is {numbers.loss}"
        if math.isfinite(numbers.loss):
            what = f"the gradient norm of step {step} is {numbers.gradient_norm}"
            what += f" (its loss is {numbers.loss:.4f})"
        samples = f"Its samples: {', '.join(sample_ids)}."
        if self.stops_run:
            raise UserError(f"{what}. {samples}")
        self.num_skipped += 1
        log.warning("%s: the step was skipped. %s", what, samples)
        if self.num_skipped == MAX_SKIPPED:
            raise UserError(
                f"{what}, the {MAX_SKIPPED}th step in a row, so the weights no longer change. "
                "Start again in a new --run-dir with a lower --optimizer.learning-rate."
            )


@torch.no_grad()
def explain_non_finite(model: nn.Module) -> str:
    """What to do after a step that is not finite: weights first, then data, then learning rate."""
    for name, parameter in model.named_parameters():
        if not local(parameter).isfinite().all():
            return (
                f" The weights are the cause: {name} holds NaN or infinity. Check the folders of "
                "--model.decoder, --model.vision-tower and --model.projector."
            )
    return (
        " All weights are finite. Inspect the samples with scripts/preview_batch.py; if they are "
        "as meant, lower --optimizer.learning-rate, or skip such steps with --on-non-finite skip."
    )


class LossSpikeDetector:
    """Reports a loss far above the median of the losses before it."""

    def __init__(self, factor: float, earlier_losses: Iterable[float] = ()):
        """earlier_losses: of the steps before a resumed run's first one."""
        self.factor = factor
        self.losses = deque((x for x in earlier_losses if math.isfinite(x)), maxlen=WINDOW)

    def update(self, step: int, loss: float, sample_ids: list[str]) -> bool:
        """Whether this step's loss is a spike; if so, logs it with the step's samples."""
        spike = False
        if len(self.losses) >= MIN_LOSSES:
            median = statistics.median(self.losses)
            spike = loss > self.factor * median
            if spike:
                log.warning(
                    "step %d: loss %.4f is more than %g times the median %.4f of the last %d "
                    "steps. Its samples: %s",
                    *(step, loss, self.factor, median, len(self.losses), ", ".join(sample_ids)),
                )
        if math.isfinite(loss):
            self.losses.append(loss)
        return spike
