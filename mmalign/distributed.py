"""The processes of a run: one alone, or as many as torchrun started."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from mmalign.errors import UserError
from mmalign.system import choose_device

PATIENCE = timedelta(days=7)  # waiting for the main process to check data or to export takes long
# how gloo, NCCL and the store say that another process is gone
LOST = ("closed by peer", "reset by peer", "broken pipe", "remote process exited", "got 0 bytes")


@dataclass(frozen=True)
class Ranks:
    rank: int
    world_size: int
    device: torch.device
    patient: dist.ProcessGroup | None = None  # on the host, for waits that may be long

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier(group=self.patient)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over all processes, in place; the host does not wait for a GPU."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def from_main(self, value):
        """The main process's value, on every process."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.patient)
        return box[0]

    def gather(self, value) -> list:
        """Every process's value in order on the main process, nothing on the others."""
        if self.world_size == 1:
            return [value]
        box = [None] * self.world_size if self.is_main else None
        dist.gather_object(value, box, dst=0, group=self.patient)
        return box or []

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """The main process runs the block before the others, which then find its files."""
        if not self.is_main:
            self.barrier()
        yield
        if self.is_main:
            self.barrier()


@contextmanager
def start_ranks(device: str, timeout_minutes: float) -> Iterator[Ranks]:
    """Joins the process group that torchrun set up in the environment, if any, and leaves it.

    A collective operation that takes longer than timeout_minutes ends the run.

    Raises:
        UserError: another process has ended, or this one has no GPU of its own.
    """
    chosen = choose_device(device)
    if chosen.type == "cuda":
        _check_gpu(chosen)
        torch.cuda.set_device(chosen)
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if world_size == 1:
        yield Ranks(0, 1, chosen)
        return
    backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(minutes=timeout_minutes))
    rank = dist.get_rank()
    try:
        patient = dist.new_group(backend="gloo", timeout=PATIENCE)
        yield Ranks(rank, world_size, chosen, patient)
    except RuntimeError as error:
        if not any(words in str(error).lower() for words in LOST):
            raise
        raise UserError(
            f"process {rank} has lost the connection to another one, which has ended: look for "
            "the message of that one. The same command continues the run"
        ) from error
    finally:
        dist.destroy_process_group()


def _check_gpu(device: torch.device) -> None:
    visible = torch.cuda.device_count()
    if device.index is not None and device.index >= visible:
        raise UserError(
            f"process {device.index} of this node has no GPU: {visible} visible. Start as many "
            "processes a node as it has GPUs, each of which sees all of them"
        )
