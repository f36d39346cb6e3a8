"""Tasks about pictures in a study: what is asked, its scores by document, and the report."""

import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest

from mmalign.errors import UserError
from mmalign.evaluation.items import read_items, read_results
from mmalign.study.identity import Orders
from mmalign.study.report import write_study
from mmalign.study.schedule import run_study
from mmalign.study.scores import collect
from mmalign.study.study_file import read_study
from tests.evaluation.vision_files import NUM_PICTURES, coco_name, write_json, write_pope
from tests.study.conftest import STUDY

SHOWN = ("blind", "mismatched", "brightness-1", "brightness-3")
CHANGED = (
    ('tasks = ["truthfulqa"]', """
tasks = ["truthfulqa", "coco_captions", "pope"]
controls = ["blind", "mismatched"]
corruptions = ["brightness:1,3"]"""),
    ("seeds = [0, 1]", "seeds = [0]"),
    ("{world}/evaluation", "{output}/evaluation"),
    ('[variants.part]\nfinetune = "tiny-finetune"\nsamples = 16\n', ""),
    ('contrast = "part ~ visual"\nmargin = 5.0\nmetrics = ["truthfulqa_mc2"]',
     'contrast = "visual - base"\nmetrics = ["pope_over_blind", "coco_captions_over_corrupted"]'),
)  # fmt: skip


def changed(text: str) -> str:
    for old, new in CHANGED:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


@pytest.fixture(scope="module")
def orders(world, tmp_path_factory) -> Orders:
    """Of a finished study whose evaluation data has captions and POPE-like questions."""
    folder = tmp_path_factory.mktemp("pictures")
    data = folder / "evaluation"
    shutil.copytree(world / "evaluation", data)
    pictures = data / "coco" / "val2014"
    pictures.mkdir(parents=True)
    for number in range(NUM_PICTURES):
        shutil.copy(world / "images" / f"{number}.png", pictures / coco_name(number))
    write_pope(data)
    images = [{"id": x, "file_name": coco_name(x)} for x in range(NUM_PICTURES)]
    captions = [
        {"id": 10 * x + y, "image_id": x, "caption": f"a {word} circle near the {x}"}
        for x in range(NUM_PICTURES)
        for y, word in enumerate(("red", "blue"))
    ]
    write_json(data / "coco/captions_val2014.json", {"images": images, "annotations": captions})
    path = folder / "study.toml"
    path.write_text(changed(STUDY).format(world=world, output=folder))
    orders = Orders(read_study(path))
    assert run_study(orders, orders.study.runs, jobs=1) == {}
    write_study(orders)
    return orders


def order_of(orders: Orders, variant: str):
    return next(orders[run] for run in orders.study.runs if run.variant == variant)


def test_only_models_that_see_are_asked(orders):
    assert not order_of(orders, "base").pictures.exists()
    assert not order_of(orders, "text-only").pictures.exists()
    folder = order_of(orders, "visual").pictures / "standard"
    assert {x.name for x in folder.iterdir() if x.is_dir()} == set(SHOWN)
    assert set(read_items(order_of(orders, "visual").scores)) == {
        "truthfulqa_mc1",
        "truthfulqa_mc2",
    }


def test_the_mean_over_documents_is_the_score(orders):
    table = pq.read_table(orders.study.output / "documents.parquet").to_pandas()
    found = table.query("variant == 'visual'").groupby("metric", observed=True)["value"].mean()
    folder = order_of(orders, "visual").pictures / "standard"
    for name in ("", *SHOWN):
        results, ending = read_results(folder / name), f"_{name}" if name else ""
        for task in ("coco_captions", "pope"):
            assert found[task + ending] == pytest.approx(results[task]["acc"])
        if f"pope_yes_rate{ending}" in found:  # where an answer holds yes or no
            rate = results["pope"]["yes_rate"]
            assert found[f"pope_yes_rate{ending}"] == pytest.approx(rate)


def test_what_the_own_picture_adds(orders):
    """Question by question, in clusters of one picture; 0 for who sees none."""
    scores = {key[1]: run for key, run in collect(orders).items()}
    sees = scores["visual"]
    for task in ("coco_captions", "pope"):
        own = sees[task].values
        corrupted = [sees[f"{task}_{name}"].values for name in SHOWN[2:]]
        expected = {"blind": own - sees[f"{task}_blind"].values}
        expected["corrupted"] = own - np.mean(corrupted, axis=0)
        for name, values in expected.items():
            added = sees[f"{task}_over_{name}"]
            assert np.array_equal(added.values, values)
            assert len(set(added.clusters)) == NUM_PICTURES
            for other in ("base", "text-only"):
                blank = scores[other][f"{task}_over_{name}"]
                assert not blank.values.any()
                assert np.array_equal(blank.clusters, added.clusters)
    assert "pope" not in scores["base"] and "pope" not in scores["text-only"]


def test_the_report_has_table_figure_and_verdicts(orders):
    report = (orders.study.output / "report.md").read_text()
    results = read_results(order_of(orders, "visual").pictures / "standard")
    section = report.split("## Sight")[1].split("\n## ")[0]
    for task in ("coco_captions", "pope"):
        line = next(x for x in section.splitlines() if x.startswith(f"| {task}"))
        assert f" {100 * results[task]['acc']:.1f} " in line
    assert "![Score by severity of the corruption](corruptions.png)" in section
    assert (orders.study.output / "corruptions.png").stat().st_size > 10_000
    rows = (orders.study.output / "contrasts.csv").read_text()
    assert "pope_over_blind" in rows and "coco_captions_over_corrupted" in rows
    tables = report.split("## Sight")[0]
    assert "pope" not in tables.split("## Scores")[1]  # tables of the language model


def test_what_is_asked_of_pictures_belongs_to_the_evaluation(orders, tmp_path):
    """Another corruption is another evaluation, but the same model."""
    path = tmp_path / "other.toml"
    path.write_text(orders.study.path.read_text().replace("brightness:1,3", "brightness:1"))
    other = Orders(read_study(path))
    for run, again in zip(orders.study.runs, other.study.runs, strict=True):
        assert other[again].identity == orders[run].identity
    assert other.evaluation.key != orders.evaluation.key


@pytest.mark.parametrize(
    "old, new, message",
    [
        ('"truthfulqa", "coco', '"coco', "expected at least one task without pictures"),
        ("brightness:1,3", "brightness:9", "severity '9'"),
        ("pope_over_blind", "pope_over_bland", "did you mean pope_over_blind"),
        ('["blind", "mismatched"]', '["blond"]', "controls"),
    ],
)
def test_a_mistake_is_found_before_any_run(orders, tmp_path, old, new, message):
    path, text = tmp_path / "wrong.toml", orders.study.path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(UserError, match=message):
        read_study(path)
