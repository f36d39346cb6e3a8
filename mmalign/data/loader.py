"""How the samples of a step are cut into micro-batches, and their loading."""

import heapq
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader

from mmalign.batch import PackedBatch
from mmalign.data.check import CheckReport
from mmalign.data.dataset import ConversationDataset
from mmalign.data.packing import pack_samples
from mmalign.data.step_plan import StepPlan
from mmalign.errors import SampleError, UserError


def micro_batches(
    lengths: Sequence[int],
    micro_batch_tokens: int,
    world_size: int,
    costs: Sequence[int] | None = None,
) -> list[list[list[int]]]:
    """Cut a step into micro-batches of balanced cost, so that the processes finish together.

    Args:
        lengths: tokens of each sample of the step.
        costs: of each sample, in any unit; without them its tokens.
    Returns:
        For each rank its micro-batches, each the ascending indices of its samples. No micro-batch
        is empty or has more than micro_batch_tokens; every rank has the same number of them.
    Raises:
        UserError: there is no such cut.
    """
    lengths = [int(length) for length in lengths]
    costs = lengths if costs is None else list(costs)
    if len(lengths) < world_size:
        raise UserError(
            f"a global batch of {len(lengths)} samples cannot feed {world_size} processes. "
            "Raise --global-batch-size or start fewer"
        )
    fewest = max(1, math.ceil(sum(lengths) / micro_batch_tokens / world_size))
    for per_rank in range(fewest, len(lengths) // world_size + 1):
        bins = _balanced_bins(lengths, costs, micro_batch_tokens, per_rank * world_size)
        if bins is not None:
            return _deal(bins, world_size)
    raise UserError(
        f"{len(lengths)} samples of {sum(lengths)} tokens do not fit micro-batches of at most "
        f"{micro_batch_tokens} tokens, the same number in each of {world_size} processes. "
        "Raise --micro-batch-tokens, or make --global-batch-size a multiple of the processes"
    )


def _balanced_bins(
    lengths: list[int], costs: list[int], most_tokens: int, num_bins: int
) -> list[tuple[int, list[int]]] | None:
    """(cost, indices) a bin: each sample, dearest first, to the cheapest bin with room for it."""
    bins = [(0, i, 0, []) for i in range(num_bins)]  # (cost, settles ties, tokens, indices)
    for index in sorted(range(len(lengths)), key=lambda i: (-costs[i], -lengths[i], i)):
        full = []
        while bins and bins[0][2] + lengths[index] > most_tokens:
            full.append(heapq.heappop(bins))
        if not bins:
            return None
        cost, i, tokens, indices = bins[0]
        fuller = (cost + costs[index], i, tokens + lengths[index], [*indices, index])
        heapq.heapreplace(bins, fuller)
        for item in full:
            heapq.heappush(bins, item)
    return [(cost, sorted(indices)) for cost, _, _, indices in bins]


def _deal(bins: list[tuple[int, list[int]]], world_size: int) -> list[list[list[int]]]:
    """Dearest bins first, to and fro over the ranks, so that ranks keep pace and totals agree."""
    bins = sorted(bins, key=lambda item: (-item[0], item[1]))
    ranks = [[] for _ in range(world_size)]
    for i, (_, indices) in enumerate(bins):
        turn, place = divmod(i, world_size)
        ranks[place if turn % 2 == 0 else world_size - 1 - place].append(indices)
    return ranks


@dataclass(frozen=True)
class Step:
    """One optimizer step."""

    index: int
    sample_ids: list[str]  # of all ranks
    batches: list[PackedBatch]  # of this rank
    num_loss_tokens: int  # of all ranks: what the step's loss is divided by
    num_tokens: int  # of all ranks and whole samples, without rows or not


class StepLoader:
    """Iterates the steps start_step, start_step + 1, ... num_steps - 1 of a run.

    Worker processes (data.num_workers) decode, tokenise and pack ahead, across the ends of steps;
    what they give does not depend on their number. In pinned memory where CUDA is there.

    Raises:
        UserError: a sample or step that does not fit micro_batch_tokens, or (require_images, where
            only images are trained on) a step without any image: all before the first step.
        SampleError: while iterating, an image that can no longer be read.
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
        rank: int = 0,
        world_size: int = 1,
        require_images: bool = False,
        cost: Callable[[int, int, int], int] | None = None,
        prefix_length: int = 0,
    ):
        """cost: of a sample's tokens, targets and images; what the ranks' shares are balanced by.

        Without it the tokens alone. prefix_length: as pack_samples takes it; micro_batch_tokens
        then counts the tokens that have rows.
        """
        self.dataset, self.report = dataset, report
        self.plan = StepPlan(len(report.kept), global_batch_size, seed, dataset.data.shuffle)
        self.micro_batch_tokens = micro_batch_tokens
        self.start_step, self.num_steps = start_step, num_steps
        self.rank, self.world_size = rank, world_size
        self.cost, self.prefix_length = cost, prefix_length
        self._check_lengths()
        if global_batch_size % world_size:  # otherwise one sample a micro-batch always works
            for step in range(start_step, num_steps):
                self._cut(self.plan.samples_of_step(step))
        if require_images and not report.num_images.all():
            self._check_images()

    def __len__(self) -> int:
        return max(0, self.num_steps - self.start_step)

    def __iter__(self) -> Iterator[Step]:
        planned = deque()  # (step, positions, number of micro-batches), filled ahead by the sampler
        num_workers = self.dataset.data.num_workers
        loader = DataLoader(
            _MicroBatches(self.dataset, self.prefix_length),
            batch_size=None,
            sampler=_Sampler(self, planned),
            num_workers=num_workers,
            prefetch_factor=2 if num_workers else None,
            worker_init_fn=_leave_process_group,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # otherwise it draws from the global generator
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
        samples, report = self.dataset.samples, self.report
        return Step(
            index=step,
            sample_ids=[samples[int(i)].id for i in report.kept[positions]],
            batches=batches,
            num_loss_tokens=int(report.num_loss_tokens[positions].sum()),
            num_tokens=int(report.lengths[positions].sum()),
        )

    def _cut(self, positions: np.ndarray) -> list[list[list[int]]]:
        report = self.report
        lengths = (report.lengths[positions] - self.prefix_length).tolist()
        costs = None
        if self.cost is not None:
            columns = (report.lengths, report.num_loss_tokens, report.num_images)
            facts = zip(*(column[positions].tolist() for column in columns), strict=True)
            costs = [self.cost(*sample) for sample in facts]
        return micro_batches(lengths, self.micro_batch_tokens, self.world_size, costs)

    def _check_lengths(self) -> None:
        longest = int(self.report.lengths.argmax())
        length = int(self.report.lengths[longest]) - self.prefix_length
        if length > self.micro_batch_tokens:
            sample_id = self.dataset.samples[int(self.report.kept[longest])].id
            behind = f" after the {self.prefix_length} of all samples" if self.prefix_length else ""
            raise UserError(
                f"sample {sample_id!r} has {length} tokens{behind}, more than --micro-batch-tokens "
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


class _Sampler:
    """Plans step after step and yields the dataset indices of this rank's micro-batches."""

    def __init__(self, loader: StepLoader, planned: deque):
        self.loader, self.planned = loader, planned

    def __iter__(self) -> Iterator[list[int]]:
        loader = self.loader
        for step in range(loader.start_step, loader.num_steps):
            positions = loader.plan.samples_of_step(step)
            batches = loader._cut(positions)[loader.rank]
            self.planned.append((step, positions, len(batches)))
            for batch in batches:
                yield loader.report.kept[positions[batch]].tolist()


class _MicroBatches:
    """What runs in the worker processes: dataset indices to the fields of a PackedBatch."""

    def __init__(self, dataset: ConversationDataset, prefix_length: int):
        self.dataset, self.prefix_length = dataset, prefix_length

    def __getitem__(self, indices: list[int]) -> dict:
        dataset = self.dataset
        try:
            encoded = [dataset.encode(i) for i in indices]
            pixels = [dataset.load_pixels(i) for i in indices]
        except SampleError as error:  # returned: torch cannot raise it again with its arguments
            return {"error": (error.sample_id, error.problem, error.remedy)}
        image_token_id = dataset.tokenizer.image_token_id
        return vars(pack_samples(encoded, pixels, image_token_id, self.prefix_length))


def _leave_process_group(worker: int) -> None:
    """Launchers and terminals ask whole groups to stop; a run needs its workers for its last step.

    A worker ends with the process that started it, in whatever group.
    """
    os.setpgid(0, 0)


def timed(steps: StepLoader) -> Iterator[tuple[Step, float]]:
    """Each item with the seconds that it was waited for."""
    iterator = iter(steps)
    while True:
        started = time.perf_counter()
        step = next(iterator, None)
        if step is None:
            return
        yield step, time.perf_counter() - started
