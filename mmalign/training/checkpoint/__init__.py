"""Checkpoints: folders run_dir/checkpoints/step_N, complete or absent.

The state is copied to the host while the loop waits, and written by a thread while it goes on. The
folder has another name until every rank has written its files, they are on the disk and the
manifest lists their sizes and checksums; the previous checkpoint stays until then. staging.py is
the copy on the host, writers.py has the ranks that write, manifest.py tells a corrupt checkpoint.
"""

import logging
import re
import shutil
import threading
import warnings
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException

from mmalign.distributed import DistributedContext, lost_peer, new_cpu_group
from mmalign.errors import UserError
from mmalign.training.checkpoint import manifest
from mmalign.training.checkpoint.reader import Reader
from mmalign.training.checkpoint.staging import Staging
from mmalign.training.checkpoint.writers import Alone, Together

log = logging.getLogger("mmalign")


class CheckpointError(UserError):
    """A checkpoint could not be written; the message says which one is safe."""


class Checkpoints:
    def __init__(
        self,
        folder: Path,
        keep: int,
        ranks: DistributedContext,
        collective: bool,
        facts: Mapping[str, str] | None = None,
    ):
        """collective: every rank writes its shards; otherwise the main one writes everything.

        facts: stand in every manifest; a checkpoint with others is not read.
        """
        self.folder, self.keep, self.ranks, self.facts = folder, keep, ranks, facts or {}
        self.group = None  # of the writing threads alone; the loop uses the other groups meanwhile
        if collective:
            self.group = new_cpu_group(timedelta(hours=12))
        self.staging = Staging(ranks.device)
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None
        self.newest = 0  # step of the checkpoint that was read or begun last

    # ---- what exists ----

    def steps(self) -> list[int]:
        """Steps with a folder of the final name, ascending."""
        names = (re.fullmatch(r"step_([1-9][0-9]*)", x.name) for x in self.folder.glob("step_*"))
        return sorted(int(name[1]) for name in names if name)

    def path(self, step: int) -> Path:
        return self.folder / f"step_{step}"

    def latest_step(self) -> int:
        """Step of the newest intact checkpoint; 0 without one. Called by all ranks.

        A corrupt checkpoint, or one of another run or step, is reported and renamed to
        corrupt_step_N.
        """
        step = self._newest_intact() if self.ranks.is_main else 0
        self.newest = self.ranks.broadcast_from_main(step)
        return self.newest

    def _newest_intact(self) -> int:
        for incomplete in self.folder.glob("incomplete_*"):  # left by a run that was killed
            shutil.rmtree(incomplete)
        corrupt = []
        for step in reversed(self.steps()):
            problem = manifest.problem(self.path(step), step, self.facts)
            if problem is None:
                if corrupt:
                    log.warning("%s. Resuming from step %d.", "; ".join(corrupt), step)
                return step
            aside = self.folder / f"corrupt_step_{step}"
            shutil.rmtree(aside, ignore_errors=True)
            self.path(step).rename(aside)
            corrupt.append(f"the checkpoint of step {step} {problem} (now {aside})")
        if corrupt:
            raise UserError(
                f"{'; '.join(corrupt)}. No intact checkpoint is left. Rerun the same command "
                "to start from step 0, or restore a copy of a checkpoint first"
            )
        return 0

    # ---- writing ----

    def check_disk(self, state: dict[str, Tensor]) -> None:
        """Raises UserError where the disk cannot take the checkpoints of the whole run."""
        copies = self.keep + 1 - len(self.steps())  # the oldest goes when the newest is complete
        self._check_space(state, max(1, copies))

    def _check_space(self, state: dict[str, Tensor], copies: int = 1) -> None:
        required = copies * sum(tensor.numel() * tensor.element_size() for tensor in state.values())
        self.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.folder).free
        if free < required * 1.02 + 2**20:
            what = "a checkpoint needs" if copies == 1 else f"{copies} checkpoints need"
            raise UserError(
                f"{what} {required / 2**30:.2f} GiB, but {self.folder} has {free / 2**30:.2f} GiB "
                f"free. {self.what_remains()} Free some space, lower --checkpoint.keep or use "
                "another --run-dir."
            )

    def start(self, step: int, state: dict[str, Tensor]) -> None:
        """Copies the state after `step` optimizer steps and writes it in the background.

        Called by all ranks. Waits for the previous write, and raises its CheckpointError.
        """
        self.wait()
        if step == self.newest:
            return
        self.newest = step
        if self.group is None and not self.ranks.is_main:
            return
        staged = self.staging.copy(state)
        # not a daemon: a process that exits meanwhile waits for it
        self.thread = threading.Thread(target=self._try_to_write, args=(step, staged))
        self.thread.start()

    @property
    def failed(self) -> bool:
        """Whether the last write has failed so far; does not wait for it."""
        return self.error is not None

    def wait(self) -> None:
        """Blocks until nothing is being written. Raises CheckpointError if that failed."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        if self.error is not None:
            error, self.error = self.error, None
            raise error

    def finish(self) -> None:
        """As wait, for the writes of all ranks, which all call it before they exit.

        A launcher kills the other ranks as soon as the first one exits with an error.
        """
        error = None
        try:
            self.wait()
        except CheckpointError as caught:
            error = caught
        try:
            of_main = self.ranks.broadcast_from_main(None if error is None else str(error))
        finally:
            if error is not None:  # also where the ranks cannot tell each other any more
                raise error
        if of_main is not None:
            raise CheckpointError(of_main)

    def save_alone(self, step: int, state: dict[str, Tensor]) -> None:
        """Writes unsharded tensors from this rank and waits; the first rank to call it writes."""
        claim = self.folder / f"incomplete_step_{step}_claim"
        try:
            claim.mkdir(parents=True)
        except FileExistsError:
            return
        try:
            if not self.path(step).exists():
                self._write(step, state, f"incomplete_step_{step}", Alone())
        finally:
            claim.rmdir()

    def _try_to_write(self, step: int, state: dict[str, Tensor]) -> None:
        writers = Alone() if self.group is None else Together(self.group)
        try:
            self._write(step, state, f"incomplete_step_{step}", writers)
        except BaseException as error:  # the loop raises it, in its own thread
            self.error = error

    def _write(self, step: int, state: dict[str, Tensor], name: str, writers: Alone) -> None:
        folder = self.folder / name
        try:
            writers.share(lambda: writers.is_first and self._make_folder(folder, state))
            writers.save(state, folder)
            parts = writers.share(lambda: manifest.describe(folder, writers.own_files(folder)))
            files = {file: facts for part in parts for file, facts in part.items()}
            writers.share(lambda: writers.is_first and self._complete(folder, step, files))
        except (Exception, CheckpointException) as error:  # the latter derives from BaseException
            cause = _root_cause(error)
            if self.group is not None:
                cause = lost_peer(cause, self.ranks.rank) or cause
            if shutil.disk_usage(self.folder).free < 2**20:  # PyTorch's messages do not say it
                cause = f"no space left on the disk ({cause})"
            if writers.is_first:
                shutil.rmtree(folder, ignore_errors=True)
            raise CheckpointError(
                f"the checkpoint of step {step} could not be written to {self.folder}: {cause}. "
                f"{self.what_remains()} Fix this and rerun the same command to resume."
            ) from error

    def _make_folder(self, folder: Path, state: dict[str, Tensor]) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        self._check_space(state)
        folder.mkdir(parents=True)

    def _complete(self, folder: Path, step: int, files: dict) -> None:
        """Gives the folder its final name, then deletes the oldest checkpoints."""
        manifest.write(folder, step, self.facts, files)
        try:
            folder.rename(self.path(step))
        except OSError:  # another rank saved the same step first
            shutil.rmtree(folder)
        manifest.flush_folder(self.folder)
        for old in self.steps()[: -self.keep]:
            # rename first, so that a partially deleted folder never looks valid
            deleted = self.path(old).rename(self.folder / f"incomplete_old_{old}")
            shutil.rmtree(deleted)

    # ---- reading ----

    def load(self, step: int, state: dict[str, Tensor]) -> None:
        """Fills the tensors of `state` in place, shards with their rows, on any number of ranks."""
        reader = Reader(self.path(step))
        reader.read_metadata()  # its UserError, which dcp.load would wrap
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is")
            try:
                dcp.load(state, storage_reader=reader, no_dist=True)
            except (Exception, CheckpointException) as error:
                raise UserError(
                    f"the checkpoint {self.path(step)} does not fit this run: {_root_cause(error)}."
                    " Remove this folder and rerun the same command to resume from the one before."
                ) from error

    def what_remains(self) -> str:
        """A sentence for error messages."""
        steps = self.steps()
        return f"Step {steps[-1]} is safe." if steps else "There is no earlier checkpoint."


def _root_cause(error: BaseException) -> str:
    """torch.distributed.checkpoint wraps errors; the innermost one is the most specific."""
    failures = getattr(error, "failures", None)
    if failures:
        wrapped = next(iter(failures.values()))
        error = wrapped[0] if isinstance(wrapped, tuple) else wrapped
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
