"""A run that is asked to stop finishes its step and saves."""

import signal

from mmalign.errors import UserError


class Stopped(UserError):
    """The run did as it was asked to: it has saved and left, and the same command continues it."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: try again


class StopSignal:
    """SIGTERM, SIGUSR1 (SLURM's warning) and SIGINT ask for a stop after the step in flight.

    A second one has its usual effect.
    """

    def __init__(self):
        self.requested = False
        self.previous = {
            number: signal.signal(number, self._on_signal)
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
        }

    def _on_signal(self, number, frame) -> None:
        self.requested = True
        self.restore()

    def restore(self) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
