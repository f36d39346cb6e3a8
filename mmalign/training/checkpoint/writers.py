"""The ranks that write a checkpoint: one alone, or all together."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor


class Alone:
    """One rank writes everything, whatever the others do."""

    is_first = True
    rank = 0

    def share(self, work: Callable[[], Any]) -> list:
        """Results of `work` on every rank, after all have finished it.

        An error on one of them is raised on all, so that none waits for another.
        """
        return [work()]

    def save(self, state: dict[str, Tensor], folder: Path) -> None:
        """torch.distributed.checkpoint's files, flushed to the disk."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            dcp.save(state, storage_writer=dcp.FileSystemWriter(folder), no_dist=True)

    def own_files(self, folder: Path) -> list[str]:
        """Names of the files that this rank wrote."""
        shards = f"__{self.rank}_"
        return sorted(
            path.name
            for path in folder.iterdir()
            if path.name.startswith(shards) or (self.is_first and not path.name.startswith("__"))
        )


class Together(Alone):
    """All ranks write their shards; for their writing threads only."""

    def __init__(self, group: dist.ProcessGroup):
        self.group, self.rank = group, dist.get_rank(group)
        self.is_first = self.rank == 0

    def share(self, work: Callable[[], Any]) -> list:
        try:
            mine = (work(), None)
        except Exception as error:
            mine = (None, f"{type(error).__name__}: {error} (rank {self.rank})")
        results: list[Any] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(results, mine, group=self.group)
        for _, error in results:
            if error is not None:
                raise RuntimeError(error)
        return [value for value, _ in results]

    def save(self, state: dict[str, Tensor], folder: Path) -> None:
        writer = dcp.FileSystemWriter(folder)
        dcp.save(state, storage_writer=writer, process_group=self.group)
