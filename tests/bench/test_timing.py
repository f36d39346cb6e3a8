"""The clock: turns, warm-up, preparation, medians."""

import statistics
from types import SimpleNamespace

import pytest
import torch

from bench import timing
from bench.timing import Timing, measure

TWO_ROUNDS = {"min_rounds": 2, "max_rounds": 2, "warm_up_rounds": 1}


def test_variants_take_turns():
    calls = []
    variants = {name: lambda name=name: calls.append(name) for name in "ABC"}
    timings = measure(variants, "cpu", **TWO_ROUNDS)
    assert calls == list("ABC") * 3  # the first round is the warm-up
    assert {name: timing.repeats for name, timing in timings.items()} == dict.fromkeys("ABC", 2)


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
    measured = measure(calls, "cpu", budget_seconds=budget, min_rounds=3, max_rounds=7)["A"]
    assert measured.repeats == rounds


def test_a_timing_is_summed_up_by_its_median():
    seconds = (5.0, 1.0, 9.0, 2.0)
    timing = Timing(seconds)
    assert timing.median == statistics.median(seconds) == 3.5
    assert (timing.fastest, timing.slowest, timing.repeats) == (1.0, 9.0, 4)
    assert timing.peak_memory_bytes is None


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
