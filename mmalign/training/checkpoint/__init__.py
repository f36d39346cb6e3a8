"""Checkpoints: folders run/checkpoints/step_N, complete or not there at all.

The state is copied to the host while the loop waits, and written by a thread while it goes on. The
folder has another name until every process has written its files, they are on the disk and the
manifest lists their sizes and checksums; the last good one stays until its successor is complete.

A checkpoint holds parameters and optimizer state. Nothing else is needed to continue bit for bit:
the order of the data and the draws of dropout are functions of the seed and the step.
"""

import logging
import shutil
import threading
import warnings
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException

from mmalign.distributed import Ranks
from mmalign.errors import UserError
from mmalign.training.checkpoint import manifest
from mmalign.training.checkpoint.staging import Staging
from mmalign.training.checkpoint.writers import Alone, Together

log = logging.getLogger("mmalign")


class CheckpointError(UserError):
    """A checkpoint could not be written; says what remains safe."""


class Checkpoints:
    def __init__(self, folder: Path, keep: int, ranks: Ranks, collective: bool):
        """collective: every process writes its shards; otherwise the main one writes everything."""
        if keep < 1:
            raise UserError(f"checkpoint.keep is {keep}; at least 1 checkpoint has to be kept")
        self.folder, self.keep, self.ranks = folder, keep, ranks
        self.group = None  # of the writing threads alone: the loop uses others meanwhile
        if collective:
            self.group = dist.new_group(backend="gloo", timeout=timedelta(hours=12))
        self.staging = Staging(ranks.device)
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None
        self.newest = 0  # step of the checkpoint that was read or begun last

    # ---- what is there ----

    def steps(self) -> list[int]:
        """Steps with a folder of the final name, ascending."""
        names = self.folder.glob("step_*")
        return sorted(int(path.name[5:]) for path in names if path.name[5:].isdigit())

    def path(self, step: int) -> Path:
        return self.folder / f"step_{step}"

    def latest_step(self) -> int:
        """Optimizer steps that the newest intact checkpoint has behind it; 0 without one.

        Called by all processes. A damaged checkpoint is reported and put aside as damaged_step_N.
        """
        step = self._newest_intact() if self.ranks.is_main else None
        self.newest = self.ranks.from_main(step)
        return self.newest

    def _newest_intact(self) -> int:
        for torn in self.folder.glob("torn_*"):  # left by a run that was killed while it wrote
            shutil.rmtree(torn)
        damaged = []
        for step in reversed(self.steps()):
            problem = manifest.damage(self.path(step))
            if problem is None:
                if damaged:
                    log.warning("%s. Continuing from step %d.", "; ".join(damaged), step)
                return step
            aside = self.folder / f"damaged_step_{step}"
            shutil.rmtree(aside, ignore_errors=True)
            self.path(step).rename(aside)
            damaged.append(f"the checkpoint of step {step} is damaged: {problem} ({aside})")
        if damaged:
            raise UserError(
                f"{'; '.join(damaged)}. No intact one is left. Give the same command again to "
                "begin from step 0, or put a copy of a checkpoint back first"
            )
        return 0

    # ---- writing ----

    def check_disk(self, state: dict[str, Tensor]) -> None:
        """Raises UserError where the disk cannot take the checkpoints of the whole run."""
        copies = self.keep + 1 - len(self.steps())  # the oldest goes when the newest is complete
        self._check_space(state, max(1, copies))

    def _check_space(self, state: dict[str, Tensor], copies: int = 1) -> None:
        needed = copies * sum(tensor.numel() * tensor.element_size() for tensor in state.values())
        self.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.folder).free
        if free < needed * 1.02 + 2**20:
            what = "a checkpoint needs" if copies == 1 else f"{copies} checkpoints need"
            raise UserError(
                f"{what} {needed / 2**30:.2f} GiB, but {self.folder} has {free / 2**30:.2f} GiB "
                f"free. {self.what_remains()} Free some space, lower --checkpoint.keep or choose "
                "another --run-dir."
            )

    def start(self, step: int, state: dict[str, Tensor]) -> None:
        """Copies the state after `step` optimizer steps and begins to write it in the background.

        Called by all processes. Waits for the write before, and raises its CheckpointError.
        """
        self.wait()
        if step == self.newest:
            return
        self.newest = step
        if self.group is None and not self.ranks.is_main:
            return
        staged = self.staging.copy(state)
        # no daemon: a process that ends in between waits for it
        self.thread = threading.Thread(target=self._try_to_write, args=(step, staged))
        self.thread.start()

    @property
    def failed(self) -> bool:
        """Whether the last write is known to have failed; does not wait for it."""
        return self.error is not None

    def wait(self) -> None:
        """Until nothing is being written. Raises CheckpointError if that failed."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        if self.error is not None:
            error, self.error = self.error, None
            raise error

    def finish(self) -> None:
        """As wait, until no process is writing any more: called by all before they leave.

        A launcher kills the others as soon as the first one has left.
        """
        error = None
        try:
            self.wait()
        except CheckpointError as caught:
            error = caught
        told = self.ranks.from_main(None if error is None else str(error))
        if error is not None:
            raise error
        if told is not None:
            raise CheckpointError(told)

    def save_alone(self, step: int, state: dict[str, Tensor]) -> None:
        """Writes whole tensors from this process and waits; one process of the run is enough."""
        claim = self.folder / f"torn_step_{step}_claim"
        try:
            claim.mkdir(parents=True)
        except FileExistsError:
            return
        try:
            if not self.path(step).exists():
                self._write(step, state, f"torn_step_{step}", Alone())
        finally:
            claim.rmdir()

    def _try_to_write(self, step: int, state: dict[str, Tensor]) -> None:
        writers = Alone() if self.group is None else Together(self.group)
        try:
            self._write(step, state, f"torn_step_{step}", writers)
        except BaseException as error:  # the loop raises it, in its own thread
            self.error = error

    def _write(self, step: int, state: dict[str, Tensor], name: str, writers: Alone) -> None:
        torn = self.folder / name
        try:
            writers.share(lambda: writers.is_first and self._make_room(torn, state))
            writers.save(state, torn)
            parts = writers.share(lambda: manifest.describe(torn, writers.own_files(torn)))
            files = {file: facts for part in parts for file, facts in part.items()}
            writers.share(lambda: writers.is_first and self._complete(torn, step, files))
        except (Exception, CheckpointException) as error:  # the latter is no Exception
            if writers.is_first:
                shutil.rmtree(torn, ignore_errors=True)
            raise CheckpointError(
                f"the checkpoint of step {step} could not be written to {self.folder}: "
                f"{_root_cause(error)}. {self.what_remains()} Mend that and give the same command "
                "again; it continues there."
            ) from error

    def _make_room(self, torn: Path, state: dict[str, Tensor]) -> None:
        shutil.rmtree(torn, ignore_errors=True)
        self._check_space(state)
        torn.mkdir(parents=True)

    def _complete(self, torn: Path, step: int, files: dict) -> None:
        """Gives the folder its name, then drops the oldest ones."""
        manifest.write(torn, step, files)
        try:
            torn.rename(self.path(step))
        except OSError:  # another process of the run saved the same step first
            shutil.rmtree(torn)
        manifest.flush_folder(self.folder)
        for old in self.steps()[: -self.keep]:
            dropped = self.folder / f"torn_old_{old}"
            self.path(old).rename(dropped)  # at no time half there under the name of a checkpoint
            shutil.rmtree(dropped)

    # ---- reading ----

    def load(self, step: int, state: dict[str, Tensor]) -> None:
        """Fills the tensors of `state` in place, shards with their rows, whoever wrote them."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is")
            dcp.load(state, checkpoint_id=self.path(step), no_dist=True)

    def what_remains(self) -> str:
        """A sentence for error messages."""
        steps = self.steps()
        return f"Step {steps[-1]} is safe." if steps else "There is no earlier checkpoint."


def _root_cause(error: BaseException) -> str:
    """torch.distributed.checkpoint wraps what went wrong; the innermost says it best."""
    failures = getattr(error, "failures", None)
    if failures:
        wrapped = next(iter(failures.values()))
        error = wrapped[0] if isinstance(wrapped, tuple) else wrapped
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}"
