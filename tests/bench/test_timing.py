"""The clock: turns, warm-up, preparation, medians."""

from types import SimpleNamespace

import pytest
import torch

from bench import timing
from bench.timing import Timing, measure

TWO_ROUNDS = {"min_rounds": 2, "max_rounds": 2}  # after one that warms up


def test_variants_take_turns():
    calls = []
    variants = {name: lambda name=name: calls.append(name) for name in "ABC"}
    timings = measure(variants, "cpu", **TWO_ROUNDS)
    assert calls == list("ABC") * 3  # the first round is the warm-up
    assert {name: len(timing.seconds) for name, timing in timings.items()} == dict.fromkeys(
        "ABC", 2
    )


def test_preparation_is_not_timed_and_reaches_the_call(fake_time):
    seen = []

    def prepare() -> str:
        fake_time.sleep(100)
        return f"prepared {len(seen)}"

    def call(prepared: str) -> None:
        seen.append(prepared)
        fake_time.sleep(len(seen))

    measured = measure({"A": call}, "cpu", prepare={"A": prepare}, **TWO_ROUNDS)["A"]
    assert seen == ["prepared 0", "prepared 1", "prepared 2"]
    assert measured.seconds == (2, 3)  # the first was the warm-up


def test_every_call_has_its_own_time(fake_time):
    seconds = {"fast": 1, "slow": 4}
    calls = {name: lambda name=name: fake_time.sleep(seconds[name]) for name in seconds}
    timings = measure(calls, "cpu", **TWO_ROUNDS)
    assert {name: timing.seconds for name, timing in timings.items()} == {
        "fast": (1, 1),
        "slow": (4, 4),
    }


@pytest.mark.parametrize(("budget", "rounds"), [(0, 3), (5, 5), (60, 7)])
def test_rounds_fill_the_budget_within_bounds(budget, rounds, fake_time):
    calls = {"A": lambda: fake_time.sleep(1)}
    measured = measure(calls, "cpu", max_seconds=budget, min_rounds=3, max_rounds=7)["A"]
    assert len(measured.seconds) == rounds


def test_a_timing_is_summed_up_by_its_median():
    assert Timing((5.0, 1.0, 9.0, 2.0), {}).median == 3.5


def test_peak_memory_of_known_tensors():
    def call() -> None:
        first = torch.ones(1000)
        second = first + first
        del first
        second += torch.ones(500)[0]

    measured = measure({"A": call}, "cpu", cpu_memory=True, **TWO_ROUNDS)["A"]
    assert measured.memory["peak_memory_bytes"] == pytest.approx(8000, abs=200)


def test_on_a_gpu_the_cache_is_flushed_right_before_the_events(monkeypatch):
    log = []

    class Event:
        def __init__(self, enable_timing: bool):
            assert enable_timing

        def record(self) -> None:
            log.append("event")

        def elapsed_time(self, end: "Event") -> float:
            assert log[-1] == "synchronize"
            return 250.0  # milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: log.append("synchronize"))
    clock = timing._Clock(torch.device("cpu"), {"A": lambda: log.append("prepare")})
    clock.on_gpu, clock.flush = True, SimpleNamespace(zero_=lambda: log.append("flush"))
    seconds = clock.round({"A": lambda _: log.append("call"), "B": lambda: log.append("call")})
    assert seconds == {"A": 0.25, "B": 0.25}
    one = ["flush", "event", "call", "event"]
    assert log == ["prepare", *one, *one, "synchronize"]
