"""--profile FIRST:END: a trace, a memory snapshot and profile.md of a few steps.

Under run_dir/profile: trace.json.gz (chrome://tracing, ui.perfetto.dev), memory_snapshot.pickle (on
CUDA; pytorch.org/memory_viz) and profile.md: time by category beside the floor of each category.
"""

import itertools
import logging
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, nullcontext

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from mmalign.config import TrainConfig
from mmalign.data.loader import Step
from mmalign.distributed import Ranks
from mmalign.errors import UserError
from mmalign.flops import Workload
from mmalign.model.llava import Llava
from mmalign.system import DTYPES
from mmalign.training.profile.ranges import ranges_of, stage
from mmalign.training.profile.roofline import Ceilings, floors, measure_ceilings
from mmalign.training.profile.timeline import Timeline, read_timeline
from mmalign.training.telemetry import memory

log = logging.getLogger("mmalign")


def steps_to_profile(text: str, num_steps: int) -> range:
    """ "10:13" -> steps 10, 11 and 12, counted from 1 as in metrics.jsonl; "" -> none."""
    if not text:
        return range(0)
    match = re.fullmatch(r"(\d+):(\d+)", text)
    steps = range(int(match[1]), int(match[2])) if match else range(0)
    if not steps or steps[0] < 1 or steps[-1] > num_steps:
        raise UserError(
            f"--profile {text}: expected FIRST:END with 1 <= FIRST < END <= {num_steps + 1}, the "
            f"run's {num_steps} steps counted from 1 and END not included; 10:13 is 10, 11 and 12"
        )
    return steps


class StepProfiler:
    """Use as a context manager around the loop, and `watch` what the loop iterates.

    The step before the first is a warm-up where there is one: the profiler runs, and forgets it.
    """

    def __init__(self, config: TrainConfig, num_steps: int, first_step: int, ranks: Ranks):
        """first_step: steps that the run has behind it; the main process profiles the others."""
        asked = steps_to_profile(config.profile, num_steps)
        self.steps = [number for number in asked if number > first_step and ranks.is_main]
        if asked and first_step >= asked[-1] and ranks.is_main:
            log.info("--profile %s: these steps are done already", config.profile)
        self.first_step, self.config, self.device = first_step, config, ranks.device
        self.folder = config.run_dir / "profile"
        self.profiled: list[Step] = []
        self.resources = ExitStack()
        self.profiler: profile | None = None

    def __enter__(self) -> "StepProfiler":
        return self

    def __exit__(self, *exception) -> None:
        self.resources.close()

    def watch(self, steps: Iterable[tuple[Step, float]], model: Llava) -> Iterator:
        """The same items. The range of a step holds the wait for it and what the loop does."""
        if not self.steps:
            yield from steps
            return
        iterator = iter(steps)
        for number in itertools.count(self.first_step + 1):
            if number == max(self.steps[0] - 1, self.first_step + 1):
                self._start(model, warmup=self.steps[0] - number)
            with stage(f"step {number}") if number in self.steps else nullcontext():
                with stage("data wait"):
                    item = next(iterator, None)
                if item is None:
                    return
                yield item
            if self.profiler:
                self._step_done(number, item[0], model)

    def _start(self, model: Llava, warmup: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.resources.enter_context(ranges_of(model))
        activities = [ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        with warnings.catch_warnings():  # profile.md says which step had no warm-up
            warnings.filterwarnings("ignore", "Profiler won't be using warmup")
            plan = schedule(wait=0, warmup=warmup, active=len(self.steps), repeat=1)
        self.profiler = self.resources.enter_context(
            profile(
                activities=activities,
                schedule=plan,
                on_trace_ready=lambda p: p.export_chrome_trace(str(self.folder / "trace.json.gz")),
            )
        )

    def _step_done(self, number: int, step: Step, model: Llava) -> None:
        if number in self.steps:
            self.profiled.append(step)
        self.profiler.step()
        if number == self.steps[-1]:
            self.resources.close()
            self.profiler = None
            self._write(model)
            self.profiled.clear()

    def _write(self, model: Llava) -> None:
        if self.device.type == "cuda":
            torch.cuda.memory._dump_snapshot(str(self.folder / "memory_snapshot.pickle"))
        dtype = DTYPES[self.config.precision]
        ceilings = measure_ceilings(self.device, dtype)
        least = floors(
            Workload.of(model, self.config),
            self.profiled,
            model.trainable_parameters(),
            dtype,
            ceilings,
            self.config,
        )
        measured = read_timeline(self.folder / "trace.json.gz")
        text = report(measured, least, ceilings, self.profiled, self.device)
        if self.steps[0] == self.first_step + 1:
            text += f"Step {self.steps[0]} was this process's first: it holds warming up.\n"
        (self.folder / "profile.md").write_text(text)
        log.info("profile of %d steps: %s", measured.num_steps, self.folder / "profile.md")


def report(
    measured: Timeline,
    least: dict[str, float | None],
    ceilings: Ceilings,
    steps: list[Step],
    device: torch.device,
) -> str:
    """profile.md: where the time of `steps` went and what the least would have been."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
    numbers = ", ".join(str(step.index + 1) for step in steps)
    tokens = sum(len(batch.input_ids) for step in steps for batch in step.batches)
    known = sum(seconds for seconds in least.values() if seconds)
    wall, peak = measured.wall, memory(device)["memory_peak_bytes"]
    head = (
        f"# Profile of steps {numbers}\n\n"
        f"On {name}: {wall / len(steps) * 1e3:,.1f} ms a step, the wait for data included; "
        f"{tokens / wall:,.0f} tokens/s of this process, under the profiler, which slows the host "
        f"down. The floor is {known / len(steps) * 1e3:,.1f} ms a step, {known / wall:.0%} of it. "
        f"Peak memory: {peak / 2**30:.2f} GiB.\n"
        f"\nCeilings, measured right after: copy {ceilings.copy_bytes_per_second / 1e9:,.1f} GB/s, "
        f"matrix products {ceilings.matrix_flops_per_second / 1e12:,.3g} TFLOP/s. A floor is the "
        "FLOP model's products over the one, or the bytes that must be read and written over the "
        "other; waiting, copies and idling need none.\n"
    )
    return "\n".join([head, _categories(measured, least), _operations(measured), _files(device)])


def _categories(measured: Timeline, least: dict[str, float | None]) -> str:
    rows = [
        "| category | ms a step | share | floor, ms | above the floor, ms | times the floor |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    per_step = 1e3 / measured.num_steps
    for category, seconds in measured.seconds.items():
        floor = least[category]
        cells = [category, f"{seconds * per_step:,.2f}", f"{seconds / measured.wall:.1%}"]
        if floor is None:
            cells += ["-", "-", "-"]
        else:
            times = f"{seconds / floor:.1f}" if floor else "-"
            cells += [f"{floor * per_step:,.2f}", f"{(seconds - floor) * per_step:,.2f}", times]
        rows.append(f"| {' | '.join(cells)} |")
    known = sum(seconds for seconds in least.values() if seconds)
    cells = ["**step**", f"{measured.wall * per_step:,.2f}", "100.0%", f"{known * per_step:,.2f}"]
    cells += [f"{(measured.wall - known) * per_step:,.2f}", f"{measured.wall / known:.1f}"]
    return "\n".join([*rows, f"| {' | '.join(cells)} |", ""])


def _operations(measured: Timeline, most: int = 20) -> str:
    rows = [
        f"The {most} longest operations:\n",
        "| operation | category | ms a step | calls a step |",
        "|---|---|---:|---:|",
    ]
    for category, name, seconds, calls in measured.operations[:most]:
        shown = name if len(name) <= 100 else f"{name[:97]}..."
        time = f"{seconds * 1e3 / measured.num_steps:,.2f}"
        shown = shown.replace("|", "\\|")
        rows.append(f"| `{shown}` | {category} | {time} | {calls / measured.num_steps:,.0f} |")
    return "\n".join([*rows, ""])


def _files(device: torch.device) -> str:
    lines = [
        "trace.json.gz: every operation and range; open it in ui.perfetto.dev or chrome://tracing."
    ]
    if device.type == "cuda":
        lines.append("memory_snapshot.pickle: the allocator's blocks; pytorch.org/memory_viz.")
    else:
        lines.append("No memory snapshot: PyTorch records the blocks of CUDA's allocator only.")
    return "\n".join(lines) + "\n"
