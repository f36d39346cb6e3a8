"""report.md of made-up runs and evaluations: what it says, and that its figures are images."""

import json

import pytest
from PIL import Image

from mmalign.errors import UserError
from mmalign.evaluation.documents import Document
from mmalign.evaluation.metrics import make_item, summarize
from mmalign.evaluation.remarks import remarks
from mmalign.evaluation.report import write_report
from mmalign.evaluation.results import PROTOCOL
from mmalign.evaluation.scoring import Score
from mmalign.system import versions


def make_run(folder, num_steps=60):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"data": {"template": "v1"}, "seed": 7}))
    lines = [
        {"step": i, "loss": 3 / i, "tokens": 100, "samples": 4, "tokens_per_second": 500.0}
        for i in range(1, num_steps + 1)
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text + '{"step": 61, "lo')  # torn by a kill
    return folder


def make_evaluation(folder, num_right):
    """ethics_virtue with the first num_right of 100 documents answered right; all are "yes"."""
    folder.mkdir()
    items = []
    for i in range(100):
        document = Document(
            "ethics_virtue", i, (("context", " yes"), ("context", " no")), 0, group_id=i // 5
        )
        scores = (-1.0, -2.0) if i < num_right else (-2.0, -1.0)
        items.append(make_item(document, [Score(score, 1, 0) for score in scores]))
    summary = summarize(items)
    summary["remarks"] = remarks("ethics_virtue", summary)
    config = {
        "model": folder.name,
        **PROTOCOL,
        "limit": None,
        "precision": "fp32",
        "max_length": 64,
        "num_requests": 200,
        "tokenizer": "tokenizer.model, 32,000 tokens",
        "tokenizer_sha256": "1" * 64,
        "versions": versions(),
        "data_files": {"ethics/virtue/virtue_test.csv": {"sha256": "0" * 64}},
    }
    (folder / "results.json").write_text(json.dumps({"ethics_virtue": summary, "config": config}))
    (folder / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    return folder


def test_report(tmp_path):
    stages = {name: make_run(tmp_path / name) for name in ("pretrain", "finetune")}
    evaluations = {
        "base": make_evaluation(tmp_path / "base", 50),
        "tuned": make_evaluation(tmp_path / "tuned", 80),
    }
    visual = {"tuned": 0.8, "blind": 0.4, "majority": 0.3, "chance": 0.25, "n": 300}
    visual["kinds"] = {"colour": visual | {"tuned": 0.9, "n": 100}}
    path = write_report(tmp_path / "out" / "report.md", stages, evaluations, visual, "A title")
    text = path.read_text()
    assert text.startswith("# A title\n")
    assert "**ethics_virtue**: tuned 80.0 against base 50.0, a difference of +30.0" in text
    assert "80.0% right with the picture, 40.0% without it (blind), 25.0% by chance" in text
    assert "| all | 300 | **80.0** (75.1 to 84.1) | **40.0** (" in text
    assert "| colour | 100 | 90.0 | 40.0 | 30.0 | 25.0 |" in text
    assert "| ethics_virtue | 100 | **50.0** (" in text
    assert "cannot be told from chance (50.0)" in text
    assert "| pretrain | 60 | 240 | 6,000 | 3.000 |" in text
    assert "| model | base: base; tuned: tuned |" in text
    for figure in ("scores.png", "training.png"):
        assert f"({figure})" in text
        with Image.open(path.parent / figure) as image:
            assert image.width > 600 and len(image.convert("L").getcolors()) > 10
    for block in text.split("\n\n"):
        if block.startswith("|"):  # every row of a table has as many cells as its heading
            assert len({line.count("|") for line in block.splitlines()}) == 1, block


def test_report_of_training_alone(tmp_path):
    path = write_report(tmp_path / "report.md", {"pretrain": make_run(tmp_path / "run")}, {})
    text = path.read_text()
    assert "## Training" in text and "## Scores" not in text


def test_missing_files(tmp_path):
    with pytest.raises(UserError, match="not a finished evaluation: it needs results.json"):
        write_report(tmp_path / "report.md", {}, {"base": tmp_path})
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="metrics.jsonl is missing"):
        write_report(tmp_path / "report.md", {"pretrain": tmp_path}, {})
