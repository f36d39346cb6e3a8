"""How threads of OpenMP wait: awake on processors of their own, asleep beside other processes.

GNU's OpenMP, which PyTorch's wheels bring, lets a thread that waits for the others spin 300,000
turns (milliseconds) before it sleeps. On an idle machine that saves the time of waking up, a tenth
of a small training step. Where other processes want the processors, the spinning threads take the
time that the one they wait for needs: such a step beside six busy processes took 30 times as long.

libgomp reads one thing anew at every wait: with more threads than processors, it spins 100 turns.
So a watch (below) reads how long the main thread waits for a processor, and as long as it has to,
holds a team of threads that do nothing. Where Linux does not tell, threads always spin 1,000 turns.

https://gcc.gnu.org/onlinedocs/libgomp/GOMP_005fSPINCOUNT.html
https://docs.kernel.org/scheduler/sched-stats.html
https://openmp.llvm.org/design/Runtimes.html#kmp-blocktime
"""

import ctypes
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

_TIMES = Path("/proc/self/schedstat")  # of the main thread
_CHOICES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")  # of the user
_WATCHED = {"KMP_BLOCKTIME": "0"}  # ms: Intel's and LLVM's OpenMP, which the watch cannot change
_UNWATCHED = _WATCHED | {"GOMP_SPINCOUNT": "1000"}

CHECK_SECONDS = 0.1
BUSY_SHARE = 0.25  # idle: up to 0.2; on two processors beside one busy process 0.4, six 0.75
CALM_CHECKS = 10  # in a row, before threads spin again


def choose_how_threads_wait() -> None:
    """Before PyTorch is loaded, with which OpenMP reads its settings. The user's own come first."""
    settings = _WATCHED if times_are_told() else _UNWATCHED
    if "torch" in sys.modules or _chosen() not in ({}, settings):
        return
    os.environ.update(settings)
    if settings == _WATCHED:
        threading.Thread(target=ProcessorWatch().run, name="processor watch", daemon=True).start()


def describe() -> str:
    """For a run's log: what is set, and why."""
    chosen = _chosen()
    watched = any(thread.name == "processor watch" for thread in threading.enumerate())
    if watched and _libgomp() is not None:
        return (
            "threads that wait spin while this process has its processors to itself, and soon "
            "sleep beside other processes (OMP_WAIT_POLICY or GOMP_SPINCOUNT choose for good)"
        )
    settings = " ".join(f"{name}={value}" for name, value in chosen.items())
    if chosen in (_WATCHED, _UNWATCHED):
        return f"{settings}: threads that wait soon sleep, so that other processes can run"
    return f"how threads wait: {settings or 'as OpenMP does by default'}"


def times_are_told() -> bool:
    """Some kernels have no such file, and some write zeros into it."""
    try:
        return int(_TIMES.read_text().split()[0]) > 0
    except (OSError, ValueError, IndexError):
        return False


def _chosen() -> dict[str, str]:
    return {name: os.environ[name] for name in _CHOICES if name in os.environ}


def _libgomp() -> ctypes.CDLL | None:
    """GNU's OpenMP as PyTorch uses it; None where PyTorch is not loaded yet or has another one."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.__file__:
        return None
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    with suppress(OSError):  # not loaded
        loaded = ctypes.CDLL(str(library), mode=os.RTLD_NOLOAD | os.RTLD_NOW)  # finds its own
        if hasattr(loaded, "GOMP_parallel") and not hasattr(loaded, "kmp_get_blocktime"):
            return loaded
    return None


class IdleThreads:
    """One thread more than there are processors in a team of libgomp's, all blocked."""

    def __init__(self, libgomp: ctypes.CDLL):
        self.number = libgomp.omp_get_num_procs() + 1
        self.libc = ctypes.CDLL(None)
        self.semaphore = ctypes.create_string_buffer(128)  # a sem_t: 32 bytes in glibc and musl
        self.libc.sem_init(self.semaphore, 0, 0)
        team = (self.libc.sem_wait, self.semaphore, self.number, 0)
        self.thread = threading.Thread(target=libgomp.GOMP_parallel, args=team, daemon=True)

    @classmethod
    def start(cls) -> "IdleThreads | None":
        """None where no thread of GNU's OpenMP waits for another."""
        libgomp = _libgomp()
        if libgomp is None or libgomp.omp_get_max_threads() == 1:
            return None
        idle_threads = cls(libgomp)
        idle_threads.thread.start()
        return idle_threads

    def is_alive(self) -> bool:
        """A signal ends the wait of the thread that it is handled by."""
        return self.thread.is_alive()

    def end(self) -> None:
        for _ in range(self.number):
            self.libc.sem_post(self.semaphore)
        self.thread.join()


class ProcessorWatch:
    """Holds idle threads while the main thread has to wait for a processor."""

    def __init__(self, start: Callable[[], IdleThreads | None] = IdleThreads.start):
        self.start = start
        self.idle_threads: IdleThreads | None = None
        self.calm = 0  # checks in a row
        self.times = (0, 0)

    def run(self) -> None:
        while True:
            self.check(*map(int, _TIMES.read_text().split()[:2]))
            time.sleep(CHECK_SECONDS)

    def check(self, ran: int, waited: int) -> None:
        """ran, waited: nanoseconds of the main thread on and for a processor, since it began."""
        last, self.times = self.times, (ran, waited)
        ran, waited = ran - last[0], waited - last[1]
        if ran + waited < CHECK_SECONDS * 1e9 / 10:  # it slept, which tells nothing
            return
        if waited > BUSY_SHARE * (ran + waited):
            self.calm = 0
            if not (self.idle_threads and self.idle_threads.is_alive()):
                self.idle_threads = self.start()
        elif self.idle_threads:
            self.calm += 1
            if self.calm == CALM_CHECKS:
                self.idle_threads.end()
                self.idle_threads = None
