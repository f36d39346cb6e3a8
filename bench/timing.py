"""Times several variants of one piece of work against each other, in one run.

They take turns (A B C A B C ...), so that a drifting clock or a busy neighbour meets all alike;
every variant is warm before the first round counts; medians are reported with the extremes. On a
GPU, CUDA events bracket each call, and what the last call left in the L2 cache is overwritten
before it: that write also keeps the queue busy while Python launches, so short kernels are timed
and not the gaps between launches. On a CPU a call is bracketed by a monotonic clock.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

L2_FACTOR = 4  # times its size is written to push everything out of the L2 cache
WARM_UP_ROUNDS = 2
MIN_ROUNDS, MAX_ROUNDS = 5, 100


@dataclass(frozen=True)
class Timing:
    seconds: tuple[float, ...]  # of each round, in order
    peak_memory_bytes: int | None = None  # of one call, above what was allocated; None on a CPU

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def fastest(self) -> float:
        return min(self.seconds)

    @property
    def slowest(self) -> float:
        return max(self.seconds)

    @property
    def repeats(self) -> int:
        return len(self.seconds)


def measure(
    calls: Mapping[str, Callable[..., object]],
    device: torch.device | str,
    *,
    prepare: Mapping[str, Callable[[], object]] | None = None,
    budget_seconds: float = 1.0,
    min_rounds: int = MIN_ROUNDS,
    max_rounds: int = MAX_ROUNDS,
    warm_up_rounds: int = WARM_UP_ROUNDS,
) -> dict[str, Timing]:
    """Times one call of each variant, in turn, for as many rounds as the budget holds.

    `prepare[name]()` runs before each call of `name`, untimed, and the call gets its result (the
    graph that a backward pass consumes). The budget is for the rounds of all variants together,
    preparation included; `min_rounds` are taken even beyond it.
    """
    clock = _Clock(torch.device(device), prepare or {})
    peaks = {name: clock.peak_memory(name, call) for name, call in calls.items()}
    for _ in range(warm_up_rounds):
        clock.round(calls)
    taken: list[dict[str, float]] = []
    end = time.perf_counter() + budget_seconds
    while len(taken) < min_rounds or (len(taken) < max_rounds and time.perf_counter() < end):
        taken.append(clock.round(calls))
    return {name: Timing(tuple(row[name] for row in taken), peaks[name]) for name in calls}


class _Clock:
    """Takes the time of single calls on one device."""

    def __init__(self, device: torch.device, prepare: Mapping[str, Callable[[], object]]):
        self.device, self.prepare = device, prepare
        self.on_gpu = device.type == "cuda"
        if self.on_gpu:
            l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
            self.flush = torch.empty(L2_FACTOR * l2_bytes, dtype=torch.uint8, device=device)

    def round(self, calls: Mapping[str, Callable[..., object]]) -> dict[str, float]:
        """Seconds of one call of each variant, in the order of `calls`."""
        if not self.on_gpu:
            return {name: self._on_cpu(name, call) for name, call in calls.items()}
        events = {name: self._on_gpu(name, call) for name, call in calls.items()}
        torch.cuda.synchronize(self.device)
        return {name: begin.elapsed_time(end) / 1000 for name, (begin, end) in events.items()}

    def _on_cpu(self, name: str, call: Callable[..., object]) -> float:
        arguments = self._arguments(name)
        begin = time.perf_counter()
        result = call(*arguments)
        seconds = time.perf_counter() - begin
        del result  # freed outside of the measurement
        return seconds

    def _on_gpu(
        self, name: str, call: Callable[..., object]
    ) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        arguments = self._arguments(name)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()
        begin.record()
        call(*arguments)
        end.record()
        return begin, end

    def _arguments(self, name: str) -> tuple:
        return (self.prepare[name](),) if name in self.prepare else ()

    def peak_memory(self, name: str, call: Callable[..., object]) -> int | None:
        """Bytes that one call allocates at most; its first call, compilation included, is over."""
        if not self.on_gpu:
            return None
        call(*self._arguments(name))
        arguments = self._arguments(name)
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        result = call(*arguments)
        torch.cuda.synchronize(self.device)
        peak = torch.cuda.max_memory_allocated(self.device) - before
        del result
        return peak
