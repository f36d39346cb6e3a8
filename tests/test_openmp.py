"""How OpenMP's threads wait, as the OpenMP of this PyTorch displays it."""

import os
import re
import subprocess
import sys

import pytest

from mmalign.openmp import SETTINGS
from tests.conftest import REPOSITORY


def spin_count(code: str, **settings: str) -> tuple[str, str]:
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
    return shown[1], run.stdout


SAY = "import mmalign.openmp, torch; print(mmalign.openmp.describe())"


def test_threads_sleep_soon_and_the_log_says_why():
    found, line = spin_count(SAY)
    assert found == SETTINGS["GOMP_SPINCOUNT"]
    assert f"GOMP_SPINCOUNT={found}" in line and "other processes" in line


@pytest.mark.parametrize(
    "name, value, expected",
    [("OMP_WAIT_POLICY", "PASSIVE", "0"), ("GOMP_SPINCOUNT", "5000", "5000")],
)
def test_what_the_user_has_chosen_stays(name, value, expected):
    found, line = spin_count(SAY, **{name: value})
    assert found == expected and line == f"how threads wait: {name}={value}\n"


def test_nothing_is_claimed_where_torch_was_first():
    default, _ = spin_count("import torch")
    found, line = spin_count("import torch; " + SAY)
    assert found == default and line == "how threads wait: as OpenMP does by default\n"


def test_processes_of_a_run_wait_as_it_does():
    start = f"import mmalign, subprocess, sys; subprocess.run([sys.executable, '-c', {SAY!r}])"
    found, line = spin_count(start)
    assert found == SETTINGS["GOMP_SPINCOUNT"] and f"GOMP_SPINCOUNT={found}" in line


def test_a_command_sets_it_before_pytorch_is_loaded():
    path = REPOSITORY / "scripts" / "train.py"
    found, _ = spin_count(f"import runpy; runpy.run_path({str(path)!r}, run_name='imported')")
    assert found == SETTINGS["GOMP_SPINCOUNT"]
