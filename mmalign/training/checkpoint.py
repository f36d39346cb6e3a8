"""Checkpoints: folders run/checkpoints/step_N, complete or not there at all.

A checkpoint is written under another name and renamed when every byte is on the disk, so a torn
write is never taken for one, and the last good one stays until its successor is complete.
"""

import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException

from mmalign.errors import UserError


class Checkpoints:
    def __init__(self, folder: Path, keep: int):
        if keep < 1:
            raise UserError(f"checkpoint.keep is {keep}; at least 1 checkpoint has to be kept")
        self.folder, self.keep = folder, keep
        for torn in folder.glob("torn_*"):  # left by a run that was killed while it wrote
            shutil.rmtree(torn, ignore_errors=True)

    def steps(self) -> list[int]:
        """Steps with a complete checkpoint, ascending."""
        names = self.folder.glob("step_*")
        return sorted(int(path.name[5:]) for path in names if path.name[5:].isdigit())

    def latest_step(self) -> int:
        """Optimizer steps that the latest checkpoint has behind it; 0 without one."""
        return max(self.steps(), default=0)

    def path(self, step: int) -> Path:
        return self.folder / f"step_{step}"

    def check_disk(self, state: dict[str, Tensor]) -> None:
        """Raises UserError where the disk cannot take one more checkpoint."""
        needed = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
        self.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.folder).free
        if free < needed * 1.02 + 2**20:
            raise UserError(
                f"a checkpoint needs {needed / 2**30:.2f} GiB, but {self.folder} has "
                f"{free / 2**30:.2f} GiB free. {self._what_remains()} Free some space, lower "
                "--checkpoint.keep or choose another --run-dir."
            )

    def save(self, step: int, state: dict[str, Tensor]) -> None:
        """Writes the state after `step` optimizer steps. Called by one process of the run."""
        final = self.path(step)
        if final.exists():
            return
        self.check_disk(state)
        torn = self.folder / f"torn_{os.getpid()}_step_{step}"
        try:
            with _single_process():
                dcp.save(state, checkpoint_id=torn, no_dist=True)
            _flush_to_disk(torn)
        except (Exception, CheckpointException) as error:  # the latter is no Exception
            shutil.rmtree(torn, ignore_errors=True)
            raise UserError(
                f"the checkpoint of step {step} could not be written to {self.folder}: "
                f"{_root_cause(error)}. {self._what_remains()} Free some space and give the same "
                "command again; it continues there."
            ) from error
        try:
            torn.rename(final)
        except OSError:  # another process of the run saved the same step first
            shutil.rmtree(torn, ignore_errors=True)
        for old in self.steps()[: -self.keep]:
            shutil.rmtree(self.path(old))

    def load(self, step: int, state: dict[str, Tensor]) -> None:
        """Fills the tensors of `state` in place."""
        with _single_process():
            dcp.load(state, checkpoint_id=self.path(step), no_dist=True)

    def _what_remains(self) -> str:
        steps = self.steps()
        return f"Step {steps[-1]} is safe." if steps else "There is no earlier checkpoint."


@contextmanager
def _single_process() -> Iterator[None]:
    """One process writes and reads the whole state; torch warns that it guesses so."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield


def _flush_to_disk(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())


def _root_cause(error: BaseException) -> str:
    """torch.distributed.checkpoint wraps what went wrong; the innermost says it best."""
    failures = getattr(error, "failures", None)
    if failures:
        wrapped = next(iter(failures.values()))
        error = wrapped[0] if isinstance(wrapped, tuple) else wrapped
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}"
