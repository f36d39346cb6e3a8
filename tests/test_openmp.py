"""How OpenMP's threads wait, as the OpenMP of this PyTorch displays it and as they do it."""

import functools
import os
import re
import subprocess
import sys
from unittest.mock import create_autospec

import pytest

from mmalign import openmp
from mmalign.data.workers import usable_cores
from tests.conftest import REPOSITORY

SECOND = 1_000_000_000  # nanoseconds
SAY = "import mmalign.openmp, torch; print(mmalign.openmp.describe())"
needs_schedstat = pytest.mark.skipif(
    not openmp.times_are_told(), reason="this system does not say how long a thread waits"
)


def spin_count(code: str, **settings: str) -> tuple[int, str]:
    """What libgomp says that a thread spins, and what the code prints, in a new process."""
    kept = {x: y for x, y in os.environ.items() if not x.startswith(("OMP_", "GOMP_", "KMP_"))}
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=REPOSITORY,
        env=kept | settings | {"OMP_DISPLAY_ENV": "VERBOSE"},
        capture_output=True,
        text=True,
        check=True,
    )
    shown = re.search(r"GOMP_SPINCOUNT = '(\d+)'", run.stderr)
    if not shown:
        pytest.skip("this PyTorch has another OpenMP than GNU's")
    return int(shown[1]), run.stdout


@functools.cache
def default_spin_count() -> int:
    return spin_count("import torch")[0]


@needs_schedstat
@pytest.mark.parametrize(
    "code",
    [
        SAY,
        f"import mmalign, subprocess, sys; subprocess.run([sys.executable, '-c', {SAY!r}])",
        "import runpy; runpy.run_path('scripts/train.py', run_name='imported');" + SAY,
    ],
    ids=["package", "its processes", "command"],
)
def test_threads_spin_as_long_as_nothing_else_runs(code):
    found, line = spin_count(code)
    assert found == default_spin_count() and line.startswith(
        "threads that wait spin while this process has"
    )


@pytest.mark.parametrize(
    "name, value, expected",
    [("OMP_WAIT_POLICY", "PASSIVE", 0), ("GOMP_SPINCOUNT", "5000", 5000)],
)
def test_what_the_user_has_chosen_stays(name, value, expected):
    found, line = spin_count(SAY, **{name: value})
    assert found == expected and line == f"how threads wait: {name}={value}\n"


def test_nothing_is_claimed_where_torch_was_first():
    found, line = spin_count("import torch; " + SAY)
    assert found == default_spin_count() and line == "how threads wait: as OpenMP does by default\n"


@pytest.mark.parametrize("content", [None, "0 0 0\n", "", "no\n"])
def test_threads_soon_sleep_where_the_system_tells_nothing(monkeypatch, tmp_path, content):
    if content is not None:
        (tmp_path / "schedstat").write_text(content)
    monkeypatch.setattr(os, "environ", {})
    monkeypatch.setattr(openmp, "_TIMES", tmp_path / "schedstat")
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    openmp.choose_how_threads_wait()
    assert os.environ == openmp._UNWATCHED


def test_another_openmp_than_gnus_is_not_said_to_be_watched(monkeypatch):
    monkeypatch.setattr(os, "environ", {**openmp._WATCHED})
    monkeypatch.setattr(openmp, "_libgomp", lambda: None)
    assert openmp.describe().startswith("KMP_BLOCKTIME=0: threads that wait soon sleep")


SWITCHES = """
import mmalign, resource, time, torch
from mmalign.openmp import IdleThreads
torch.set_num_threads(2)
def sleeps():  # of a thread that waits 50 times for half a millisecond
    tensor, before = torch.randn(400, 400), resource.getrusage(resource.RUSAGE_SELF)
    for _ in range(50):
        tensor + 1
        end = time.perf_counter() + 5e-4
        while time.perf_counter() < end: pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw - before.ru_nvcsw
sleeps()
found = [sleeps()]
idle_threads = IdleThreads.start()
assert idle_threads and idle_threads.is_alive()
time.sleep(0.2)  # until they have begun
found.append(sleeps())
idle_threads.end()
assert not idle_threads.is_alive()
found.append(sleeps())
print(*found)
"""


@pytest.mark.skipif(len(usable_cores()) == 1, reason="threads spin only on several processors")
def test_threads_sleep_while_idle_threads_exist():
    _, line = spin_count(SWITCHES, GOMP_SPINCOUNT="1000000000", OMP_NUM_THREADS="2")
    before, meanwhile, after = map(int, line.split())
    assert meanwhile >= 50 and meanwhile > 2 * max(before, after), line


def test_watch_follows_how_long_the_main_thread_waits():
    idle_threads = create_autospec(openmp.IdleThreads, instance=True)
    watch = openmp.ProcessorWatch(lambda: idle_threads)
    busy, idle, asleep = (0.03, 0.07), (0.09, 0.01), (0.0005, 0.0)  # seconds that it ran, waited
    checks = [idle, busy, busy, asleep, *[idle] * 9, busy, *[idle] * 9, *[asleep] * 20, idle, idle]
    ran, waited, held = 0, 0, []
    for one in checks:
        ran, waited = ran + int(one[0] * SECOND), waited + int(one[1] * SECOND)
        watch.check(ran, waited)
        held.append(watch.idle_threads is not None)
    assert held == [False] + [True] * 42 + [False, False]
    idle_threads.end.assert_called_once_with()
