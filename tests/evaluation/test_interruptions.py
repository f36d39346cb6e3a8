"""kill -9, SIGTERM and a full disk at random moments of scripts/evaluate.py.

Results that are there stay as they are until complete ones take their place, and the same command
then gives the same. pytest -m kills -s makes 20 moments of each and prints them.
"""

import logging
import multiprocessing
import os
import random
import runpy
import shutil
import signal
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from mmalign.evaluation.evaluation import evaluate_model
from mmalign.evaluation.items import read_items, read_results
from mmalign.evaluation.tasks import score_rows
from tests.evaluation.test_during_training import TASKS, data_root  # noqa: F401  a fixture
from tests.training.test_interruptions import fill, small_disk  # noqa: F401  a fixture

pytestmark = pytest.mark.kills
SCRIPT = Path(__file__).resolve().parents[2] / "scripts/evaluate.py"
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload([__name__])


def _evaluate(arguments: list[str], log: Path) -> None:
    with open(log, "w", buffering=1) as file:
        sys.stdout = sys.stderr = file
        logging.getLogger().handlers.clear()
        sys.argv = [str(SCRIPT), *arguments]
        try:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        except SystemExit as end:
            print(end.code)
            sys.exit(1 if isinstance(end.code, str) else end.code)


def start(model: Path, root: Path, output: Path, log: Path) -> BaseProcess:
    options = {"--model": model, "--data-root": root, "--output": output, "--device": "cpu"}
    options |= {"--batch-tokens": 100, "--precision": "fp32"}
    arguments = [str(word) for pair in options.items() for word in pair] + ["--tasks", *TASKS]
    process = _context.Process(target=_evaluate, args=(arguments, log))
    process.start()
    return process


@pytest.mark.parametrize("way", [signal.SIGKILL, signal.SIGTERM, "full disk"], ids=str)
def test_finished_results_survive(
    small_world,
    data_root,  # noqa: F811
    small_disk,  # noqa: F811
    tmp_path,
    way,
    num_moments,
):
    output, log, rng, moments = small_disk / "out", tmp_path / "log", random.Random(str(way)), []
    # fewer documents, as an earlier evaluation may have had
    evaluate_model(small_world.decoder, TASKS, data_root, output, 7, quiet=True)
    earlier = read_items(output)
    for _ in range(2):  # the first one also waits for the imports
        began = time.monotonic()
        first = start(small_world.decoder, data_root, tmp_path / "whole", log)
        first.join()
        assert first.exitcode == 0, log.read_text()
    seconds, complete = time.monotonic() - began, read_items(tmp_path / "whole")
    kept = tmp_path / "kept"
    shutil.copytree(output, kept)
    for _ in range(num_moments):
        shutil.rmtree(output)
        shutil.copytree(kept, output)
        process = start(small_world.decoder, data_root, output, log)
        wait_for_a_moment(process, output, seconds, rng)
        if way == "full disk":
            fill(small_disk)
            process.join(60)
        elif process.is_alive():
            os.kill(process.pid, way)
        process.join(60)
        (small_disk / "fill").unlink(missing_ok=True)
        text, found = log.read_text(), read_items(output)
        moments.append((process.exitcode, sum(map(len, found.values()))))
        assert process.exitcode in (0, 1, -signal.SIGKILL, -signal.SIGTERM), text
        assert "Traceback" not in text and (process.exitcode != 1 or "o space left" in text), text
        assert found == complete or (found == earlier and process.exitcode != 0)
    print(f"\nevaluation, {way}, (exit code, documents of the results):", *moments)
    last = start(small_world.decoder, data_root, output, log)
    last.join()
    assert last.exitcode == 0 and read_items(output) == complete
    assert score_rows(read_results(output)) == score_rows(read_results(tmp_path / "whole"))


def wait_for_a_moment(
    process: BaseProcess, output: Path, seconds: float, rng: random.Random
) -> None:
    """Half of them at any time, half while the results are being written or soon after."""
    begin, limit = time.monotonic(), rng.uniform(0, seconds) if rng.random() < 0.5 else 60
    while process.is_alive() and time.monotonic() - begin < limit:
        if limit == 60 and any(output.glob(".*.tmp")):
            time.sleep(rng.uniform(0, 0.01))
            return
        time.sleep(0.0005)
