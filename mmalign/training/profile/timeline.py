"""The time of profiled steps by category: every instant of a step belongs to exactly one.

Read from torch.profiler's trace (Chrome's trace format, times in microseconds). On a CPU an instant
belongs to the innermost operation that runs on the loop's thread; on a GPU to the running kernel,
or else to the wait for data, or else to idle time. So the categories of a step add up to its wall
time. Kernels take the category of the code that launched them.
"""

import gzip
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from mmalign.training.profile.ranges import OPERATION_PREFIX

MATRIX, ATTENTION, NORMS = "matrix products", "attention", "norms"
ELEMENTWISE, LOSS, OPTIMIZER = "activation and elementwise", "loss with lm_head", "optimizer"
COMMUNICATION, DATA_WAIT, COPIES = "communication", "data wait", "copies"
IDLE = "idle and other"
# where kernels overlap, the instant belongs to the first of these
CATEGORIES = (
    *(MATRIX, ATTENTION, NORMS, ELEMENTWISE, LOSS, OPTIMIZER),
    *(COMMUNICATION, COPIES, DATA_WAIT, IDLE),
)

_STEP = re.compile(r"step \d+")
_RULES = (  # the first that matches a range, operation or kernel decides for all inside of it
    (r"data wait", DATA_WAIT),
    (r"gradient norm|optimizer", OPTIMIZER),
    (r"copy to device", COPIES),
    (r"c10d::|nccl|gloo:|record_param_comms", COMMUNICATION),
    (rf"{OPERATION_PREFIX}\w*attention", ATTENTION),
    (rf"{OPERATION_PREFIX}\w*norm|aten::native_layer_norm", NORMS),
    (rf"{OPERATION_PREFIX}(linear_cross_entropy|target_logprobs)", LOSS),
    (rf"{OPERATION_PREFIX}(swiglu|quick_gelu)", ELEMENTWISE),
    (r"aten::(mm|addmm|bmm|baddbmm|_scaled_mm)$|mkldnn::|mkl::", MATRIX),
    (r".*(gemm|cutlass|cublas|nvjet|xmma|matmul|_project_kernel)", MATRIX),
    (r"aten::(copy_|clone|_to_copy)$|Memcpy|Memset", COPIES),
)
_LOOSE_RULES = (  # decide where nothing more specific does
    (rf"{OPERATION_PREFIX}project_image_features", NORMS),
    (r"aten::", ELEMENTWISE),
)
Times = defaultdict[tuple[str, str], float]  # by category and name


@dataclass(frozen=True)
class Timeline:
    num_steps: int
    wall: float  # seconds of all profiled steps
    seconds: dict[str, float]  # by category, all of CATEGORIES; adds up to `wall`
    operations: list[tuple[str, str, float, int]]  # category, name, seconds, calls; longest first


@dataclass(frozen=True)
class _Open:
    """A running event, and the category of what is inside it."""

    end: float
    category: str
    decided: bool  # nothing inside changes the category
    name: str


def read_timeline(path: Path) -> Timeline:
    """The timeline of one of our trace files (.json or .json.gz)."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt") as file:
        return timeline(json.load(file)["traceEvents"])


def timeline(trace_events: Iterable[dict]) -> Timeline:
    """trace_events: complete events ("X") with cat, name, ts, dur, tid; the steps are ranges."""
    events = [event for event in trace_events if event.get("ph") == "X" and "dur" in event]
    steps = [e for e in events if e.get("cat") == "user_annotation" and _STEP.fullmatch(e["name"])]
    assert steps, "the trace holds no step"
    kernels = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    times: Times = defaultdict(float)  # microseconds
    calls = Counter()
    if kernels:
        intervals = list(_kernel_intervals(events, kernels))
        intervals += [
            (e["ts"], e["ts"] + e["dur"], DATA_WAIT, "waiting for the loader")
            for e in events
            if e.get("cat") == "user_annotation" and e["name"] == "data wait"
        ]
        _sweep(intervals, steps, times)
        calls.update((category, name) for _, _, category, name in intervals)
    else:
        for step in steps:
            _host_times(events, step, times, calls)
    wall = sum(step["dur"] for step in steps)
    seconds = {
        category: sum(t for (of, _), t in times.items() if of == category) / 1e6
        for category in CATEGORIES
    }
    seconds[IDLE] = wall / 1e6 - sum(t for c, t in seconds.items() if c != IDLE)
    longest = sorted(times.items(), key=lambda item: -item[1])
    operations = [(c, name, t / 1e6, calls[c, name]) for (c, name), t in longest]
    return Timeline(len(steps), wall / 1e6, seconds, [row for row in operations if row[0] != IDLE])


def _decide(name: str, parent: _Open) -> tuple[str, bool]:
    """Category of an event inside `parent`, and whether it holds for all inside of it."""
    if parent.decided:
        return parent.category, True
    for pattern, category in _RULES:
        if re.match(pattern, name):
            return category, True
    if parent.category == IDLE:
        for pattern, category in _LOOSE_RULES:
            if re.match(pattern, name):
                return category, False
    return parent.category, False


def _is_host_work(event: dict) -> bool:
    """Operations, and the ranges that decide a category; those of layers and phases do not."""
    if event.get("cat") in ("cpu_op", "cuda_runtime", "cuda_driver"):
        return True
    rules = (*_RULES, *_LOOSE_RULES)
    return event.get("cat") == "user_annotation" and any(
        re.match(pattern, event["name"]) for pattern, _ in rules
    )


def _walk(events: list[dict]) -> Iterator[tuple[dict, list[_Open]]]:
    """Each event of one thread, in order, with the events that enclose it, itself last."""
    stack = [_Open(float("inf"), IDLE, False, "")]
    for event in sorted(events, key=lambda e: (e["ts"], -e["dur"])):
        while event["ts"] >= stack[-1].end:
            stack.pop()
        category, decided = _decide(event["name"], stack[-1])
        # inside a range that has decided, the outer name is the useful one: the operation
        name = stack[-1].name if stack[-1].decided else event["name"]
        end = min(event["ts"] + event["dur"], stack[-1].end)
        stack.append(_Open(end, category, decided, name))
        yield event, stack


def _host_times(events: list[dict], step: dict, times: Times, calls: Counter) -> None:
    """Adds the self times of everything on the step's thread, by (category, name)."""
    begin, end = step["ts"], step["ts"] + step["dur"]
    inside = [
        e for e in events if e["tid"] == step["tid"] and begin <= e["ts"] < end and _is_host_work(e)
    ]
    running: list[_Open] = []
    now = begin
    for event, stack in _walk(inside):
        now = _advance(running, now, event["ts"], times)
        running.append(stack[-1])
        outer = stack[-2]
        if not outer.decided:
            calls[stack[-1].category, stack[-1].name] += 1
    _advance(running, now, end, times)


def _advance(running: list[_Open], now: float, until: float, times: Times) -> float:
    """Assigns the time from `now` to `until` to the innermost running event."""
    while running and now < until:
        innermost = running[-1]
        stop = min(innermost.end, until)
        if stop > now:
            times[innermost.category, innermost.name] += stop - now
            now = stop
        if innermost.end <= until:
            running.pop()
    return until


def _kernel_intervals(
    events: list[dict], kernels: list[dict]
) -> Iterator[tuple[float, float, str, str]]:
    """(begin, end, category, name) of every kernel and copy of the device."""
    by_thread = defaultdict(list)
    for event in events:
        if _is_host_work(event):
            by_thread[event["tid"]].append(event)
    launched_in: dict[int, _Open] = {}
    for thread in by_thread.values():
        for event, stack in _walk(thread):
            correlation = event.get("args", {}).get("correlation")
            if correlation is not None:
                launched_in[correlation] = stack[-1]
    outside = _Open(float("inf"), IDLE, False, "")
    for kernel in kernels:
        launch = launched_in.get(kernel.get("args", {}).get("correlation"), outside)
        category, _ = _decide(kernel["name"], launch)
        if category == IDLE:
            category = ELEMENTWISE
        yield kernel["ts"], kernel["ts"] + kernel["dur"], category, kernel["name"]


def _sweep(intervals: list[tuple[float, float, str, str]], steps: list[dict], times: Times) -> None:
    """Assigns every instant of the steps to the first running category, in CATEGORIES' order."""
    order = {category: i for i, category in enumerate(CATEGORIES)}
    for step in steps:
        begin, end = step["ts"], step["ts"] + step["dur"]
        clipped = [
            (max(start, begin), min(stop, end), category, name)
            for start, stop, category, name in intervals
            if start < end and stop > begin
        ]
        changes = sorted(
            [(start, 1, i) for i, (start, _, _, _) in enumerate(clipped)]
            + [(stop, 0, i) for i, (_, stop, _, _) in enumerate(clipped)]
        )
        running: set[int] = set()
        now = begin
        for instant, starts, i in changes:
            if running and instant > now:
                first = min(running, key=lambda j: order[clipped[j][2]])
                times[clipped[first][2:]] += instant - now
            now = instant
            (running.add if starts else running.discard)(i)
