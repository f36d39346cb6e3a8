"""How a command ends, and what it writes into a log."""

import os
import signal
import subprocess
import sys
import time

import pytest

BODY = """
import logging, sys, time
from mmalign.command import Stopped, StopSignal, command_line, progress_bar
from mmalign.errors import UserError
with command_line():
    {}
"""


def run(body: str, shell: str = "", **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", BODY.format(body.replace("\n", "\n    "))]
    if shell:
        command = ["bash", "-c", f'"$0" "$@" {shell}', *command]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=60, **options
    )


@pytest.mark.parametrize(
    "body, code, said",
    [
        ("raise UserError('no such thing')", 1, "error: no such thing\n"),
        ("raise KeyboardInterrupt", 130, "interrupted\n"),
        ("open('/dev/full', 'w', 1).write('x\\n')", 1, "No space left on device"),
        ("open('/absent/file')", 1, "error: No such file or directory (/absent/file). Fix"),
        ("raise Stopped('after step 7')", 75, "stopped by a signal after step 7; everything"),
    ],
)
def test_every_ending_is_one_line(body, code, said):
    result = run(body)
    assert (result.returncode, result.stdout) == (code, "") and said in result.stderr
    assert result.stderr.count("\n") == 1 and "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--run-dir", ""], "error: --run-dir is empty; expected a value."),
        (["a", "--data.path="], "error: --data.path is empty"),
        (["--tasks", "pope", " "], "error: --tasks is empty"),
        (["", "b"], "error: an argument is empty"),
        (["--wandb", "", "--seed=1", "--json"], "done"),
    ],
)
def test_an_empty_argument_is_refused(arguments, said):
    """Path("") is the current folder."""
    result = run(f"sys.argv[1:] = {arguments}\nwith command_line():\n    print('done')")
    assert (result.stdout or result.stderr).startswith(said)


def test_a_full_disk_names_the_file(tmp_path):
    """RLIMIT_FSIZE stands for the disk: neither write() knows the name of its file."""
    body = (
        "import resource, signal\nfrom mmalign.files import {0}\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
        "with {0}('report.md'{1}) as file:\n    file.write('x' * 10000)"
    )
    for names in (("replacing", ""), ("naming", "), open('report.md', 'w'")):
        result = run(body.format(*names), cwd=tmp_path)
        assert result.stderr == (
            "error: File too large (report.md). Fix this and rerun the same command.\n"
        )


def test_matplotlib_loads_whatever_its_settings_are(tmp_path):
    load = "import matplotlib"
    unknown = os.environ | {"MPLBACKEND": "unknown"}
    assert run(load, env=unknown).stderr == ""
    (tmp_path / "matplotlibrc").write_bytes(b"\xff\xfe")
    code = f"import mmalign.command\n{load}"  # as scripts do, outside of command_line
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert result.stderr.endswith("Repair or remove this matplotlibrc\n")


def test_a_message_cannot_control_the_terminal():
    result = run(r"raise UserError('a.bin: \x1b[2J\r\u202e' + '\n' + 'fix it')")
    assert result.stderr == "error: a.bin: \\x1b[2J\\r\\u202e\nfix it\n"


def test_a_signal_is_no_error_of_a_file():
    """Whoever calls a damaged file's error by the file's name lets it pass."""
    body = (
        "import os, signal\n"
        "with StopSignal():\n"
        "    try:\n        os.kill(os.getpid(), signal.SIGTERM)\n"
        "    except Exception as error:\n        raise UserError('the file is damaged') from error"
    )
    result = run(body)
    assert result.returncode == 75 and "stopped by a signal" in result.stderr


def test_a_bug_keeps_its_traceback():
    assert "Traceback" in run("assert 1 == 2").stderr


def test_head_is_quiet():
    body = "for i in range(100000): print(i)"
    for stream in ("", "2>&1"):
        result = run(body, shell=f"{stream} | head -n 2")
        assert result.stdout == "0\n1\n" and result.stderr == ""


def test_a_log_has_lines():
    body = (
        "import mmalign.command\n"
        "mmalign.command._SECONDS_PER_LINE = 0.0\n"
        "bar = progress_bar(total=3, desc='steps', unit='step')\n"
        "bar.set_postfix_str('loss 1.0')\n"
        "for _ in range(3):\n    bar.update()\n    logging.info('a message')\n"
        "bar.close()"
    )
    lines = [f"steps: {i} of 3 step  loss 1.0\na message" for i in (1, 2, 3)]
    assert run(body).stderr == "\n".join([*lines, ""])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGINT])
def test_signals(number):
    """At once, unless steps are trained; what was ignored from the start stays ignored."""
    body = "with StopSignal() as stop{}:\n    print('go', flush=True); time.sleep({})\n    {}"
    for inside, seconds, then, code in (
        ("", 60, "pass", 75),
        (", stop.raising(False)", 1, "print(stop.requested)", 0),
    ):
        command = [sys.executable, "-c", BODY.format(body.format(inside, seconds, then)
                   .replace("\n", "\n    "))]  # fmt: skip
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert process.stdout.readline() == "go\n"
        process.send_signal(number)
        began = time.monotonic()
        out, err = process.communicate(timeout=30)
        assert process.returncode == code, err
        assert out == ("True\n" if code == 0 else "") and time.monotonic() - began < 20
    ignoring = run(
        "import os, signal\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "with StopSignal() as stop:\n    os.kill(os.getpid(), signal.SIGHUP)\n"
        "    print(stop.requested)"
    )
    assert ignoring.stdout == "False\n"
