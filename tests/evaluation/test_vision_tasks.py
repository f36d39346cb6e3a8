"""Tasks about pictures: published files in, scores out, and what is wrong with a file."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from mmalign.errors import UserError
from mmalign.evaluation.tasks import TASKS
from mmalign.evaluation.tasks.as_released import TEMPLATE, parse_vqa
from mmalign.evaluation.tasks.vision_task import VisualAnswer
from mmalign.evaluation.yes_no import COGNITION, PERCEPTION
from mmalign.model.generate import Generation
from tests.evaluation.vision_files import (
    NUM_PICTURES,
    coco_name,
    save_pictures,
    write_json,
    write_mme,
    write_pope,
    write_vqa,
)

NAMES = [coco_name(number) for number in range(NUM_PICTURES)]


@pytest.fixture
def root(tmp_path):
    save_pictures(tmp_path / "coco" / "val2014", NAMES)
    return tmp_path


def answer(text, reason="end", log_odds=None) -> VisualAnswer:
    return VisualAnswer(Generation([], text, reason), log_odds)


def scored(task, documents, texts, **rest):
    items = task.make_items(documents, [answer(x, **rest) for x in texts])
    assert not any(task.problem(json.loads(json.dumps(item))) for item in items)
    return items, task.summarize(items)


QUESTIONS = "vqav2/v2_OpenEnded_mscoco_val2014_questions.json"
ANNOTATIONS = "vqav2/v2_mscoco_val2014_annotations.json"
POPE = "pope/coco_pope_popular.json"
CAPTION_FILE = "coco/mscoco_test.json"


@pytest.mark.parametrize(
    "name, old, new, said",
    [
        (QUESTIONS, '"Is there a cup?"', "null", "question 0 is 'None'; expected text"),
        (QUESTIONS, '"Is there a cup?"', '""', "question 0 is ''; expected text"),
        (QUESTIONS, '"image_id": 1', '"image_id": 2', "question 10 is about the picture 2, .* 1"),
        (ANNOTATIONS, '"answer": "3"', '"answer": 3', "an answer to question 32 is '3'; expected"),
        (POPE, '"yes"', "true", "line 1: its label is 'True'; expected text"),
        (POPE, '"Is there a popular 0 in the image?"', '" "', "line 1: its text is ' '; expected"),
        (POPE, NAMES[0], "../../secret.jpg", "'../../secret.jpg' lies outside its folder"),
        (POPE, None, "", "contains no question"),
        (
            CAPTION_FILE,
            '["a cup"]',
            '"a cup"',
            f"captions of {NAMES[0]} are 'a cup'; expected a list",
        ),
        (CAPTION_FILE, '"a cup"', "3", f"a caption of {NAMES[0]} is '3'; expected text"),
        (CAPTION_FILE, NAMES[0], "", "the file name of a picture is ''; expected text"),
        (CAPTION_FILE, None, "[]", "has no picture of the split test"),
    ],
)
def test_what_a_file_may_not_say(root, name, old, new, said):
    write_vqa(root)
    write_pope(root)
    write_json(root / CAPTION_FILE, [{"image_name": NAMES[0], "captions": ["a cup"]}])
    tasks = {POPE: "pope", CAPTION_FILE: "coco_captions"}
    task, path = TASKS[tasks.get(name, "vqav2")], root / name
    task.load(root)
    text = path.read_text()
    path.write_text(text.replace(old, new, 1) if old else new)
    assert path.read_text() != text
    with pytest.raises(UserError, match=said):
        task.load(root)


# ---- VQAv2 ----


@pytest.mark.parametrize("folder", ["vqav2", "vqa-v2"])
def test_vqa(root, folder):
    write_vqa(root, folder)
    task = TASKS["vqav2"]
    documents = task.load(root)
    assert [x.gold["question_id"] for x in documents[:4]] == [0, 1, 2, 10]
    assert documents[0].question.endswith("\nAnswer the question using a single word or phrase.")
    assert documents[3].image == f"coco/val2014/{coco_name(1)}"
    items, summary = scored(task, documents, ["Yes.", "yes", "two"] * NUM_PICTURES)
    assert [item["score"] for item in items[:3]] == pytest.approx([1.0, 1.0, 0.9])
    assert summary["acc"] == pytest.approx(2.9 / 3)
    assert summary["num_pictures"] == NUM_PICTURES == len({item["group_id"] for item in items})
    assert summary["interval"] == pytest.approx((2.9 / 3, 2.9 / 3))  # all pictures have one mean
    assert summary["by_answer_type"] == pytest.approx({"number": 0.9, "yes/no": 1.0})
    baselines = summary["baselines"]
    assert baselines["always yes"] == pytest.approx(2 / 3)
    assert baselines["most common of the question type"] == pytest.approx(1.0)
    assert list(task.data_files(root)) == [
        f"{folder}/v2_OpenEnded_mscoco_val2014_questions.json",
        f"{folder}/v2_mscoco_val2014_annotations.json",
    ]


def test_vqa_as_released(root):
    write_vqa(root)
    task = replace(TASKS["vqav2_as_released"], num_released=(4, 8))
    documents = task.load(root)
    rows = np.random.RandomState(42).choice(3 * NUM_PICTURES, 12, replace=False)
    ids = [10 * (row // 3) + row % 3 for row in rows]
    assert [x.gold["question_id"] for x in documents] == ids[4:]
    assert all(len(set(x.demonstrations)) for x in documents)
    assert documents[0].question in ("Is there a cup?", "Is it red?", "How many cups?")
    unanimous = next(x for x in documents if x.question == "Is there a cup?")
    items, _ = scored(task, [unanimous], ["yes, there is"], reason="stop")
    assert (items[0]["prediction"], items[0]["score"]) == ("Yes", 0)  # the fault of the scripts
    with pytest.raises(UserError, match="2,048 questions for demonstrations .* has 12"):
        TASKS["vqav2_as_released"].load(root)


def test_parser_of_the_scripts():
    expected = {
        "snow": "No",
        "eyes": "Yes",
        "red ### no": "red ",
        "a cat": "a cat",
        "Nothing": "No",
    }
    assert {text: parse_vqa(text) for text in expected} == expected


def test_vqa_files_that_do_not_belong_together(root):
    questions, annotations = write_vqa(root)
    rows = json.loads(annotations.read_text())["annotations"]
    write_json(annotations, {"annotations": rows[1:]})
    with pytest.raises(UserError, match=r"1 questions have no annotation .*first: 32"):
        TASKS["vqav2"].load(root)
    write_json(annotations, {"annotations": [rows[0], *rows]})
    with pytest.raises(UserError, match="question 32 has two annotations"):
        TASKS["vqav2"].load(root)
    rows[0]["answers"][1]["answer_id"] = 1
    write_json(annotations, {"annotations": rows})
    with pytest.raises(UserError, match="question 32 has the answer_id"):
        TASKS["vqav2"].load(root)
    write_json(questions, {"rows": []})
    with pytest.raises(UserError, match="not in its published form"):
        TASKS["vqav2"].load(root)


def test_missing_pictures_and_files(root):
    with pytest.raises(UserError, match="vqav2 needs one of these files"):
        TASKS["vqav2"].load(root)
    write_vqa(root)
    (root / "coco/val2014" / NAMES[0]).unlink()
    (root / "coco/val2014" / NAMES[2]).unlink()
    with pytest.raises(UserError, match=f"{NAMES[0]} and 1 more pictures of 4 not found"):
        TASKS["vqav2"].load(root)
    save_pictures(root / "coco/val2014", NAMES[:1])
    assert len(TASKS["vqav2"].load(root, limit=6)) == 6  # about the first two pictures


# ---- captions ----

CAPTIONS = [
    ["A red cup on a shelf.", "A cup stands next to two books."],
    ["Two dogs run over green grass.", "Dogs are running."],
    ["A man riding a wave.", "A surfer on a big wave."],
    ["A train at a station.", "A red train stops."],
]


def write_captions(root, layout):
    rows = list(zip(NAMES, CAPTIONS, strict=True))
    if layout == "list":
        content = [{"split": "test", "image_name": x, "captions": y} for x, y in rows]
        write_json(root / "coco/mscoco_test.json", content)
    elif layout == "karpathy":
        images = [
            {"filename": x, "split": "test", "sentences": [{"raw": caption} for caption in y]}
            for x, y in rows
        ]
        images.append({"filename": "other.jpg", "split": "train", "sentences": [{"raw": "x"}]})
        write_json(root / "coco/dataset_coco.json", {"dataset": "coco", "images": images})
    else:
        images = [{"id": i, "file_name": x} for i, x in enumerate(NAMES)]
        annotations = [
            {"id": 10 * i + j, "image_id": i, "caption": caption}
            for i, captions in enumerate(CAPTIONS)
            for j, caption in enumerate(captions)
        ]
        write_json(
            root / "coco/captions_val2014.json", {"images": images, "annotations": annotations}
        )


@pytest.mark.parametrize("layout", ["list", "karpathy", "coco"])
def test_captions(root, layout):
    write_captions(root, layout)
    task = TASKS["coco_captions"]
    documents = task.load(root)
    assert [x.gold for x in documents] == CAPTIONS
    texts = ["A red cup on a shelf.", "Two dogs. They run far away and bark.", "nothing", ""]
    items, summary = scored(task, documents, texts)
    assert items[0]["score"] > 4 > items[1]["score"]
    assert items[1]["first_sentence"] > 0
    assert items[2]["score"] == items[3]["score"] == 0
    assert summary["num_empty"] == 1
    few = task.load(root, limit=1)
    assert task.make_items(few, [answer(texts[0])])[0]["score"] == items[0]["score"]


def test_captions_as_released(root):
    write_captions(root, "list")
    rows = [{"image_name": f"{i}.jpg", "captions": [f"caption {i}"]} for i in range(9)]
    write_json(root / "mscoco/mscoco_train.json", rows)
    task = TASKS["coco_captions_as_released"]
    documents = task.load(root)
    assert all(len(set(x.demonstrations)) == 3 for x in documents)
    assert documents == task.load(root)
    items, _ = scored(task, documents, ['A "red" cup'] * 4, reason="stop")
    assert items[0]["answer"] == 'A "red" cup###'  # the scripts do not cut the stop string off


# ---- POPE and MME ----


@pytest.mark.parametrize("folder", ["pope", "pope/output/coco"])
def test_pope(root, folder):
    write_pope(root, folder)
    task = TASKS["pope"]
    documents = task.load(root, limit=6)
    assert [x.category for x in documents] == ["random", "popular", "adversarial"] * 2
    documents = task.load(root)
    texts = ["Yes", "Yes, it is.", "yes"] + ["NO", "I don't know", "no"] * (len(documents) // 3 - 1)
    items, summary = scored(task, documents, texts)
    assert [item["prediction"] for item in items[3:6]] == ["no", None, "no"]
    assert summary["unparsed"] == len(documents) // 3 - 1
    assert summary["baselines"] == {"always yes": 0.5, "always no": 0.5}
    assert summary["categories"]["popular"]["yes_rate"] == 1
    assert summary["categories"]["popular"]["official_parser"]["yes_ratio"] == 1
    f1 = [part["f1"] for part in summary["categories"].values()]
    assert summary["f1"] == pytest.approx(np.mean(f1))
    rows = task.rows(summary)
    assert list(rows) == ["pope", "pope_random", "pope_popular", "pope_adversarial"]
    released, _ = scored(TASKS["pope_as_released"], documents, ["No\n"] * 24, reason="stop")
    assert {item["prediction"] for item in released} == {"yes"}  # "No\n###" has no word no


def test_log_odds_are_ours(root):
    write_pope(root)
    task = TASKS["pope"]
    documents = task.load(root)
    odds = [2.0 if x.gold == "yes" else 1.0 for x in documents]
    answers = [answer("Yes", log_odds=x) for x in odds]
    summary = task.summarize(task.make_items(documents, answers))
    assert summary["ours"] == {"auroc": 1.0, "acc_by_log_odds": 0.5}


def test_auroc_and_share_of_yes_by_question(root):
    """Their means are the summary's; an answer that is not parsed has no part in the latter."""
    write_pope(root)
    task = TASKS["pope"]
    documents = task.load(root)
    texts = ["Yes", "no", "perhaps"] * 8
    answers = [answer(x, log_odds=float(i % 5)) for i, x in enumerate(texts)]
    items = task.make_items(documents, answers)
    summary, found = task.summarize(items), task.beside(items, None)
    assert np.mean(found["auroc"]) == pytest.approx(summary["ours"]["auroc"])
    assert np.nanmean(found["yes_rate"]) == summary["yes_rate"] == 0.5
    assert np.isnan(found["yes_rate"]).sum() == 8
    unclear = task.make_items(documents, [answer("perhaps")] * 24)
    assert task.beside(unclear, None) == {}


@pytest.mark.parametrize(
    "line", ['{"image": "a.jpg"}', '{"image": "a", "text": "b", "label": "maybe"}', "[]", "{"]
)
def test_pope_file_with_a_bad_line(root, line):
    write_pope(root)
    path = root / "pope/coco_pope_popular.json"
    path.write_text(path.read_text() + "\n" + line)
    with pytest.raises(UserError, match="coco_pope_popular.json, line 9: "):
        TASKS["pope"].load(root)


def test_mme(tmp_path):
    write_mme(tmp_path, (*PERCEPTION, *COGNITION))
    task = TASKS["mme"]
    documents = task.load(tmp_path)
    assert len(documents) == 14 * 2 * 2
    assert [x.gold for x in documents[:2]] == ["yes", "no"]
    assert documents[0].image == documents[1].image == "mme/existence/0.jpg"
    assert documents[0].question == (
        "Is it existence 0?\nAnswer the question using a single word or phrase."
    )
    assert {x.category: x.image for x in documents}["posters"] == "mme/posters/images/1.jpg"
    _, summary = scored(task, documents, ["Yes"] * len(documents))
    assert (summary["perception"], summary["cognition"]) == (500, 200)
    _, summary = scored(task, documents, [x.gold for x in documents])
    assert (summary["perception"], summary["cognition"]) == (2000, 800)
    assert task.rows(summary)["mme_perception"]["acc"] == 1
    assert "perception 2000.0 of 2,000" in task.caveats(summary)[0]
    released = TASKS["mme_as_released"]
    documents = released.load(tmp_path)
    assert documents[0].question == "Is it existence 0? Please answer yes or no."
    _, summary = scored(released, documents, ["yes"] * len(documents))
    assert (summary["perception"], summary["cognition"]) == (400, 200)


@pytest.mark.parametrize(
    "text", ["a\tYes\n", "a\tYes\nb\tNo\nc\tYes\n", "a\tYes\nb\tYes\n", "a\tYes\tit is\nb\tNo\n"]
)
def test_odd_mme_file(tmp_path, text):
    write_mme(tmp_path, (*PERCEPTION, *COGNITION))
    (tmp_path / "mme/count/1.txt").write_text(text)
    with pytest.raises(UserError, match=r"count/1\.txt: expected two lines"):
        TASKS["mme"].load(tmp_path)


def test_mme_without_a_picture_or_a_subtask(tmp_path):
    write_mme(tmp_path, (*PERCEPTION, *COGNITION[1:]))
    with pytest.raises(UserError, match="lacks commonsense_reasoning"):
        TASKS["mme"].load(tmp_path)
    write_mme(tmp_path, COGNITION[:1])
    (tmp_path / "mme/scene/0.jpg").unlink()
    with pytest.raises(UserError, match="its picture is missing"):
        TASKS["mme"].load(tmp_path)


def test_protocols_share_no_row(root):
    assert TASKS["pope"].protocol()["protocol"] == "standard"
    assert TASKS["pope_as_released"].protocol()["protocol"] == "as-released"
    assert TEMPLATE.stop == ("###",)


def test_a_question_that_stands_twice(root, tmp_path):
    write_pope(root)
    path = root / POPE
    lines = path.read_text().splitlines()
    twice = json.dumps(json.loads(lines[2]) | {"question_id": 99, "label": "no"})
    path.write_text("\n".join([*lines, twice]))
    with pytest.raises(UserError, match="line 9 asks the same .* as line 3. Remove one"):
        TASKS["pope"].load(root)
    questions, _ = write_vqa(root)
    rows = json.loads(questions.read_text())["questions"]
    questions.write_text(json.dumps({"questions": [*rows, rows[1]]}))
    with pytest.raises(UserError, match="entries 1 and 12 .* are both question 1. Remove one"):
        TASKS["vqav2"].load(root)
    write_mme(tmp_path, (*PERCEPTION, *COGNITION))
    (tmp_path / "mme/count/1.txt").write_text("Is it?\tYes\nIs it?\tNo\n")
    with pytest.raises(UserError, match="count/1.txt: both lines ask the same"):
        TASKS["mme"].load(tmp_path)


def test_mme_folders_that_would_be_passed_over(tmp_path):
    write_mme(tmp_path, (*PERCEPTION, *COGNITION))
    (tmp_path / "mme/eval_tool/Your_Results").mkdir(parents=True)
    (tmp_path / "mme/eval_tool/Your_Results/count.txt").write_text("as published")
    assert TASKS["mme"].load(tmp_path)
    write_mme(tmp_path, ("counting",))
    with pytest.raises(UserError, match="mme/counting holds questions, but MME has no subtask"):
        TASKS["mme"].load(tmp_path)
    shutil.rmtree(tmp_path / "mme/counting")
    (tmp_path / "mme/posters/0.txt").write_text("Is it?\tYes\nIs it not?\tNo\n")
    with pytest.raises(UserError, match="posters: expected questions .* found both"):
        TASKS["mme"].load(tmp_path)
    shutil.rmtree(tmp_path / "mme/posters")
    (tmp_path / "mme/posters").mkdir()
    with pytest.raises(UserError, match="posters: expected questions .* found none"):
        TASKS["mme"].load(tmp_path)
