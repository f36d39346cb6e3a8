"""A clock that only what is timed moves: no test waits, or depends on how busy a machine is."""

import pytest

from bench import timing


class FakeTime:
    def __init__(self):
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def fake_time(monkeypatch) -> FakeTime:
    clock = FakeTime()
    monkeypatch.setattr(timing, "time", clock)
    return clock
