"""Steps that must not change the weights, and steps that somebody should look at."""

import logging
import math
import statistics
from collections import deque
from collections.abc import Iterable

import torch
from torch import Tensor

from mmalign.errors import UserError

log = logging.getLogger("mmalign")
MOST_SKIPPED = 10  # steps in a row: the weights stay as they are, so more of it will not help
WINDOW = 50  # losses that the median is taken of
LEAST = 20  # losses below which a median says little


class UpdateGate:
    """Decides on the device whether a step changes the weights, so the host need not wait.

    Where the run is to stop (on_non_finite "error") the gate stays shut after the first step that
    is not finite: the host sees it one step later, and saves what was before it.
    """

    def __init__(self, on_non_finite: str, device: torch.device):
        self.stops = on_non_finite == "error"
        self.open = torch.ones((), dtype=torch.bool, device=device)
        self.num_skipped = 0

    def allows(self, loss: Tensor, gradient_norm: Tensor) -> Tensor:
        """() bool: loss and gradients of all processes are finite (and were so before)."""
        finite = torch.isfinite(loss) & torch.isfinite(gradient_norm)
        if self.stops:
            self.open = finite = finite & self.open
        return finite

    def check(self, step: int, loss: float, norm: float, allowed: bool, ids: list[str]) -> None:
        """On the host: raises UserError, or says that the step was skipped."""
        if allowed:
            self.num_skipped = 0
            return
        what = f"the loss of step {step} is {loss}"
        if math.isfinite(loss):
            what = f"the gradient norm of step {step} is {norm} (its loss is {loss:.4f})"
        samples = f"Its samples: {', '.join(ids)}."
        if self.stops:
            raise UserError(
                f"{what}. {samples} Look at them with scripts/preview_batch.py, or lower "
                "--optimizer.learning-rate; --on-non-finite skip leaves such steps out. The "
                "last checkpoint is from before this step."
            )
        self.num_skipped += 1
        log.warning("%s: it did not change the weights. %s", what, samples)
        if self.num_skipped == MOST_SKIPPED:
            raise UserError(
                f"{what}, the {MOST_SKIPPED}th step in a row, so no step changes the weights any "
                "more. Lower --optimizer.learning-rate in a new --run-dir."
            )


class LossWatch:
    """Reports a loss far above the median of those before it."""

    def __init__(self, factor: float, earlier: Iterable[float] = ()):
        """earlier: losses of the steps that a continued run has behind it."""
        if factor <= 1:
            raise UserError(f"--loss-spike-factor {factor}: expected a number above 1")
        self.factor = factor
        self.losses = deque((x for x in earlier if math.isfinite(x)), maxlen=WINDOW)

    def see(self, step: int, loss: float, ids: list[str]) -> bool:
        """Whether this step is a spike; says so in the log, with the step's samples."""
        spike = False
        if len(self.losses) >= LEAST:
            median = statistics.median(self.losses)
            spike = loss > self.factor * median
            if spike:
                log.warning(
                    "step %d: loss %.4f is more than %g times the median %.4f of the last %d "
                    "steps. Its samples: %s",
                    *(step, loss, self.factor, median, len(self.losses), ", ".join(ids)),
                )
        if math.isfinite(loss):
            self.losses.append(loss)
        return spike
