"""A training step by how OpenMP's threads wait: on a machine of its own, and beside busy processes.

Each variant is a process, since OpenMP reads its settings when PyTorch is loaded; one of them at a
time steps, and the others wait for their turn. The step is the toy world's, whose operations are
short: no model loses more. "mmalign" is what the package sets (mmalign/openmp.py).
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

import torch

from bench.comparison import STEP, Calls, Comparison, each
from bench.models import Size, random_llava
from bench.samples import samples_of
from bench.shapes import ON_GPU, SMALL_DECODER, SMALL_VISION
from bench.train_step import MmalignStep, packed_batches, step_config

STAGE = "finetune"
DECODER = replace(
    SMALL_DECODER,
    vocab_size=900,
    hidden_size=128,
    intermediate_size=344,
    num_hidden_layers=2,
    head_dim=32,
)
TOY = Size("toy world", DECODER, replace(SMALL_VISION, hidden_size=128, image_size=56))
LENGTHS = [60] * 32  # tokens of text
BUSY = "import os; parent = os.getppid()\nwhile os.getppid() == parent: pass"
VARIANTS = {
    "mmalign": {},
    "libgomp's default": {"GOMP_SPINCOUNT": "300000"},
    "OMP_WAIT_POLICY=PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"},
}


@dataclass
class BusyMachine(Comparison):
    num_busy: int  # processes that compute beside the step
    rounds: int | None
    steps: dict[str, subprocess.Popen] = field(default_factory=dict, init=False)
    busy: list[subprocess.Popen] = field(default_factory=list, init=False)

    benchmark, direction = "waiting_threads", STEP

    @property
    def case(self) -> str:
        return f"{self.num_busy} busy processes" if self.num_busy else "an idle machine"

    @property
    def variants(self) -> Sequence[str]:
        return list(VARIANTS)

    def missing(self, variant: str) -> str | None:
        return "a measurement of CPUs" if ON_GPU else None

    def calls(self, variants: Sequence[str]) -> Calls:
        self.steps = {name: _start(["-m", __name__], VARIANTS[name]) for name in variants}
        for step in self.steps.values():
            _one_line(step)
        return Calls(
            {name: lambda step=step: self._step(step) for name, step in self.steps.items()}
        )

    def _step(self, step: subprocess.Popen) -> None:
        if not self.busy:
            self.busy = [_start(["-c", BUSY], {}) for _ in range(self.num_busy)]
        assert step.stdin is not None
        step.stdin.write(b"\n")
        step.stdin.flush()
        _one_line(step)

    def figures(self, variant: str, seconds: float) -> dict:
        """Called once everything is measured."""
        for process in (*self.steps.values(), *self.busy):
            process.kill()
            process.wait()
        self.steps, self.busy = {}, []
        return {"samples_per_second": len(LENGTHS) / seconds, "threads": torch.get_num_threads()}


def _start(arguments: list[str], settings: dict[str, str]) -> subprocess.Popen:
    openmp = ("OMP_WAIT_POLICY", "GOMP_", "KMP_")
    others = {x: y for x, y in os.environ.items() if not x.startswith(openmp)}
    return subprocess.Popen(
        [sys.executable, *arguments],
        env={**others, **settings, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )


def _one_line(step: subprocess.Popen) -> None:
    assert step.stdout is not None
    if not step.stdout.readline():
        raise RuntimeError(f"the process that steps has ended with {step.wait()}")


COMPARISONS = [BusyMachine(0, rounds=100), BusyMachine(6, rounds=10)]
test_busy_machine = each(COMPARISONS)


def _serve() -> None:
    """A line when ready, and for each line that comes a step and a line."""
    model = random_llava(TOY, STAGE, torch.device("cpu"), torch.float32)
    samples = samples_of(STAGE, LENGTHS, TOY)
    packed = packed_batches(samples, [list(range(len(samples)))], model.image_token_id)
    step = MmalignStep(model, step_config(STAGE, "fp32", 1 << 20), packed)
    step.start()
    for _ in range(3):
        step()
    with suppress(BrokenPipeError):
        print(flush=True)
        for _ in sys.stdin:
            step()
            print(flush=True)


if __name__ == "__main__":
    _serve()
