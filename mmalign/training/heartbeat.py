"""Per-rank progress reports, used to name the rank that hangs."""

import logging
import threading
import time
from collections import defaultdict

import torch.distributed as dist

from mmalign.distributed import DistributedContext
from mmalign.errors import UserError

log = logging.getLogger("mmalign")
# the phases of a step, in this order
PHASES = (
    "starting",
    "waiting for data",
    "computing",
    "waiting for the result",
    "evaluating",
    "saving",
)


class Heartbeat:
    """Use as a context manager around the loop, which reports its progress with `at`.

    A thread publishes that in the process group's store. When the loop has not moved for 80% of
    the process group's timeout, it logs where every rank is, the ones furthest behind first.
    """

    def __init__(self, ranks: DistributedContext, timeout_minutes: float):
        self.ranks, self.patience = ranks, timeout_minutes * 60 * 0.8
        self.interval = min(5.0, self.patience / 4)  # seconds between two reports
        self.place, self.since = (0, "starting"), time.monotonic()
        self.stopped = threading.Event()
        self.logged: tuple[int, str] | None = None  # the place that was reported as stuck
        self.store: dist.Store | None = None
        self.thread: threading.Thread | None = None
        if ranks.world_size > 1:
            store = dist.distributed_c10d._get_default_store()
            self.store = dist.PrefixStore("mmalign/heartbeat", store)
            self.thread = threading.Thread(target=self._watch, daemon=True, name="heartbeat")

    def __enter__(self) -> "Heartbeat":
        if self.thread:
            self._publish()
            self.ranks.barrier()  # now every rank has a key
            self.thread.start()
        return self

    def __exit__(self, kind, error, trace) -> None:
        self.stopped.set()
        if self.thread:
            self.thread.join()
        if self.thread and isinstance(error, RuntimeError) and _is_timeout(error):
            raise UserError(
                f"{self.report()}. The process group timed out. Fix the cause and rerun the same "
                "command to resume, with a larger --parallel.timeout-minutes if the rank was only "
                "slow."
            ) from error

    def at(self, step: int, phase: str) -> None:
        """step: counted from 1, as in metrics.jsonl; phase: one of PHASES."""
        self.place, self.since = (step, phase), time.monotonic()

    def _watch(self) -> None:
        while not self.stopped.wait(self.interval):
            try:
                self._publish()
            except RuntimeError:  # the process with the store has exited: the loop sees it too
                return
            place = self.place
            if time.monotonic() - self.since > self.patience and place != self.logged:
                self.logged = place
                log.error("%s", self.report())

    def _publish(self) -> None:
        assert self.store is not None, "a single process has nobody to tell"
        step, phase = self.place
        seconds = time.monotonic() - self.since
        self.store.set(str(self.ranks.rank), f"{step} {seconds:.0f} {time.time():.0f} {phase}")

    def report(self) -> str:
        """Ranks by place, the ones furthest behind first."""
        assert self.store is not None, "a single process has no ranks to report"
        places = defaultdict(list)
        for rank in range(self.ranks.world_size):
            try:
                published = self.store.get(str(rank)).decode()
            except RuntimeError as error:
                return f"no progress, and the process group's store does not answer: {error}"
            step, seconds, when, phase = published.split(" ", 3)
            silent = time.time() - int(when)
            places[int(step), PHASES.index(phase)].append((rank, int(seconds), silent))
        parts = []
        for (step, phase), ranks in sorted(places.items()):
            names = ", ".join(str(rank) for rank, _, _ in ranks)
            _, seconds, silent = (max(column) for column in zip(*ranks, strict=True))
            part = f"rank {names} in step {step}, {PHASES[phase]} for {seconds} s"
            if silent > 3 * self.interval:  # frozen or gone, with all its threads
                part += f" when last heard of {silent:.0f} s ago"
            parts.append(part)
        return f"no progress: {'; '.join(parts)}. See the log and the node of the first one"


def _is_timeout(error: RuntimeError) -> bool:
    text = str(error).lower()  # in gloo's and NCCL's words
    return "timed out" in text or "timeout" in text
