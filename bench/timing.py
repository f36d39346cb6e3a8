"""Times several variants of one piece of work against each other, in one run.

They are interleaved (A B C A B C ...), so that a drifting clock or a busy neighbour affects all
alike; every variant is warm before the first round counts. On a GPU, CUDA events bracket each call,
and what the last call left in the L2 cache is overwritten before it: that write also keeps the
queue busy while Python launches, so short kernels are timed and not the gaps between launches. On a
CPU a monotonic clock brackets the call.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from bench.comparison import CannotRun

L2_FACTOR = 4  # times its size is written to push everything out of the L2 cache
MAX_ROUNDS = 100

Call = Callable[..., object]


@dataclass(frozen=True)
class Timing:
    seconds: tuple[float, ...]  # of each round, in order
    memory: Mapping[str, int]  # peak_memory_bytes, resident_memory_bytes, where measured

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def measure(
    calls: Mapping[str, Call],
    device: torch.device | str,
    *,
    prepare: Mapping[str, Callable[[], object]] | None = None,
    max_seconds: float = 1.0,
    min_rounds: int = 5,
    max_rounds: int = MAX_ROUNDS,
    cpu_memory: bool = False,
) -> dict[str, Timing]:
    """Times one call of each variant, in turn, for as many rounds as `max_seconds` holds.

    `prepare[name]()` runs before each call of `name`, untimed, and the call gets its result (the
    graph that a backward pass consumes). max_seconds: of all variants together, preparation
    included; `min_rounds` are taken even beyond it. cpu_memory: on a CPU, too, a first call is
    profiled for the memory it needs.

    Raises:
        CannotRun: a variant runs out of memory in its first call.
    """
    clock = _Clock(torch.device(device), prepare or {})
    memory = {name: clock.memory(name, call, cpu_memory) for name, call in calls.items()}
    clock.round(calls)
    taken: list[dict[str, float]] = []
    end = time.perf_counter() + max_seconds
    while len(taken) < min_rounds or (len(taken) < max_rounds and time.perf_counter() < end):
        taken.append(clock.round(calls))
    return {name: Timing(tuple(row[name] for row in taken), memory[name]) for name in calls}


class _Clock:
    """Times single calls on one device."""

    def __init__(self, device: torch.device, prepare: Mapping[str, Callable[[], object]]):
        self.device, self.prepare = device, prepare
        self.on_gpu = device.type == "cuda"
        if self.on_gpu:
            l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
            self.flush = torch.empty(L2_FACTOR * l2_bytes, dtype=torch.uint8, device=device)

    def round(self, calls: Mapping[str, Call]) -> dict[str, float]:
        """Seconds of one call of each variant, in the order of `calls`."""
        if not self.on_gpu:
            return {name: self._on_cpu(name, call) for name, call in calls.items()}
        events = {name: self._on_gpu(name, call) for name, call in calls.items()}
        torch.cuda.synchronize(self.device)
        return {name: begin.elapsed_time(end) / 1000 for name, (begin, end) in events.items()}

    def _on_cpu(self, name: str, call: Call) -> float:
        arguments = self._arguments(name)
        begin = time.perf_counter()
        result = call(*arguments)
        seconds = time.perf_counter() - begin
        del result  # freed outside of the measurement
        return seconds

    def _on_gpu(self, name: str, call: Call) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        arguments = self._arguments(name)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()
        begin.record()
        call(*arguments)
        end.record()
        return begin, end

    def _arguments(self, name: str) -> tuple:
        return (self.prepare[name](),) if name in self.prepare else ()

    def memory(self, name: str, call: Call, cpu_memory: bool) -> dict[str, int]:
        """What the first calls allocate: peak above what was resident before the call."""
        if not self.on_gpu:
            return {"peak_memory_bytes": peak_bytes(self, name, call)} if cpu_memory else {}
        try:
            call(*self._arguments(name))  # compiles
            arguments = self._arguments(name)
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            resident = torch.cuda.memory_allocated(self.device)
            call(*arguments)
            torch.cuda.synchronize(self.device)
        except torch.OutOfMemoryError as error:
            raise CannotRun(name, f"out of memory: {str(error).partition('.')[0]}") from None
        peak = torch.cuda.max_memory_allocated(self.device) - resident
        return {"peak_memory_bytes": peak, "resident_memory_bytes": resident}


def peak_bytes(clock: _Clock, name: str, call: Call) -> int:
    """The most that PyTorch's CPU allocator held during a call, above its start."""
    arguments = clock._arguments(name)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        call(*arguments)
    held = highest = 0
    profiler: Any = profiled.profiler
    for event in profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()  # negative where memory is freed
            highest = max(highest, held)
    return highest
