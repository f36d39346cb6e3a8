"""The samples of every optimizer step, loaded ahead and packed.

The steps divide the endless concatenation of epochs: step i takes the places
[i * global_batch_size, (i + 1) * global_batch_size) of it. So every step has the full batch size,
may reach into the next epoch, and a run resumes from its step number alone.
"""

import logging
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from mmalign.batch import PackedBatch
from mmalign.data.check import CheckReport
from mmalign.data.dataset import ConversationDataset
from mmalign.data.packing import micro_batches, pack_samples
from mmalign.errors import SampleError, UserError

log = logging.getLogger("mmalign")
MAX_REPEATS = 100  # of a sample within one step


@dataclass(frozen=True)
class StepPlan:
    """Which samples each step takes: a new permutation in every epoch, or file order."""

    num_samples: int
    global_batch_size: int
    seed: int
    shuffle: bool

    def samples_of_step(self, step: int) -> np.ndarray:
        """Positions (global_batch_size,) int64 in [0, num_samples)."""
        drawn = np.arange(step * self.global_batch_size, (step + 1) * self.global_batch_size)
        epochs, within = np.divmod(drawn, self.num_samples)
        positions = within
        if self.shuffle:
            for epoch in np.unique(epochs):
                order = _epoch_order(self.num_samples, self.seed, int(epoch))
                positions = np.where(epochs == epoch, order[within], positions)
        return positions


@lru_cache(maxsize=2)
def _epoch_order(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    # RandomState, not default_rng: numpy promises that its streams never change
    return np.random.RandomState([seed, epoch]).permutation(num_samples)


def num_steps_of(num_samples: int, global_batch_size: int, num_epochs: float) -> int:
    """Optimizer steps that see every sample num_epochs times; the last may start another epoch."""
    return max(1, math.ceil(num_samples * num_epochs / global_batch_size))


@dataclass(frozen=True)
class Step:
    """One optimizer step."""

    index: int
    sample_ids: list[str]  # of all ranks
    batches: list[PackedBatch]  # of this rank
    num_loss_tokens: int  # of all ranks: the divisor of the step's loss
    num_tokens: int  # of all ranks, the shared prompt header of each sample included


class StepLoader:
    """Iterates the steps start_step, start_step + 1, ... num_steps - 1 of a run.

    Worker processes (num_workers) decode, tokenise and pack ahead, across step boundaries;
    without them a thread makes the next step. The output is independent of their number; it is in
    pinned memory when CUDA is available.

    Raises:
        UserError: before the first step, if the batch is far larger than the data, a sample or step
            does not fit micro_batch_tokens or (require_images: only the projector trains) a step
            has no image.
        SampleError: while iterating, if an image can no longer be read.
    """

    def __init__(
        self,
        dataset: ConversationDataset,
        report: CheckReport,
        *,
        global_batch_size: int,
        micro_batch_tokens: int,
        seed: int,
        num_steps: int,
        start_step: int = 0,
        num_workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
        require_images: bool = False,
        cost: Callable[[int, int, int], int] | None = None,
        prefix_length: int = 0,
    ):
        """cost: (tokens, targets, tiles) of a sample -> what is balanced over the ranks.

        None: its tokens. prefix_length: as in pack_samples; micro_batch_tokens does not count
        these tokens.
        """
        self.dataset, self.report = dataset, report
        _check_batch_size(global_batch_size, len(report.kept), rank)
        self.plan = StepPlan(len(report.kept), global_batch_size, seed, dataset.data.shuffle)
        self.micro_batch_tokens = micro_batch_tokens
        self.start_step, self.num_steps, self.num_workers = start_step, num_steps, num_workers
        self.rank, self.world_size = rank, world_size
        self.cost, self.prefix_length = cost, prefix_length
        self._check_lengths()
        if global_batch_size % world_size:  # otherwise one sample per micro-batch always works
            for step in range(start_step, num_steps):
                self._split(self.plan.samples_of_step(step))
        if require_images and not report.num_images.all():
            self._check_images()

    def __len__(self) -> int:
        return max(0, self.num_steps - self.start_step)

    def __iter__(self) -> Iterator[Step]:
        return self._steps() if self.num_workers else _ahead(self._steps())

    def _steps(self) -> Iterator[Step]:
        planned = deque()  # (step, positions, number of micro-batches); the sampler fills it ahead
        loader = DataLoader(
            _MicroBatches(self.dataset, self.prefix_length),
            batch_size=None,
            sampler=_Sampler(self, planned),
            num_workers=self.num_workers,
            prefetch_factor=2 if self.num_workers else None,
            worker_init_fn=_ignore_signals_to_the_launcher,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # the default would draw from the global generator
        )
        batches = []
        for loaded in loader:
            if "error" in loaded:
                raise SampleError(*loaded["error"])
            batches.append(PackedBatch(**loaded))
            step, positions, num_batches = planned[0]
            if len(batches) == num_batches:
                planned.popleft()
                yield self._step(step, positions, batches)
                batches = []

    def _step(self, step: int, positions: np.ndarray, batches: list[PackedBatch]) -> Step:
        dataset, report = self.dataset, self.report
        return Step(
            index=step,
            sample_ids=[dataset.id_of(int(i)) for i in report.kept[positions]],
            batches=batches,
            num_loss_tokens=int(report.num_loss_tokens[positions].sum()),
            num_tokens=int(report.lengths[positions].sum()),
        )

    def _split(self, positions: np.ndarray) -> list[list[list[int]]]:
        report = self.report
        lengths = (report.lengths[positions] - self.prefix_length).tolist()
        costs = None
        if self.cost is not None:
            columns = (report.lengths, report.num_loss_tokens, report.num_tiles)
            rows = zip(*(column[positions].tolist() for column in columns), strict=True)
            costs = [self.cost(*row) for row in rows]
        return micro_batches(lengths, self.micro_batch_tokens, self.world_size, costs)

    def _check_lengths(self) -> None:
        longest = int(self.report.lengths.argmax())
        length = int(self.report.lengths[longest]) - self.prefix_length
        if length > self.micro_batch_tokens:
            sample_id = self.dataset.samples[int(self.report.kept[longest])].id
            prefix = self.prefix_length
            header = f" after the shared header of {prefix} tokens" if prefix else ""
            raise UserError(
                f"sample {sample_id!r} has {length} tokens{header}, more than --micro-batch-tokens "
                f"{self.micro_batch_tokens}. Raise it to {length} or more"
            )

    def _check_images(self) -> None:
        for step in range(self.start_step, self.num_steps):
            positions = self.plan.samples_of_step(step)
            if not self.report.num_images[positions].any():
                first = self.dataset.samples[int(self.report.kept[positions[0]])].id
                raise UserError(
                    f"step {step} (samples from {first!r} on) has no image, so nothing to train. "
                    "Use a larger --global-batch-size, or data with an image in every sample"
                )


def _check_batch_size(global_batch_size: int, num_samples: int, rank: int) -> None:
    if global_batch_size <= num_samples:
        return
    what = f"--global-batch-size {global_batch_size} is more than the {num_samples} usable samples"
    if global_batch_size > MAX_REPEATS * num_samples:
        raise UserError(f"{what}. Use {num_samples} or fewer, so that a step has each sample once")
    if rank == 0:
        log.warning("%s, so a step has samples more than once", what)


def _ahead(steps: Iterator[Step]) -> Iterator[Step]:
    """The same steps and errors; a thread makes the next step while the caller uses this one."""
    # one thread of PyTorch's: all others belong to the step
    with ThreadPoolExecutor(1, "loader", torch.set_num_threads, (1,)) as thread:
        coming = thread.submit(next, steps, None)
        while (step := coming.result()) is not None:
            coming = thread.submit(next, steps, None)
            yield step


class _Sampler:
    """Plans step by step and yields the dataset indices of this rank's micro-batches."""

    def __init__(self, loader: StepLoader, planned: deque):
        self.loader, self.planned = loader, planned

    def __iter__(self) -> Iterator[list[int]]:
        loader = self.loader
        for step in range(loader.start_step, loader.num_steps):
            positions = loader.plan.samples_of_step(step)
            batches = loader._split(positions)[loader.rank]
            self.planned.append((step, positions, len(batches)))
            for batch in batches:
                yield loader.report.kept[positions[batch]].tolist()


class _MicroBatches(Dataset):
    """Runs in the worker processes: dataset indices to the fields of a PackedBatch."""

    def __init__(self, dataset: ConversationDataset, prefix_length: int):
        self.dataset, self.prefix_length = dataset, prefix_length

    def __getitem__(self, indices: list[int]) -> dict:
        dataset = self.dataset
        try:
            encoded = [dataset.encode(i) for i in indices]
            pixels = [dataset.load_pixels(i) for i in indices]
        except SampleError as error:  # torch cannot re-raise it with its arguments
            return {"error": (error.sample_id, error.problem, error.remedy)}
        image_token_id = dataset.tokenizer.image_token_id
        return vars(pack_samples(encoded, pixels, image_token_id, self.prefix_length))


def _ignore_signals_to_the_launcher(worker: int) -> None:
    """Moves the worker to a POSIX process group of its own.

    Launchers and terminals signal the whole group of the run, which needs its workers to finish the
    step. A worker still exits with the process that started it.
    """
    os.setpgid(0, 0)


def timed(steps: StepLoader) -> Iterator[tuple[Step, float]]:
    """Each step with the seconds spent waiting for it."""
    iterator = iter(steps)
    while True:
        started = time.perf_counter()
        step = next(iterator, None)
        if step is None:
            return
        yield step, time.perf_counter() - started
