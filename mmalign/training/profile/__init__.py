"""--profile FIRST:END: a trace, a memory snapshot and profile.md of a few steps.

Under run_dir/profile: trace.json.gz (chrome://tracing, ui.perfetto.dev), memory_snapshot.pickle (on
CUDA; pytorch.org/memory_viz) and profile.md: the time of each category beside its roofline bound.
"""

import logging
import re
import warnings
from contextlib import AbstractContextManager, ExitStack, nullcontext

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from mmalign.data.loader import Step
from mmalign.errors import UserError
from mmalign.files import markdown_table, write_text
from mmalign.flops import Workload
from mmalign.system import DTYPES
from mmalign.training.profile.ranges import ProfilerRange, ranges_of, wrapped
from mmalign.training.profile.roofline import MeasuredPeaks, measure_peaks, roofline_bounds
from mmalign.training.profile.timeline import Timeline, read_timeline
from mmalign.training.telemetry import memory
from mmalign.training.trainer import Trainer

log = logging.getLogger("mmalign")


def steps_to_profile(text: str, num_steps: int) -> range:
    """ "10:13" -> steps 10, 11 and 12, counted from 1 as in metrics.jsonl; "" -> none."""
    if not text:
        return range(0)
    match = re.fullmatch(r"(\d+):(\d+)", text)
    steps = range(int(match[1]), int(match[2])) if match else range(0)
    if not steps or steps[0] < 1 or steps[-1] > num_steps:
        raise UserError(
            f"--profile {text}: expected FIRST:END with 1 <= FIRST < END <= {num_steps + 1}. Steps "
            f"are counted from 1 to {num_steps}, END is not included: 10:13 is 10, 11 and 12"
        )
    return steps


class StepProfiler:
    """A context manager around the loop over the steps, which calls `step_done` after each.

    The range of a step begins before the wait for its data. The step before the first one is a
    warm-up, if there is one: torch.profiler runs and discards it.
    """

    def __init__(self, trainer: Trainer, workload: Workload, first_step: int):
        """first_step: optimizer steps of the run before this process's first one."""
        config, is_main = trainer.config, trainer.ranks.is_main
        asked = steps_to_profile(config.profile, trainer.num_steps)
        self.steps = [number for number in asked if number > first_step and is_main]
        if asked and first_step >= asked[-1] and is_main:
            log.info("--profile %s: the run is past these steps", config.profile)
        self.trainer, self.workload, self.first_step = trainer, workload, first_step
        self.folder = config.run_dir / "profile"
        self.profiled: list[Step] = []
        self.profiler: profile | None = None
        self.running = ExitStack()  # the profiler and what it wraps
        self.step_range = ExitStack()
        self.data_wait = ExitStack()

    def __enter__(self) -> "StepProfiler":
        self._begin_step(self.first_step + 1)
        return self

    def __exit__(self, *exception) -> None:
        for ranges in (self.data_wait, self.step_range, self.running):
            ranges.close()

    def step_done(self, step: Step) -> None:
        """After all that belongs to a step; the next one begins."""
        number = step.index + 1
        self.step_range.close()
        if number in self.steps:
            self.profiled.append(step)
        if self.profiler:
            self.profiler.step()
        if self.steps and number == self.steps[-1]:
            self.running.close()
            self.profiler = None
            self._write()
            self.profiled.clear()
        self._begin_step(number + 1)

    def _begin_step(self, number: int) -> None:
        if self.steps and number == max(self.steps[0] - 1, self.first_step + 1):
            self._start(num_warmup=self.steps[0] - number)
        if number in self.steps:
            self.step_range.enter_context(ProfilerRange(f"step {number}"))
            self.data_wait.enter_context(ProfilerRange("data wait"))

    def _start(self, num_warmup: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.running.enter_context(ranges_of(self.trainer))
        self.running.enter_context(wrapped(self.trainer, "train_step", self._end_data_wait))
        activities = [ProfilerActivity.CPU]
        if self.trainer.ranks.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        with warnings.catch_warnings():  # profile.md says which step had no warm-up
            warnings.filterwarnings("ignore", "Profiler won't be using warmup")
            plan = schedule(wait=0, warmup=num_warmup, active=len(self.steps), repeat=1)
        self.profiler = self.running.enter_context(
            profile(
                activities=activities,
                schedule=plan,
                on_trace_ready=lambda p: p.export_chrome_trace(str(self.folder / "trace.json.gz")),
            )
        )

    def _end_data_wait(self, *args) -> AbstractContextManager:
        self.data_wait.close()
        return nullcontext()

    def _write(self) -> None:
        config, device = self.trainer.config, self.trainer.ranks.device
        if device.type == "cuda":
            torch.cuda.memory._dump_snapshot(str(self.folder / "memory_snapshot.pickle"))
        dtype = DTYPES[config.precision]
        peaks = measure_peaks(device, dtype)
        bounds = roofline_bounds(
            self.workload, self.profiled, self.trainer.parameters, dtype, peaks, config
        )
        measured = read_timeline(self.folder / "trace.json.gz")
        text = report(measured, bounds, peaks, self.profiled, device)
        if self.steps[0] == self.first_step + 1:
            text += f"Step {self.steps[0]} was the first of this process: it includes warm-up.\n"
        write_text(self.folder / "profile.md", text)
        log.info("profile of %d steps: %s", measured.num_steps, self.folder / "profile.md")


def report(
    measured: Timeline,
    bounds: dict[str, float | None],
    peaks: MeasuredPeaks,
    steps: list[Step],
    device: torch.device,
) -> str:
    """profile.md: where the time of `steps` went, beside the roofline bounds."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
    numbers = ", ".join(str(step.index + 1) for step in steps)
    tokens = sum(len(batch.input_ids) for step in steps for batch in step.batches)
    known = sum(seconds for seconds in bounds.values() if seconds)
    wall, peak_bytes = measured.wall, memory(device)["memory_peak_bytes"]
    head = (
        f"# Profile of steps {numbers}\n\n"
        f"On {name}: {wall / len(steps) * 1e3:,.1f} ms per step, including the wait for data; "
        f"{tokens / wall:,.0f} tokens/s of this rank, with the profiler on, which slows the host. "
        f"The roofline bound is {known / len(steps) * 1e3:,.1f} ms per step, {known / wall:.0%} of "
        f"that. Peak memory: {peak_bytes / 2**30:.2f} GiB.\n"
        f"\nPeaks measured right after: copy {peaks.copy_bytes_per_second / 1e9:,.1f} GB/s, "
        f"matrix products {peaks.matrix_flops_per_second / 1e12:,.3g} TFLOP/s. A roofline bound is "
        "the required FLOPs over the one, or the bytes that must be read and written over the "
        "other; waiting, copies and idle time have none.\n"
    )
    return "\n".join([head, _categories(measured, bounds), _operations(measured), _files(device)])


def _categories(measured: Timeline, bounds: dict[str, float | None]) -> str:
    rows = []
    per_step = 1e3 / measured.num_steps
    for category, seconds in measured.seconds.items():
        bound = bounds[category]
        cells = [category, f"{seconds * per_step:,.2f}", f"{seconds / measured.wall:.1%}"]
        if bound is None:
            cells += ["-", "-", "-"]
        else:
            times = f"{seconds / bound:.1f}" if bound else "-"
            cells += [f"{bound * per_step:,.2f}", f"{(seconds - bound) * per_step:,.2f}", times]
        rows.append(cells)
    known = sum(seconds for seconds in bounds.values() if seconds)
    cells = ["**step**", f"{measured.wall * per_step:,.2f}", "100.0%", f"{known * per_step:,.2f}"]
    cells += [f"{(measured.wall - known) * per_step:,.2f}", f"{measured.wall / known:.1f}"]
    headings = ("category", "ms per step", "share", "bound, ms", "above bound, ms", "times bound")
    return markdown_table(headings, [*rows, cells]) + "\n"


def _operations(measured: Timeline, most: int = 20) -> str:
    rows = []
    for category, name, seconds, calls in measured.operations[:most]:
        shown = (name if len(name) <= 100 else f"{name[:97]}...").replace("|", "\\|")
        time = f"{seconds * 1e3 / measured.num_steps:,.2f}"
        rows.append((f"`{shown}`", time, f"{calls / measured.num_steps:,.0f}", category))
    headings = ("operation", "ms per step", "calls per step", "category")
    return f"The {most} longest operations:\n\n{markdown_table(headings, rows)}\n"


def _files(device: torch.device) -> str:
    lines = [
        "trace.json.gz: every operation and range; open it in ui.perfetto.dev or chrome://tracing."
    ]
    if device.type == "cuda":
        lines.append("memory_snapshot.pickle: the allocator's blocks; pytorch.org/memory_viz.")
    else:
        lines.append("No memory snapshot: PyTorch records only the blocks of CUDA's allocator.")
    return "\n".join(lines) + "\n"
