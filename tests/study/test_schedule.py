"""What runs, what is skipped, what is left behind, and what a failure stops."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from mmalign.command import Stopped
from mmalign.ownership import owned
from mmalign.study import schedule
from mmalign.study.identity import Orders
from mmalign.study.report import write_study
from mmalign.study.schedule import run_study
from mmalign.study.study_file import read_study
from tests.conftest import REPOSITORY
from tests.study.conftest import STUDY

ONE_SEED = STUDY.replace("[0, 1]", "[0]")


def open_study(path: Path, **overrides) -> Orders:
    names = {name.replace("__", ".").replace("_", "-"): value for name, value in overrides.items()}
    return Orders(read_study(path, names))


def states(orders: Orders) -> dict[str, str]:
    return {run.name: orders.state(run) for run in orders.study.runs}


def command(path: Path, *arguments: str) -> subprocess.Popen:
    """scripts/study.py in a group of its own."""
    script = [sys.executable, "scripts/study.py", str(path), *arguments]
    return subprocess.Popen(
        script, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def test_all_runs_are_done_and_have_scores(finished):
    assert set(states(finished).values()) == {"done"}
    for run in finished.study.runs:
        assert (finished[run].scores / "results.json").exists() == run.is_evaluated


def test_done_runs_are_skipped(finished):
    logs = {run: (finished[run].folder / "log.txt").stat() for run in finished.study.runs}
    assert run_study(finished, finished.study.runs, jobs=2) == {}
    assert all((finished[run].folder / "log.txt").stat() == logs[run] for run in logs)


def test_one_seed_has_one_order_of_samples_in_every_variant(finished):
    """So that the noise of a seed is the same on both sides of a difference."""
    found = {}
    for run in finished.study.runs:
        if run.variant in ("visual", "text-only"):
            metrics = (finished[run].train_dir / "metrics.jsonl").read_text().splitlines()
            steps = [json.loads(line)["loss_tokens"] for line in metrics]
            found[run.variant, run.seed] = steps
    assert found["visual", 0] == found["text-only", 0] != found["visual", 1]


def test_parts_are_nested_and_controls_change_the_data(study_file, world):
    recipe = '\nfinetune = "tiny-finetune"\n'
    more = f'[variants.larger]{recipe}samples = 24\n[variants.blank]{recipe}control = "blank-image"'
    orders = open_study(study_file(ONE_SEED, more))
    chosen = orders.study.chosen(["part", "larger", "blank"], [])
    assert run_study(orders, chosen, jobs=2) == {}
    part, larger, blank = (json.loads((orders[x].folder / "data.json").read_text()) for x in chosen)
    assert part == larger[:16] and len(larger) == 24
    assert {row.get("image") for row in blank} == {"blank.png", None}
    manifest = json.loads((orders[chosen[2]].folder / "manifest.json").read_text())
    assert manifest["control"] == "blank-image" and manifest["seed"] == 0
    assert manifest["source"] == str(world / "finetune.json")
    assert manifest["images"] == sum("image" in row for row in blank)


def test_a_failure_is_named_and_stops_nothing_else(study_file, world):
    """Stage 1 fails, so what starts from it does; the rest is done. Given again, it is retried."""
    orders = open_study(study_file(ONE_SEED), pretrain__micro_batch_tokens=1)
    failed = run_study(orders, orders.study.runs, jobs=1)
    assert set(failed) == {"small/pretrain/seed_0", "small/visual/seed_0", "small/part/seed_0"}
    assert "micro-batch" in failed["small/pretrain/seed_0"].replace("_", "-")
    assert "\n" not in failed["small/pretrain/seed_0"]
    assert failed["small/visual/seed_0"] == "small/pretrain/seed_0 failed"
    found = states(orders)
    assert found["small/pretrain/seed_0"] == "failed"
    assert found["small/base"] == found["small/text-only/seed_0"] == "done"
    again = open_study(study_file(ONE_SEED))  # micro_batch_tokens is free: the same run
    assert run_study(again, again.study.runs, jobs=1) == {}
    assert set(states(again).values()) == {"done"}


def test_a_missing_input_is_named_and_stops_nothing_else(study_file):
    orders = open_study(study_file(ONE_SEED), parents__small__vision_tower="/nowhere")
    failed = run_study(orders, orders.study.chosen(["base", "visual"], []), jobs=1)
    assert set(failed) == {"small/pretrain/seed_0", "small/visual/seed_0"}
    assert set(failed.values()) == {"missing: /nowhere"}
    assert states(orders)["small/base"] == "done"


def test_a_published_model_is_scored_as_it_is(study_file, finished):
    """Here a LLaVA folder that a run has exported, and so has the scores of that run."""
    text = ONE_SEED[: ONE_SEED.index("[variants.visual]")]
    visual = next(run for run in finished.study.runs if run.variant == "visual")
    folder = finished[visual].train_dir / "export" / "llava"
    published = f"""[variants.published]
model = "{folder}"

[[questions]]
name = "Q"
asks = "Is it better?"
contrast = "published - base"
metrics = ["truthfulqa_mc2"]
"""
    orders = open_study(study_file(text, published))
    assert list(states(orders)) == ["small/base", "small/published"]
    assert run_study(orders, orders.study.runs, jobs=1) == {}
    items = [
        (x[y].scores / "items.jsonl")
        for x, y in ((finished, visual), (orders, orders.study.runs[1]))
    ]
    first, second = ([json.loads(line) for line in x.read_text().splitlines()] for x in items)
    assert first == second
    write_study(orders)
    report = (orders.study.output / "report.md").read_text()
    assert "points on truthfulqa_mc2 of small" in report
    missing = open_study(study_file(text, published.replace(str(folder), "nowhere")))
    assert missing.problem(missing.study.runs[1]) == "missing: nowhere"


def test_keep_scores(study_file, finished):
    """Weights go, stage 1's after its last dependant; a new variant trains stage 1 again."""
    orders = open_study(study_file(ONE_SEED), study__keep="scores")
    visual = orders.study.chosen(["visual", "base"], [])
    assert run_study(orders, visual, jobs=1) == {}
    pretrain = orders.study.runs[1]
    assert orders[pretrain].projector.exists()  # "part" still needs it
    assert run_study(orders, orders.study.runs, jobs=1) == {}
    assert set(states(orders).values()) == {"done"}
    for run in orders.study.runs:
        assert not (orders[run].train_dir / "export").exists()
        assert not (orders[run].train_dir / "checkpoints").exists()
        assert (orders[run].scores / "items.jsonl").exists() == run.is_evaluated
    more = '[variants.new]\nfinetune = "tiny-finetune"\nglobal-batch-size = 4\n'
    orders = open_study(study_file(ONE_SEED, more), study__keep="scores")
    assert states(orders)["small/pretrain/seed_0"] == "new"
    assert run_study(orders, orders.study.runs, jobs=1) == {}
    assert set(states(orders).values()) == {"done"} and not orders[pretrain].projector.exists()


def test_runs_at_a_time_have_gpus_of_their_own(study_file, monkeypatch):
    """Those that CUDA_VISIBLE_DEVICES leaves to the study, in turn."""
    given = []

    class Process:
        def __init__(self, target, args, name):
            given.append((name, args[2]))

        def start(self):
            pass

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    monkeypatch.setattr(schedule, "_context", SimpleNamespace(Process=Process))
    orders = open_study(study_file())
    schedule._Queue(orders, orders.study.runs, jobs=3, threads=1).start_ready()
    pretrain, text_only = "small/pretrain/seed_0", "small/text-only/seed_0"  # wait for nothing
    assert given == [("small/base", "3"), (pretrain, "5"), (text_only, "3")]


def test_a_signal_saves_and_stops(study_file):
    path = study_file(ONE_SEED)
    orders = open_study(path, finetune__num_steps=500)
    running = command(path, "--finetune.num-steps", "500")
    order = orders[orders.study.runs[2]]
    wait_for(lambda: (order.train_dir / "metrics.jsonl").exists(), running)
    running.send_signal(signal.SIGTERM)
    _, said = running.communicate(timeout=60)
    assert running.returncode == Stopped.exit_code
    assert said.splitlines()[-1].startswith("stopped by a signal with 2 of 5 runs done; everything")
    assert orders.state(order.run) == "stopped"
    assert list((order.train_dir / "checkpoints").glob("step_*"))


def test_a_shell_waits_while_another_writes_the_report(study_file):
    path = study_file(ONE_SEED)
    with owned(open_study(path).study.output, "study.output"):
        shell = command(path, "--report")
        with pytest.raises(subprocess.TimeoutExpired):
            shell.communicate(timeout=8)
    _, said = shell.communicate(timeout=60)
    assert shell.returncode == 0, said


def wait_for(condition, process: subprocess.Popen) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.kills
def test_killed_at_random_moments(study_file, finished, num_moments):
    """kill -9 of the study, with its runs or without; in the end two shells at once finish it."""
    path, rng = study_file(), random.Random(14)
    for _ in range(num_moments):
        running = command(path, "--jobs", "2")
        moment = time.monotonic() + rng.uniform(3, 12)
        while time.monotonic() < moment and running.poll() is None:
            time.sleep(0.05)
        for process in descendants(running.pid) if rng.random() < 0.7 else [running.pid]:
            try:
                os.kill(process, signal.SIGKILL)
            except ProcessLookupError:
                continue
        running.communicate()
    shells = [command(path), command(path)]
    for shell in shells:
        _, said = shell.communicate(timeout=120)
        assert shell.returncode == 0, said
    ours = open_study(path).study.output / "documents.parquet"
    assert ours.read_bytes() == (finished.study.output / "documents.parquet").read_bytes()


def descendants(process: int) -> list[int]:
    """The process, its children, and theirs."""
    found, parents = [process], {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        parents[int(path.parent.name)] = int(fields[1])
    for child in sorted(parents):
        if parents[child] in found:
            found.append(child)
    return found
