"""How threads of OpenMP wait: briefly, so that other processes get their cores.

GNU's OpenMP, which PyTorch's wheels bring, lets a thread that waits for the others spin 300,000
turns (milliseconds) before it sleeps, and Intel's and LLVM's 200 ms. On an idle machine that saves
the time of waking up. Where other processes want the cores, the spinning threads take the time that
the one they wait for needs: a small training step beside six busy processes took 30 times as long.
1,000 turns (75 us on an EPYC) bridge the gap between two operations of a step, and no more.

https://gcc.gnu.org/onlinedocs/libgomp/GOMP_005fSPINCOUNT.html
https://openmp.llvm.org/design/Runtimes.html#kmp-blocktime
"""

import os
import sys

SETTINGS = {"GOMP_SPINCOUNT": "1000", "KMP_BLOCKTIME": "0"}  # of each runtime's own; ms of Intel's
_CHOICES = (*SETTINGS, "OMP_WAIT_POLICY", "KMP_LIBRARY")  # of the user: each leaves all as it is


def let_waiting_threads_sleep() -> None:
    """To be called before PyTorch is loaded, with which OpenMP reads its settings."""
    if "torch" not in sys.modules and not any(name in os.environ for name in _CHOICES):
        os.environ.update(SETTINGS)


def describe() -> str:
    """For a run's log: what is set, and why."""
    found = {name: os.environ[name] for name in _CHOICES if name in os.environ}
    settings = " ".join(f"{name}={value}" for name, value in found.items())
    if found == SETTINGS:
        return (
            f"{settings}: threads that wait soon sleep, so that other processes on these cores do "
            "not slow this one down (OMP_WAIT_POLICY=ACTIVE for a machine of its own)"
        )
    return f"how threads wait: {settings or 'as OpenMP does by default'}"
