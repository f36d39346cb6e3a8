"""Runs what is not done yet, several runs at once, beside other processes on the same study."""

import logging
import multiprocessing
import os
import signal
import time
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess

import torch

from mmalign.command import Stopped, StopSignal, progress_bar
from mmalign.errors import UserError
from mmalign.files import read_steps
from mmalign.study.forgetting import require_tasks
from mmalign.study.identity import Orders
from mmalign.study.plan import PRETRAIN, Run
from mmalign.study.run import IN_USE, delete_weights, execute, write_failure

log = logging.getLogger("mmalign")
_SECONDS = 2.0  # between looks at runs that other processes own

# processes are forked from a server that has imported everything, and has no GPU and no threads
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["mmalign.study.run"])


def run_study(orders: Orders, chosen: list[Run], jobs: int) -> dict[str, str]:
    """Returns why runs failed, by name. Raises Stopped when a signal has stopped them all."""
    if jobs < 1:
        raise UserError(f"--jobs is {jobs}, expected at least 1")
    if any(run.is_evaluated for run in chosen):
        require_tasks(orders.study.settings.forgetting)
    cores = len(os.sched_getaffinity(0))
    threads = max(1, cores // jobs)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # read when the server imports torch
    queue = _Queue(orders, chosen, jobs, int(os.environ["OMP_NUM_THREADS"]))
    queue.tidy()
    total = len(queue.todo)
    with (
        StopSignal() as stop,
        stop.raising(False),
        progress_bar(total=total, desc=orders.study.settings.name, unit="run") as bar,
    ):
        try:
            while queue.todo:
                queue.start_ready()
                bar.n = total - len(queue.todo)
                bar.set_postfix_str(queue.progress(), refresh=True)
                bar.update(0)
                wait([x.sentinel for x in queue.running.values()], timeout=_SECONDS)
                if stop.requested:
                    raise Stopped(f"with {total - len(queue.todo)} of {total} runs done")
                queue.reap()
            bar.n = total
        finally:
            queue.stop()
    return queue.failed


@dataclass
class _Queue:
    orders: Orders
    chosen: list[Run]
    jobs: int
    threads: int
    todo: list[Run] = field(default_factory=list)
    running: dict[Run, BaseProcess] = field(default_factory=dict)
    slots: dict[Run, int] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        self.began = time.time()
        self.gpus = _gpus()
        wanted = {run for run in self.chosen if self.orders.state(run) != "done"}
        wanted |= {run.pretrain for run in wanted if run.pretrain and not self._has(run.pretrain)}
        self.todo = [run for run in self.orders.study.runs if run in wanted]

    def _has(self, pretrain: Run) -> bool:
        return self.orders[pretrain].is_done()

    def start_ready(self) -> None:
        for run in [run for run in self.todo if run not in self.running]:
            state, outcome = self.orders.state(run), self.orders[run].outcome()
            if problem := self.orders.problem(run):
                self._give_up(run, problem)
            elif state == "done":  # by another process
                self.todo.remove(run)
            elif state == "failed" and outcome.get("time", 0) >= self.began:
                self._give_up(run, outcome["reason"])
            elif run.pretrain and run.pretrain.name in self.failed:
                self._give_up(run, f"{run.pretrain.name} failed")
            elif run.pretrain and not self._has(run.pretrain):
                if run.pretrain not in self.todo:
                    self.todo.insert(0, run.pretrain)
            elif state != "running" and len(self.running) < self.jobs:
                self._start(run)

    def _start(self, run: Run) -> None:
        slot = min(set(range(self.jobs)) - set(self.slots.values()))
        gpu = self.gpus[slot % len(self.gpus)] if self.gpus else ""
        process = _context.Process(
            target=execute, args=(self.orders[run], self.threads, gpu), name=run.name
        )
        process.start()
        self.running[run], self.slots[run] = process, slot

    def reap(self) -> None:
        """Takes note of the processes that have ended."""
        for run, process in list(self.running.items()):
            if process.is_alive():
                continue
            process.join()
            order, code = self.orders[run], process.exitcode or 0
            del self.running[run], self.slots[run]
            if code == IN_USE or (code == Stopped.exit_code):
                continue  # another process has it; or somebody stopped this one alone
            if code == 0:
                self.todo.remove(run)
                seconds = sum(order.outcome()["seconds"].values())
                log.info("done: %s in %.0f s", run.name, seconds)
                self.tidy()
                continue
            if order.outcome().get("outcome") != "failed":
                how = f"signal {-code}" if code < 0 else f"exit code {code}"
                write_failure(order, f"its process ended with {how}; see log.txt")
            self._give_up(run, order.outcome()["reason"])

    def _give_up(self, run: Run, why: str) -> None:
        self.todo.remove(run)
        self.failed[run.name] = why
        log.error("failed: %s: %s", run.name, why)

    def stop(self) -> None:
        """Every run saves and ends."""
        for process in self.running.values():
            if process.is_alive() and process.pid:
                os.kill(process.pid, signal.SIGTERM)
        for process in self.running.values():
            process.join()

    def tidy(self) -> None:
        """With keep = "scores", deletes the weights that nobody needs any more."""
        if self.orders.study.settings.keep != "scores":
            return
        for run in self.orders.study.runs:
            order = self.orders[run]
            if not order.config or self.orders.state(run) != "done":
                continue
            if run.variant != PRETRAIN or not self.orders.needed(run):
                delete_weights(order)

    def progress(self) -> str:
        """The runs in progress with their last steps."""
        return ", ".join(f"{run.name}{self._step(run)}" for run in self.running)

    def _step(self, run: Run) -> str:
        path = self.orders[run].train_dir / "metrics.jsonl"
        if not path.exists():
            return ""
        records, _ = read_steps(path)
        return f" step {records[-1]['step']:,}" if records else ""


def _gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES of one process can be; empty without a GPU."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name]
    return [str(i) for i in range(torch.cuda.device_count())]
