"""Outputs of an evaluation: replaced by whole ones only, and not believed when they are damaged."""

import json
import math
import shutil

import pytest

from mmalign.errors import UserError
from mmalign.evaluation import items as items_module
from mmalign.evaluation.compare import compare_evaluations
from mmalign.evaluation.items import (
    is_finished,
    read_items,
    read_results,
    require_no_loss,
    write_items,
)
from mmalign.evaluation.report import write_report

from .synthetic import make_evaluation

TASKS = {"ethics_justice": [(0, 1), (1, 1)] * 4, "ethics_commonsense": [(0, 0)] * 3}


@pytest.fixture
def evaluation(tmp_path):
    return make_evaluation(tmp_path / "a", TASKS, [10.0, -5.0], weights=str(tmp_path / "model"))


def change_item(folder, line: int, **fields) -> None:
    """Fields of one line; x__y stands for y in x."""
    path = folder / "items.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    item = json.loads(lines[line])
    for name, value in fields.items():
        outer, _, inner = name.partition("__")
        if inner:
            item[outer][inner] = value
        else:
            item[name] = value
    lines[line] = json.dumps(item) + "\n"
    path.write_text("".join(lines))


@pytest.mark.parametrize("score", [math.nan, math.inf, 5, -0.1, "1", None, True, [1]])
def test_a_score_that_cannot_be_names_the_document(evaluation, tmp_path, score):
    shutil.copytree(evaluation, tmp_path / "b")
    change_item(tmp_path / "b", 2, score=score)
    found = r"b/items.jsonl, line 3, ethics_justice document 2: score is .*from 0 to 1"
    with pytest.raises(UserError, match=found):
        compare_evaluations(evaluation, tmp_path / "b")


@pytest.mark.parametrize(
    "line, fields",
    [
        (0, {"choices": []}),
        (0, {"choices": [{"text": " yes"}]}),
        (0, {"gold": 2}),
        (0, {"gold": [1]}),
        (0, {"prediction": "0"}),
        (0, {"context": 3}),
        (0, {"group_id": None}),
        (0, {"doc_id": "0"}),
        (0, {"task": ["x"]}),
        (11, {"scores": {}}),
        (11, {"scores__bleu_acc": math.nan}),
        (12, {"constant_scores__rougeL_diff": 101}),
        (12, {"answer": None}),
    ],
)
def test_other_damage_names_the_line(evaluation, line, fields):
    change_item(evaluation, line, **fields)
    with pytest.raises(UserError, match=f"items.jsonl, line {line + 1}"):
        read_items(evaluation)
    assert not is_finished(evaluation)


def test_lines_that_are_good_but_not_those_of_the_results(evaluation, caplog):
    whole = (evaluation / "items.jsonl").read_text()
    (evaluation / "items.jsonl").write_text("".join(whole.splitlines(keepends=True)[:-1]))
    with pytest.raises(UserError, match="items.jsonl is not the one .* cut short or changed"):
        read_items(evaluation)
    assert not is_finished(evaluation) and "does not count" in caplog.text
    (evaluation / "items.jsonl").write_text(whole)
    assert is_finished(evaluation)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"config": []}', '{"config": {"tasks": 3}}']
    + [("acc", x) for x in (None, "0.5", math.nan, 2)]
    + [("interval", x) for x in ([0, None], 3, [0.1, 0.2, 0.3])]
    + [("beside", x) for x in (3, {"auroc": {}}, {"auroc": {"acc": 0.5, "interval": [0, 9]}})],
)
def test_damaged_results_are_named(evaluation, text):
    path = evaluation / "results.json"
    if isinstance(text, tuple):
        results = json.loads(path.read_text())
        results["ethics_justice"][text[0]] = text[1]
        text = json.dumps(results)
    path.write_text(text)
    with pytest.raises(UserError, match="results.json"):
        read_results(evaluation)
    assert not is_finished(evaluation)
    with pytest.raises(UserError, match="results.json.*--overwrite"):
        require_no_loss(evaluation, evaluation, TASKS, None)


@pytest.mark.parametrize(
    "name, change, named",
    [
        ("ethics_justice", {"acc": 0.9}, "ethics_justice"),
        ("ethics_commonsense", {"interval": [0.2, 0.9]}, "ethics_commonsense"),
        ("ethics_justice", {"em": 1.0}, "ethics_justice"),
        ("ethics_commonsense", {"n": 4}, "ethics_commonsense"),
        ("ethics_commonsense", {"chance": 0.1}, "ethics_commonsense"),
        ("ethics_virtue", {"acc": 0.9, "interval": [0.5, 1.0]}, "ethics_virtue"),
    ],
)
def test_scores_that_do_not_follow_from_the_items_are_named(evaluation, name, change, named):
    path = evaluation / "results.json"
    results = json.loads(path.read_text())
    results[name] = results.get(name, {}) | change
    path.write_text(json.dumps(results))
    found = f"results.json: the scores of {named} do not follow from items.jsonl"
    with pytest.raises(UserError, match=found):
        read_items(evaluation)
    assert not is_finished(evaluation)
    with pytest.raises(UserError, match=found):
        write_report(evaluation.parent / "report.md", {}, {"base": evaluation})
    assert not (evaluation.parent / "report.md").exists()


def test_what_is_said_about_scores_may_come_from_another_version(evaluation):
    path, items = evaluation / "results.json", read_items(evaluation)
    results = json.loads(path.read_text())
    results["ethics_justice"]["caveats"] = ["another sentence"]
    write_items(evaluation, items, results)
    assert read_items(evaluation) == items
    path.write_text(path.read_text().replace("another sentence", "a forged sentence"))
    with pytest.raises(UserError, match="results.json has changed since it was written"):
        read_items(evaluation)


def test_results_that_an_evaluation_would_drop_are_kept(evaluation, tmp_path):
    """Of another model, of another task or of more documents; the same again replaces them."""
    model, other = tmp_path / "model", tmp_path / "another"
    tasks = {*TASKS, "truthfulqa_gen"}
    require_no_loss(evaluation, model, [*tasks, "ethics_virtue"], None)
    require_no_loss(tmp_path / "nothing", other, [], 1)
    with pytest.raises(UserError, match="holds the results of .*model, not of .*another"):
        require_no_loss(evaluation, other, tasks, None)
    with pytest.raises(UserError, match="results of truthfulqa_gen, which --tasks leaves out"):
        require_no_loss(evaluation, model, TASKS, None)
    with pytest.raises(UserError, match="results of all documents of each task, more than --limit"):
        require_no_loss(evaluation, model, tasks, 3)
    few = make_evaluation(tmp_path / "few", TASKS, weights=str(model), limit=3)
    require_no_loss(few, model, TASKS, 3)
    require_no_loss(few, model, TASKS, None)
    with pytest.raises(UserError, match="results of the first 3 documents .* more than --limit 2"):
        require_no_loss(few, model, TASKS, 2)


def test_a_failed_write_leaves_the_results_of_before(evaluation, monkeypatch):
    before = {path.name: path.read_bytes() for path in evaluation.iterdir()}
    items, results = read_items(evaluation), read_results(evaluation)

    def full(*args):
        raise OSError(28, "No space left on device")

    for name in ("write_text", "os.fsync"):
        with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
            patch.setattr(f"{items_module.__name__}.{name}", full)
            write_items(evaluation, items, results | {"cost": 1})
        assert {path.name: path.read_bytes() for path in evaluation.iterdir()} == before
