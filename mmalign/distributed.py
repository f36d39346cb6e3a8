"""The processes of a run: one alone, or as many as torchrun started."""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from mmalign.errors import UserError
from mmalign.system import choose_device

CPU_GROUP_TIMEOUT = timedelta(days=7)  # the main process may check data or export for hours
# how gloo, NCCL and the store say that a rank has exited
_LOST = ("closed by peer", "reset by peer", "broken pipe", "remote process exited", "got 0 bytes")

T = TypeVar("T")


@dataclass(frozen=True)
class DistributedContext:
    """This process's rank and device, and the collectives that the trainer uses."""

    rank: int
    world_size: int
    device: torch.device
    cpu_group: dist.ProcessGroup | None = None  # gloo, for waits that may take long

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier(group=self.cpu_group)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over all ranks, in place; the host does not wait for a GPU."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on one of the ranks, which all call this; waits for them."""
        return bool(self.sum(torch.tensor(float(flag), device=self.device)) > 0)

    def broadcast_from_main(self, value: T) -> T:
        """The main process's value, on every process."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.cpu_group)
        return box[0]

    def gather_to_main(self, value: T) -> list[T]:
        """Every rank's value, in order, on the main process; an empty list on the others."""
        if self.world_size == 1:
            return [value]
        box: list[Any] = [None] * self.world_size
        dist.gather_object(value, box if self.is_main else None, dst=0, group=self.cpu_group)
        return box if self.is_main else []

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """The main process runs the block before the others, which then find its files."""
        if not self.is_main:
            self.barrier()
        yield
        if self.is_main:
            self.barrier()


@contextmanager
def start_distributed(device: str, timeout_minutes: float) -> Iterator[DistributedContext]:
    """Joins the process group that torchrun describes in the environment, and leaves it at the end.

    Without torchrun it is one process. A collective that takes longer than timeout_minutes fails.

    Raises:
        UserError: another rank has exited, this one has no GPU of its own, or the environment does
            not describe a process group.
    """
    _set_allocator()
    world_size = _check_environment()
    chosen = choose_device(device)
    if chosen.type == "cuda":
        _check_gpu(chosen)
        torch.cuda.set_device(chosen)
    if world_size == 1:
        yield DistributedContext(0, 1, chosen)
        return
    backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(minutes=timeout_minutes))
    rank = dist.get_rank()
    try:
        yield DistributedContext(rank, world_size, chosen, new_cpu_group(CPU_GROUP_TIMEOUT))
    except BaseException as error:
        _never_free_process_group()
        lost = lost_peer(str(error), rank) if isinstance(error, RuntimeError) else None
        if lost is None:
            raise
        raise UserError(
            f"{lost}. Fix the cause there and rerun the same command to resume."
        ) from error
    finally:
        dist.destroy_process_group()


def lost_peer(error: str, rank: int) -> str | None:
    """Which rank saw it, where the text of a collective's error says that another rank exited."""
    if not any(words in error.lower() for words in _LOST):
        return None
    return f"rank {rank} lost its connection to a rank that exited; see that rank's log"


def _never_free_process_group() -> None:
    """DistributedDataParallel frees it, with Python's lock held, and waits for gloo's threads.

    After a failed collective, one of them may wait for that lock, to free a Python object of which
    it holds the last reference: neither would end.
    """
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(dist.group.WORLD))


def new_cpu_group(timeout: timedelta) -> dist.ProcessGroup:
    """Another group of all ranks, over gloo; all of them make it together."""
    group = dist.new_group(backend="gloo", timeout=timeout)
    assert isinstance(group, dist.ProcessGroup)  # what else it returns is for ranks outside of it
    return group


def _check_environment() -> int:
    """WORLD_SIZE; other jobs leave such variables behind, and without a peer a rank would wait."""
    remedy = "Start several processes with torchrun, or unset WORLD_SIZE, RANK and LOCAL_RANK"
    found = {name: os.environ.get(name) for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK")}
    for name, value in found.items():
        if value is not None and not (value.isascii() and value.isdigit()):
            raise UserError(f"{name} is {value!r} in the environment; expected a number. {remedy}")
    world_size, rank = int(found["WORLD_SIZE"] or 1), found["RANK"]
    if world_size != 1 and (rank is None or int(rank) >= world_size):
        raise UserError(
            f"WORLD_SIZE is {world_size} and RANK is {rank} in the environment; expected ranks "
            f"from 0 to WORLD_SIZE - 1. {remedy}"
        )
    return world_size


def _set_allocator() -> None:
    """Micro-batches differ in length, so blocks of fixed size would leave gaps that fit nothing.

    PyTorch reads the variable when CUDA starts. Its effect is not measured yet.
    """
    if "PYTORCH_ALLOC_CONF" not in os.environ:  # the newer name of the same variable
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")


def _check_gpu(device: torch.device) -> None:
    visible = torch.cuda.device_count()
    if device.index is not None and device.index >= visible:
        raise UserError(
            f"process {device.index} of this node has no GPU: {visible} visible. Start as many "
            "processes per node as it has GPUs, and let each process see all of them."
        )
