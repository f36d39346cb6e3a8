"""scripts/reproduce.py: how the command ends."""

import sys

import pytest

from mmalign.command import Stopped
from mmalign.errors import UserError
from scripts import reproduce


def ends_with(error: Exception, monkeypatch) -> int | str:
    """The exit code of the command where the experiment raises `error`, or what it exits with."""

    def stops(experiment):
        raise error

    monkeypatch.setattr(reproduce, "run_experiment", stops)
    monkeypatch.setattr(sys, "argv", ["reproduce.py", "tiny", "--output", "runs/x"])
    with pytest.raises(SystemExit) as ended:
        reproduce.main()
    return ended.value.code


def test_a_stop_by_a_signal_is_no_failure(monkeypatch, capfd):
    """So that a queue may start the same command again."""
    assert ends_with(Stopped("after step 3"), monkeypatch) == 75
    said = (
        "stopped by a signal after step 3; everything is saved. Rerun the same command to resume."
    )
    assert capfd.readouterr().err == f"{said}\n"


def test_an_error_is_told(monkeypatch):
    assert ends_with(UserError("no such folder"), monkeypatch) == "error: no such folder"
