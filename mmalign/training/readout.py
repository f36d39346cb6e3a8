"""Numbers of a step on their way from the device to the host."""

import time

import torch
from torch import Tensor


class Readout:
    """Begins to copy; the host waits only when it asks for the values, one step later."""

    def __init__(self, values: Tensor):
        """values (n,), on any device."""
        self.values, self.copied, self.ready_at = values, None, time.perf_counter()
        if values.is_cuda:
            self.values = torch.empty_like(values, device="cpu", pin_memory=True)
            self.values.copy_(values, non_blocking=True)
            self.copied = torch.cuda.Event()
            self.copied.record()

    def wait(self) -> list[float]:
        """The values. Afterwards ready_at is when they were known: the time the step was over."""
        if self.copied is not None:
            self.copied.synchronize()
            self.ready_at, self.copied = time.perf_counter(), None
        return self.values.tolist()
