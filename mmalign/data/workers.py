"""How many processes load data where num_workers is auto. Batches do not depend on their number."""

import os
import socket
from typing import Literal

from mmalign.distributed import DistributedContext

NumWorkers = int | Literal["auto"]
MOST = 8  # a core decodes 450 pictures of 640 x 480 a second, more than any model here takes from 8


def choose_workers(
    wanted: NumWorkers, pictures: bool, ranks: DistributedContext
) -> tuple[int, str]:
    """The number, and why, for the log. All ranks call this; pictures: whether there are any."""
    if wanted != "auto":
        return wanted, "as --data.num-workers says"
    if not pictures:
        return 0, "text alone, which a thread makes ready during the step before"
    if ranks.device.type == "cpu":
        return 0, "the model computes on the cores; a thread decodes during the step before"
    share = _share_of_cores(ranks)
    number = max(1, min(MOST, int(share) - 1))
    return number, f"at most {MOST}, one core left to the model, {share:g} cores for each process"


def _share_of_cores(ranks: DistributedContext) -> float:
    """Cores that this process may use; one that n processes of the node may use counts 1 / n."""
    mine = socket.gethostname(), usable_cores()
    everyone = ranks.broadcast_from_main(ranks.gather_to_main(mine))
    others = [cores for host, cores in everyone if host == mine[0]]
    return sum(1 / sum(core in cores for cores in others) for core in mine[1])


def usable_cores() -> set[int]:
    """Those that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))
