"""Damaged outputs of evaluate.py through everything that reads them: never other scores."""

import json
import shutil
from pathlib import Path
from random import Random

import pytest

from mmalign.evaluation import report
from mmalign.evaluation.items import is_finished, read_items, require_no_loss
from mmalign.evaluation.report import compare_with_base, write_report
from tests.evaluation.synthetic import make_evaluation
from tests.fuzz.damage import damaged_bytes, damaged_json, ends_well

pytestmark = pytest.mark.fuzz
RIGHT, WRONG = (0, 0), (0, 1)
KEYS = ("acc", "interval", "score", "prediction", "config", "tasks", "ethics_virtue")


@pytest.fixture
def outputs(tmp_path) -> dict[str, Path]:
    """Two evaluations of the same documents, of both kinds of tasks."""
    outputs = {}
    for name, second in (("a", RIGHT), ("b", WRONG)):
        answers = {"ethics_justice": [RIGHT, second] * 4, "ethics_commonsense": [second] * 3}
        weights = str(tmp_path / "model")
        outputs[name] = make_evaluation(tmp_path / name, answers, [10.0, -5.0], weights=weights)
    return outputs


def damage(path: Path, rng: Random) -> None:
    if path.suffix == ".json":
        path.write_bytes(damaged_json(path.read_text(), rng, KEYS))
    elif rng.random() < 0.5:
        path.write_bytes(damaged_bytes(path.read_bytes(), rng))
    else:  # one line, or lines that are exchanged, doubled or lost
        lines = path.read_text().splitlines()
        number, kind = rng.randrange(len(lines)), rng.random()
        if kind < 0.6:
            lines[number] = damaged_json(lines[number], rng, KEYS).decode(errors="replace")
        elif kind < 0.8:
            rng.shuffle(lines)
        else:
            lines[number : number + 1] = [lines[number]] * rng.choice((0, 2))
        path.write_text("\n".join(lines) + "\n")


def test_damaged_outputs_are_never_believed(outputs, tmp_path, monkeypatch, seeds):
    for name in ("plot_scores", "plot_curves", "plot_training"):  # which read what others did
        monkeypatch.setattr(report, name, lambda *arguments: None)
    expected, items = compare_with_base(outputs), read_items(outputs["b"])
    changed, accepted = tmp_path / "changed", 0
    names = (str(changed), "changed")
    pair = {"a": outputs["a"], "changed": changed}

    def read() -> None:
        found = compare_with_base(pair)["changed"]
        assert found["tasks"] == expected["b"]["tasks"] and read_items(changed) == items
        write_report(tmp_path / "report.md", {}, pair, comparisons={"changed": found})

    for seed in seeds("results"):
        rng = Random(seed)
        shutil.copytree(outputs["b"], changed, dirs_exist_ok=True)
        name = rng.choice(("results.json", "items.jsonl"))
        damage(changed / name, rng)
        before = {path.name: path.read_bytes() for path in changed.iterdir()}
        good = ends_well((seed, name), names, read)
        assert is_finished(changed) == good
        ends_well((seed, name), names, require_no_loss, changed, tmp_path / "model", [], 1)
        assert before == {path.name: path.read_bytes() for path in changed.iterdir()}
        accepted += good
    assert accepted < len(seeds("results")) / 10  # white space at most


def test_the_scores_of_good_outputs(outputs):
    accuracy = json.loads((outputs["b"] / "results.json").read_text())["ethics_justice"]["acc"]
    assert accuracy == 0.5 and is_finished(outputs["b"])
