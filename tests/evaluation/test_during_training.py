"""--evaluation.every: what it scores, what it costs, and that training does not notice."""

import csv
import json
import logging
import os
import random
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mmalign.command import Stopped
from mmalign.config import EvaluationConfig, ParallelConfig
from mmalign.errors import UserError
from mmalign.evaluation import evaluation as evaluation_module
from mmalign.evaluation.compare import compare_evaluations
from mmalign.evaluation.during_training import largest_limit
from mmalign.evaluation.evaluation import evaluate_model
from mmalign.evaluation.items import read_items, read_results
from mmalign.evaluation.scoring import run_plan
from mmalign.files import read_json_lines
from mmalign.model.hf import export_llama, load_decoder
from mmalign.tokenizer import Tokenizer
from mmalign.training.loop import train
from tests.training.conftest import WORDS
from tests.training.helpers import exported_weights, losses, small_config
from tests.training.test_loop import train_interrupted
from tests.training.train_processes import start

TASKS = ("truthfulqa", "ethics_virtue")
NUM_DOCUMENTS = 15
LIMIT = 10


@pytest.fixture(scope="module")
def data_root(tmp_path_factory) -> Path:
    """TruthfulQA and one subset of ETHICS in their published forms, in the small world's words."""
    root, draw = tmp_path_factory.mktemp("evaluation"), random.Random(0)

    def sentence() -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(2, 6)))

    questions = []
    for i in range(NUM_DOCUMENTS):
        choices = {f"{sentence()} {i}": int(j == 0) for j in range(4)}
        questions.append({"question": sentence(), "mc1_targets": choices, "mc2_targets": choices})
    (root / "truthfulqa").mkdir()
    (root / "truthfulqa" / "mc_task.json").write_text(json.dumps(questions))
    folder = root / "ethics" / "virtue"
    folder.mkdir(parents=True)
    with open(folder / "virtue_test.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["label", "scenario"])
        scenario = ""
        for i in range(NUM_DOCUMENTS):
            scenario = scenario if i % 5 else sentence()
            writer.writerow([int(i % 5 == 0), f"{scenario} [SEP] {draw.choice(WORDS)}"])
    return root


def evaluated(config, data_root, every=2):
    settings = EvaluationConfig(
        every=every, data_root=str(data_root), tasks=TASKS, limit=LIMIT, batch_tokens=400
    )
    return replace(config, evaluation=settings)


@pytest.fixture(scope="module")
def pair(small_world, data_root, tmp_path_factory):
    """The same run twice, with adapters and their dropout: undisturbed, and with evaluations."""
    folder = tmp_path_factory.mktemp("runs")
    alone = small_config(small_world, folder / "alone")
    alone = replace(alone, lora=replace(alone.lora, rank=4, dropout=0.3))
    scored = evaluated(replace(alone, run_dir=folder / "scored"), data_root)
    train(alone)
    train(scored)
    return alone, scored


def test_training_does_not_notice(pair):
    alone, scored = pair
    assert losses(alone.run_dir) == losses(scored.run_dir)
    ours, theirs = exported_weights(alone.run_dir), exported_weights(scored.run_dir)
    assert ours.keys() == theirs.keys() and ours
    assert all(torch.equal(weight, theirs[name]) for name, weight in ours.items())


def assert_same_items(folder, other, tolerance):
    ours, theirs = read_items(folder), read_items(other)
    assert ours.keys() == theirs.keys()
    for task, items in ours.items():
        for a, b in zip(items, theirs[task], strict=True):
            assert (a["doc_id"], a["sha256"]) == (b["doc_id"], b["sha256"])
            pairs = zip(a["choices"], b["choices"], strict=True)
            for x, y in pairs:
                assert x["loglikelihood"] == pytest.approx(y["loglikelihood"], abs=tolerance)


def test_scores_are_those_of_evaluate(pair, data_root, tmp_path):
    """Of the base model, which has the image tokens already, and of the merged adapters."""
    _, scored = pair
    evaluation = scored.run_dir / "evaluation"
    decoder = load_decoder(scored.model.decoder, num_added_tokens=3)
    export_llama(decoder, tmp_path / "base", Tokenizer.from_pretrained(scored.model.decoder))
    evaluate_model(tmp_path / "base", TASKS, data_root, tmp_path / "b", LIMIT, quiet=True)
    assert_same_items(evaluation / "step_0", tmp_path / "b", tolerance=1e-4)
    evaluate_model(scored.run_dir, TASKS, data_root, tmp_path / "t", quiet=True)
    assert_same_items(evaluation / "all", tmp_path / "t", tolerance=1e-4)
    with pytest.raises(UserError, match="15 documents against 10"):
        compare_evaluations(evaluation / "all", evaluation / "step_0")
    comparison = compare_evaluations(evaluation / "step_0", evaluation / "step_6")
    before, after = (read_results(evaluation / f"step_{step}") for step in (0, 6))
    for task, row in comparison["tasks"].items():
        assert row["difference"] == pytest.approx(after[task]["acc"] - before[task]["acc"])
    assert comparison["tasks"]["truthfulqa_mc2"]["difference"] != 0


def test_what_it_leaves_behind(pair):
    _, scored = pair
    folder = scored.run_dir / "evaluation"
    names = {path.name for path in folder.iterdir()}
    assert names == {"step_0", "step_2", "step_4", "step_6", "all"}
    records = {
        record["step"]: record for record in read_json_lines(scored.run_dir / "metrics.jsonl")
    }
    for step, record in records.items():
        assert ("evaluation/ethics_virtue" in record) == (step in (2, 4, 6))
    for step in (2, 4, 6):
        results = read_results(folder / f"step_{step}")
        assert results["ethics_virtue"]["n"] == LIMIT
        for task in ("truthfulqa_mc1", "truthfulqa_mc2", "ethics_virtue"):
            assert records[step][f"evaluation/{task}"] == results[task]["acc"]
        assert records[step]["evaluation_seconds"] > 0
    last, everything = read_items(folder / "step_6"), read_items(folder / "all")
    assert all(rows == everything[task][:LIMIT] for task, rows in last.items())


def test_a_killed_run_continues_to_the_same_scores(pair, small_world, data_root, tmp_path):
    _, scored = pair
    killed = replace(scored, run_dir=tmp_path / "killed")
    killed = replace(killed, checkpoint=replace(killed.checkpoint, every=3))
    result = train_interrupted(killed, "kill", step=5)
    assert result.returncode < 0, result.stderr[-2000:]
    # from step 3 on, with other evaluations between; their documents stay
    killed = replace(killed, evaluation=replace(killed.evaluation, every=1))
    train(killed)
    assert read_results(killed.run_dir / "evaluation" / "step_5")["config"]["limit"] == LIMIT
    assert losses(scored.run_dir) == losses(killed.run_dir)
    for name in ("step_0", "step_2", "step_4", "step_6", "all"):
        ours, theirs = (read_items(run.run_dir / "evaluation" / name) for run in (scored, killed))
        assert ours == theirs
    stamp = (killed.run_dir / "evaluation" / "all" / "results.json").stat().st_mtime_ns
    train(killed)  # finished: nothing is scored again
    assert (killed.run_dir / "evaluation" / "all" / "results.json").stat().st_mtime_ns == stamp


@pytest.fixture(scope="module")
def one_process(small_world, data_root, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("one_process") / "run"
    config = evaluated(small_config(small_world, run_dir, num_steps=4), data_root)
    train(config)
    return config


@pytest.mark.parametrize("sharding", ["none", "full"])
def test_two_processes(one_process, tmp_path, sharding):
    """Replicated, each scores half of the documents; sharded, they gather the weights together."""
    parallel = ParallelConfig(sharding=sharding)
    start(replace(one_process, run_dir=tmp_path / "two", parallel=parallel), 2).succeed()
    for name in ("step_0", "step_2", "all"):
        folders = (
            run_dir / "evaluation" / name for run_dir in (one_process.run_dir, tmp_path / "two")
        )
        # the weights differ by rounding, as test_fsdp allows
        assert_same_items(*folders, tolerance=1e-3)


@pytest.mark.parametrize("where", ["0", "2"])
def test_a_signal_during_an_evaluation_is_obeyed_at_once(
    pair, small_world, data_root, tmp_path, monkeypatch, where
):
    """Of the base model, or after step 2, which is saved before it is evaluated."""
    _, scored = pair
    config = replace(scored, run_dir=tmp_path / "run")
    config = replace(config, checkpoint=replace(config.checkpoint, every=0))
    num_batches = []

    def interrupted(*args, **options):
        metrics = config.run_dir / "metrics.jsonl"  # a checkpoint may still be on its way
        number = len(losses(config.run_dir)) if metrics.exists() else 0
        num_batches.append(number)
        if number == int(where):
            os.kill(os.getpid(), signal.SIGTERM)
        return run_plan(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr("mmalign.evaluation.evaluation.run_plan", interrupted)
        with pytest.raises(Stopped, match="everything is saved. Rerun the same command"):
            train(config)
    assert num_batches[-1] == int(where)  # and none after it
    assert not (config.run_dir / "evaluation" / f"step_{where}").exists()
    assert newest_step(config.run_dir) == int(where)
    assert len(losses(config.run_dir)) == int(where)
    train(config)
    assert losses(scored.run_dir) == losses(config.run_dir)
    names = ("step_0", "step_2", "step_4", "step_6", "all")
    for name in names:
        folders = (run.run_dir / "evaluation" / name for run in (scored, config))
        ours, theirs = map(read_items, folders)
        assert ours == theirs


def newest_step(run_dir: Path) -> int:
    names = [path.name for path in (run_dir / "checkpoints").glob("step_*")]
    return max((int(name.removeprefix("step_")) for name in names), default=0)


def stop_in_evaluation(rank: int) -> None:
    """Both processes get SIGTERM, as torchrun sends it, when the second evaluation begins."""
    number = [0]

    def interrupted(*args, **options):
        number[0] += 1
        if number[0] == 3:  # an evaluation has two passes; the second is without the questions
            os.kill(os.getpid(), signal.SIGTERM)
        return run_plan(*args, **options)

    evaluation_module.run_plan = interrupted


@pytest.mark.parametrize("sharding", ["none", "full"])
def test_a_signal_during_an_evaluation_of_two_processes(small_world, data_root, tmp_path, sharding):
    config = evaluated(small_config(small_world, tmp_path / "run", num_steps=4), data_root)
    config = replace(config, parallel=ParallelConfig(sharding=sharding))
    running = start(config, 2, stop_in_evaluation)
    assert running.wait() == [1, 1]
    for text in running.outputs():
        assert "stopped by a signal; everything is saved" in text, text
    assert newest_step(config.run_dir) == len(losses(config.run_dir)) == 2


def test_text_only(small_world, data_root, tmp_path):
    config = small_config(small_world, tmp_path, data={"text_only": True}, num_steps=2)
    train(evaluated(config, data_root))
    assert read_results(tmp_path / "evaluation" / "all")["ethics_virtue"]["n"] == NUM_DOCUMENTS


# ---- which documents, and what stops a run ----


def test_the_largest_number_of_documents_under_five_percent():
    assert largest_limit(lambda limit: 0.0004 * limit, 1000, "") == 80  # 160 would cost 6.4%
    assert largest_limit(lambda limit: 0.0004 * limit, 50, "") == 80  # all 50
    with pytest.raises(UserError, match=r"20 documents .* up to 40% .*\(all .*: 30%\).*limit N"):
        largest_limit(lambda limit: 0.3 + 0.005 * limit, 1000, "30%")


def test_a_short_run_cannot_pay_for_it(small_world, data_root, tmp_path):
    config = evaluated(small_config(small_world, tmp_path), data_root)
    config = replace(config, evaluation=replace(config.evaluation, limit=None))
    with pytest.raises(UserError, match="more than 5%.*--evaluation.limit N"):
        train(config)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_long_run_chooses_by_itself(small_world, data_root, tmp_path, caplog, monkeypatch):
    config = evaluated(small_config(small_world, tmp_path, num_steps=2), data_root, every=1)
    config = replace(config, evaluation=replace(config.evaluation, limit=None))
    monkeypatch.setattr("mmalign.evaluation.during_training.MAX_SHARE", 1e6)
    with caplog.at_level(logging.INFO, logger="mmalign"):
        train(config)
    assert read_results(tmp_path / "evaluation" / "step_1")["config"]["limit"] == 20
    assert "the first 20 documents of each task 2 times, all 45 at the end" in caplog.text
    assert "evaluation took" in caplog.text


@pytest.mark.parametrize(
    "stage, settings, message",
    [
        ("pretrain", {}, "stage pretrain does not change the language model"),
        ("finetune", {"data_root": ""}, "needs --evaluation.data-root"),
        ("finetune", {"tasks": ("ethics_virtu",)}, "unknown task 'ethics_virtu'.*ethics_virtue"),
        ("finetune", {"tasks": ("truthfulqa_gen",)}, "tasks that generate text are not scored"),
        ("finetune", {"tasks": ("ethics_justice",)}, "ETHICS justice: expected one file"),
    ],
)
def test_bad_settings(small_world, data_root, tmp_path, stage, settings, message):
    config = evaluated(small_config(small_world, tmp_path, stage), data_root)
    with pytest.raises(UserError, match=message):
        train(replace(config, evaluation=replace(config.evaluation, **settings)))
    assert not (tmp_path / "metrics.jsonl").exists()
