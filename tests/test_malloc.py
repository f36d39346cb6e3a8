"""Freed memory is reused without page faults, unless the user has settings of his own."""

import os
import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
ALLOCATIONS = """
import resource
import torch
from mmalign.system import choose_device
choose_device("cpu")
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(12):  # a block that is pinned between others has no room for the next alignment
    before = faults()
    torch.ones(1 << 24)
    print(faults() - before)
"""


def fewest_faults(**environment: str) -> int:
    """Page faults of the tensor that takes fewest."""
    others = {x: y for x, y in os.environ.items() if not x.startswith(("MALLOC_", "GLIBC_"))}
    run = [sys.executable, "-c", ALLOCATIONS]
    printed = subprocess.check_output(run, env=others | environment)
    return min(int(line) for line in printed.split())


def test_a_tensor_takes_the_memory_of_an_earlier_one():
    assert fewest_faults() < 100


def test_settings_of_the_user_hold():
    """64 MiB that are mapped anew: a fault per page, or per huge page of 2 MiB."""
    assert fewest_faults(MALLOC_MMAP_MAX_="65536") >= 32
