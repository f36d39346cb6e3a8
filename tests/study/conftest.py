"""A study of seconds: a small model, three steps, six questions."""

import json
from pathlib import Path

import pytest

from mmalign.study.identity import Orders
from mmalign.study.report import write_study
from mmalign.study.schedule import run_study
from mmalign.study.study_file import read_study
from tests.training.conftest import small_world  # noqa: F401  a fixture

QUESTIONS = ("what is red", "what is blue", "is it near", "what is above", "no circle", "is the a")
STUDY = """
[study]
output = "{output}"
seeds = [0, 1]
tasks = ["truthfulqa"]
evaluation-data = "{world}/evaluation"
visual-questions = "{world}/questions.json"
visual-questions-images = "{world}/images"

[pretrain]
data.path = "{world}/pretrain.json"
data.image-root = "{world}/images"
data.template = "plain"
data.num-workers = 1
num-steps = 3

[finetune]
data.path = "{world}/finetune.json"
data.image-root = "{world}/images"
num-steps = 3
global-batch-size = 8

[parents.small]
decoder = "{world}/decoder"
vision-tower = "{world}/vision_tower"
pretrain = "tiny-pretrain"

[variants.visual]
finetune = "tiny-finetune"

[variants.text-only]
finetune = "tiny-finetune-text-only"

[variants.part]
finetune = "tiny-finetune"
samples = 16

[[questions]]
name = "Q1"
asks = "Does tuning help?"
contrast = "visual - base"
metrics = ["truthfulqa_mc2"]
primary = true

[[questions]]
name = "Q2"
asks = "Is a part enough?"
contrast = "part ~ visual"
margin = 5.0
metrics = ["truthfulqa_mc2"]
"""


@pytest.fixture(scope="session")
def world(small_world) -> Path:  # noqa: F811
    """The small world's folder, with evaluation files."""
    folder = small_world.root / "evaluation" / "truthfulqa"
    folder.mkdir(parents=True, exist_ok=True)
    documents = [
        {
            "question": f"{question}?",
            "mc1_targets": {f"it is {word}.": int(i == 0) for i, word in enumerate(words)},
            "mc2_targets": {f"it is {word}.": int(i < 2) for i, word in enumerate(words)},
        }
        for question in QUESTIONS
        for words in [("red", "blue", "small")]
    ]
    (folder / "mc_task.json").write_text(json.dumps(documents))
    asked = [
        {
            "id": i,
            "image": f"{i // 2}.png",
            "type": "colour",
            "choices": ["red", "blue"],
            "conversations": [
                {"from": "human", "value": f"<image>\n{question}?"},
                {"from": "gpt", "value": "red" if i % 3 else "blue"},
            ],
        }
        for i, question in enumerate(QUESTIONS)
    ]
    (small_world.root / "questions.json").write_text(json.dumps(asked))
    return small_world.root


@pytest.fixture
def study_file(world, tmp_path):
    """Writes the study with changed or added text, and returns the path of its file."""

    def write(text: str = STUDY, more: str = "", name: str = "study") -> Path:
        path = tmp_path / f"{name}.toml"
        path.write_text(text.format(world=world, output=tmp_path / name) + more)
        return path

    return write


@pytest.fixture(scope="session")
def finished(world, tmp_path_factory) -> Orders:
    """The study when all is done, undisturbed, with its report."""
    folder = tmp_path_factory.mktemp("finished")
    path = folder / "study.toml"
    path.write_text(STUDY.format(world=world, output=folder / "study"))
    orders = Orders(read_study(path))
    assert run_study(orders, orders.study.runs, jobs=1) == {}
    write_study(orders)
    return orders
