"""A run that is asked to stop finishes its step and saves."""

import signal


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
