"""What a process sets before it uses its device, and how it leaves when a peer is lost."""

import multiprocessing
import os
import signal
import time

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from mmalign import distributed
from mmalign.distributed import start_distributed
from mmalign.errors import UserError
from tests.training.train_processes import free_port

NAMES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ({}, {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}),
        ({name: "max_split_size_mb:64" for name in NAMES[:1]}, None),
        ({name: "max_split_size_mb:64" for name in NAMES[1:]}, None),
    ],
    ids=("nothing", *NAMES),
)
def test_segments_grow_unless_the_user_configured_the_allocator(chosen, expected, monkeypatch):
    monkeypatch.setattr(os, "environ", {k: v for k, v in os.environ.items() if k not in NAMES})
    os.environ.update(chosen)
    seen = []

    def choose_device(device):  # the first to look at CUDA
        seen.append({k: v for k, v in os.environ.items() if k in NAMES})
        return real(device)

    real = distributed.choose_device
    monkeypatch.setattr(distributed, "choose_device", choose_device)
    with start_distributed("cpu", 1):
        assert seen == [chosen if expected is None else expected]


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2 and RANK is None"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "WORLD_SIZE is 2 and RANK is 2"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is 0"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK is '-1'"),
    ],
)
def test_an_environment_that_describes_no_process_group(variables, said, monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=said), start_distributed("cpu", 1):
        pass


class SlowToGo:
    """What a thread of gloo may be the last to hold: here it takes its time to let go."""

    def __del__(self):
        time.sleep(0.5)


def lose_a_peer(rank: int, port: int) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with start_distributed("cpu", 1) as ranks:
        model = DistributedDataParallel(torch.nn.Linear(1, 1))  # is freed with its group
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        torch._C._stash_obj_in_tls("context", SlowToGo())  # as every backward pass does
        torch.distributed.all_reduce(torch.zeros(1), async_op=True)
        torch._C._remove_obj_from_tls("context")
        ranks.barrier()
        del model


def test_who_loses_a_peer_ends_while_gloo_still_holds_a_python_object():
    """Whoever frees the process group waits for that thread, which waits for Python's lock."""
    context, port = multiprocessing.get_context("forkserver"), free_port()
    processes = [context.Process(target=lose_a_peer, args=(rank, port)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        process.kill()
        process.join()
    assert [process.exitcode for process in processes] == [1, -signal.SIGKILL]
