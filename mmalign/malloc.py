"""glibc's allocator, told to keep what is freed for the next step of a model on a CPU.

By default every tensor above 32 MiB is mapped from the system and returned when it is freed, and
smaller ones often are, too: each step takes its activations page by page again, and the kernel
clears them first, which costs a training step several percent. What is kept is reused, so a process
stays as large as its largest step.

https://man7.org/linux/man-pages/man3/mallopt.3.html
"""

import ctypes
import os
import sys

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # numbers of mallopt's parameters, from malloc.h
_NEVER, _NONE = -1, 0


def keep_freed_memory() -> None:
    """Leaves all as it is where the user set MALLOC_* or GLIBC_TUNABLES, and away from glibc."""
    chosen = any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None and not chosen:
        mallopt(_TRIM_THRESHOLD, _NEVER)
        mallopt(_MMAP_MAX, _NONE)
