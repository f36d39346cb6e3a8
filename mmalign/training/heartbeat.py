"""Who is where: each process tells the others, so that one that is stuck can be named."""

import logging
import threading
import time
from collections import defaultdict

import torch.distributed as dist

from mmalign.distributed import Ranks
from mmalign.errors import UserError

log = logging.getLogger("mmalign")
# what a process does in a step, in this order
PHASES = (
    "starting",
    "waiting for data",
    "computing",
    "waiting for the result",
    "evaluating",
    "saving",
)


class Heartbeat:
    """Use as a context manager around the loop, which tells `at` where it is.

    A thread puts that into the process group's store. Where the loop has not moved for 80% of the
    time after which the process group gives up, it logs where every process is, those that are
    furthest behind first.
    """

    def __init__(self, ranks: Ranks, timeout_minutes: float):
        self.ranks, self.patience = ranks, timeout_minutes * 60 * 0.8
        self.interval = min(5.0, self.patience / 4)  # seconds between what a process tells
        self.place, self.since = (0, "starting"), time.monotonic()
        self.stopped = threading.Event()
        self.reported = None
        self.thread = None
        if ranks.world_size > 1:
            store = dist.distributed_c10d._get_default_store()
            self.store = dist.PrefixStore("mmalign/heartbeat", store)
            self.thread = threading.Thread(target=self._watch, daemon=True, name="heartbeat")

    def __enter__(self) -> "Heartbeat":
        if self.thread:
            self._tell()
            self.ranks.barrier()  # now every process has a key
            self.thread.start()
        return self

    def __exit__(self, kind, error, trace) -> None:
        self.stopped.set()
        if self.thread:
            self.thread.join()
        if self.thread and isinstance(error, RuntimeError) and _is_timeout(error):
            raise UserError(f"{self.report()}. The process group gave up waiting") from error

    def at(self, step: int, doing: str) -> None:
        """step: optimizer steps, counted from 1 as in metrics.jsonl."""
        self.place, self.since = (step, doing), time.monotonic()

    def _watch(self) -> None:
        while not self.stopped.wait(self.interval):
            try:
                self._tell()
            except RuntimeError:  # the process that keeps the store has ended: the loop sees it too
                return
            place = self.place
            if time.monotonic() - self.since > self.patience and place != self.reported:
                self.reported = place
                log.error(self.report())

    def _tell(self) -> None:
        step, doing = self.place
        seconds = time.monotonic() - self.since
        self.store.set(str(self.ranks.rank), f"{step} {seconds:.0f} {time.time():.0f} {doing}")

    def report(self) -> str:
        """Ranks by place, the one furthest behind first."""
        places = defaultdict(list)
        for rank in range(self.ranks.world_size):
            try:
                told = self.store.get(str(rank)).decode()
            except RuntimeError as error:
                return f"no progress, and the process group's store does not answer: {error}"
            step, seconds, when, doing = told.split(" ", 3)
            silent = time.time() - int(when)
            places[int(step), PHASES.index(doing)].append((rank, int(seconds), silent))
        parts = []
        for (step, phase), ranks in sorted(places.items()):
            names = ", ".join(str(rank) for rank, _, _ in ranks)
            _, seconds, silent = (max(column) for column in zip(*ranks, strict=True))
            part = f"rank {names} in step {step}, {PHASES[phase]} for {seconds} s"
            if silent > 3 * self.interval:  # frozen or gone, with all its threads
                part += f" when last heard of {silent:.0f} s ago"
            parts.append(part)
        return f"no progress: {'; '.join(parts)}. Look at the first one's node and log"


def _is_timeout(error: RuntimeError) -> bool:
    text = str(error).lower()  # gloo's and NCCL's words
    return "timed out" in text or "timeout" in text
