"""Runs in processes of their own, one or several, forked from a server that has imported torch."""

import logging
import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

from mmalign.command import Stopped, reason
from mmalign.config import TrainConfig
from mmalign.errors import UserError
from mmalign.training.loop import train

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload([__name__])


@dataclass
class Running:
    processes: list[BaseProcess]
    folder: Path

    def outputs(self) -> list[str]:
        """What each process has printed so far."""
        files = (self.folder / f"output_{rank}.txt" for rank in range(len(self.processes)))
        return [file.read_text() if file.exists() else "" for file in files]

    def wait(self, seconds: float = 120.0) -> list[int]:
        """Exit codes; kills what has not ended in time."""
        end = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
        self.send(signal.SIGKILL)
        for process in self.processes:
            process.join()
        return [process.exitcode for process in self.processes]

    def send(self, number: int) -> None:
        for process in self.processes:
            if process.is_alive():
                os.kill(process.pid, number)

    def succeed(self) -> None:
        assert self.wait() == [0] * len(self.processes), "\n".join(self.outputs())[-4000:]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(
    config: TrainConfig,
    world_size: int = 1,
    prepare: Callable[[int], None] | None = None,
) -> Running:
    """Trains in `world_size` processes. prepare(rank), a function of a module, runs first."""
    folder = config.run_dir.with_name(f"{config.run_dir.name}_output").absolute()
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    processes = [
        _context.Process(target=_run, args=(config, rank, world_size, port, folder, prepare))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    return Running(processes, folder)


def _run(config, rank, world_size, port, folder, prepare) -> None:
    with open(folder / f"output_{rank}.txt", "w", buffering=1) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        sys.stdout = sys.stderr = file
        logging.basicConfig(level=logging.INFO, format="%(message)s", force=True, stream=file)
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        if prepare:
            prepare(rank)
        try:
            train(config)
        except (UserError, Stopped) as error:
            print(f"error: {error}")
            sys.exit(1)
        except OSError as error:  # as command_line ends a script
            print(f"error: {reason(error)}")
            sys.exit(1)
        except Exception:
            traceback.print_exc()  # while the file is open
            sys.exit(1)
