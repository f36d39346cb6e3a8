"""Requests, gold labels and groups against recorded output of lm-evaluation-harness 00209e10f."""

import hashlib
import json
import shutil

import pytest

from mmalign.errors import UserError
from mmalign.evaluation.tasks import TASKS, describe_data, load_documents, resolve_tasks
from mmalign.evaluation.tasks.ethics import SUBSETS
from mmalign.evaluation.tasks.multiple_choice import request_bytes
from mmalign.evaluation.tasks.truthfulqa import load_truthfulqa

LABEL_OF = {" yes": "1", " no": "0", " reasonable": "1", " unreasonable": "0"}


@pytest.fixture(scope="module")
def recorded(shared_data):
    return json.loads((shared_data / "formats" / "evaluation_requests.json").read_text())["tasks"]


def sha256(documents) -> str:
    return hashlib.sha256(request_bytes(documents)).hexdigest()


def digests(documents) -> str:
    """The first 8 digits of every document's own hash."""
    return "".join(sha256([document])[:8] for document in documents)


@pytest.mark.parametrize("subset", [task.subset for task in SUBSETS])
def test_ethics_requests(shared_data, recorded, subset):
    name = "ethics_cm" if subset == "commonsense" else f"ethics_{subset}"
    (expected,) = recorded[name]["variants"]
    documents = TASKS[f"ethics_{subset}"].load(shared_data)
    assert digests(documents) == expected["document_hashes"]
    assert sha256(documents) == expected["requests_sha256"]
    labels = "".join(LABEL_OF[doc.requests[doc.gold][1]] for doc in documents)
    assert labels == expected["gold_labels"]
    assert [document.doc_id for document in documents] == list(range(expected["num_documents"]))
    for example in expected["documents"]:
        group = example["document"].get("group_id")
        assert documents[example["index"]].group_id == group
        assert documents[example["index"]].gold == example["gold"]["continuation_index"]


@pytest.mark.parametrize("variant", [0, 1], ids=["original", "revised"])
def test_truthfulqa_requests(shared_data, recorded, tmp_path, variant):
    expected = recorded["truthfulqa_mc"]["variants"][variant]
    (tmp_path / "truthfulqa").mkdir()
    shutil.copy(shared_data / expected["file"], tmp_path / "truthfulqa" / "mc_task.json")
    documents = load_truthfulqa(tmp_path)
    assert sha256(documents) == expected["requests_sha256"]
    pairs = list(zip(documents[::2], documents[1::2], strict=True))
    ours = "".join(sha256(pair)[:8] for pair in pairs)
    assert ours == expected["document_hashes"]
    for example in expected["documents"]:
        mc1, mc2 = pairs[example["index"]]
        assert mc1.gold == example["gold"]["mc1"]
        assert list(mc2.gold) == example["gold"]["mc2_labels"]
    described = describe_data(["truthfulqa_mc1"], tmp_path)["truthfulqa/mc_task.json"]
    assert described["sha256"] == expected["file_sha256"]
    assert described["variant"].startswith(expected["variant"])


def test_digest_tells_documents_apart(shared_data, recorded):
    document = TASKS["ethics_virtue"].load(shared_data, limit=8)[-1]
    expected = recorded["ethics_virtue"]["variants"][0]["document_hashes"]
    assert document.digest == expected[7 * 8 : 8 * 8]


def test_limit_takes_the_first_documents(shared_data):
    documents = load_documents(["truthfulqa_mc2", "ethics_justice"], shared_data, limit=3)
    assert {task: [d.doc_id for d in rows] for task, rows in documents.items()} == {
        "truthfulqa_mc2": [0, 1, 2],
        "ethics_justice": [0, 1, 2],
    }


def test_task_names():
    assert resolve_tasks(["ethics"]) == [task.name for task in SUBSETS]
    assert resolve_tasks(["truthfulqa_gen", "truthfulqa_mc1"]) == [
        "truthfulqa_mc1",
        "truthfulqa_gen",
    ]
    assert resolve_tasks(["ethics_cm", "truthfulqa_mc"]) == [
        "truthfulqa_mc1",
        "truthfulqa_mc2",
        "ethics_commonsense",
    ]
    with pytest.raises(UserError, match="unknown task 'ethics_virtues'; expected one of"):
        resolve_tasks(["ethics_virtues"])
    with pytest.raises(UserError, match="no task given"):
        resolve_tasks([])


# ---- bad input ----


def write_truthfulqa(root, text):
    (root / "truthfulqa").mkdir()
    (root / "truthfulqa" / "mc_task.json").write_text(text)


GOOD = '{"question": "Q?", "mc1_targets": {"a": 1, "b": 0}, "mc2_targets": {"a": 1, "b": 0}}'


@pytest.mark.parametrize(
    "text, message",
    [
        ("[\n{]", r"mc_task.json, line 2: not valid JSON"),
        ("{}", "expected a list of questions"),
        ("[]", "contains no question"),
        (
            "[" + GOOD.replace('"b": 0}', '"b": 0, "a": 0}', 1) + "]",
            "mc1 choice 'a' stands .* twice",
        ),
        ("[" + GOOD.replace("Q?", "\\ud83d") + "]", "question 0: its question holds half"),
        ("[" + GOOD.replace('"b"', '"\\ud83d"') + "]", "question 0: mc1 choice .* holds half"),
        (
            "[" + GOOD.replace(": 1", f": {'1' * 5000}", 1) + "]",
            "mc_task.json: not usable JSON",
        ),
        ("[" * 100000, "mc_task.json: not usable JSON"),
        ("version https://git-lfs.github.com/spec/v1", "mc_task.json, line 1: a git-LFS pointer"),
        (f"[{GOOD}, {GOOD}]", "question 1 is the same as question 0"),
        ("[" + GOOD.replace("Q?", " ") + "]", "question 0: expected"),
        ("[" + GOOD.replace('"b"', '" "', 1) + "]", "question 0: a mc1 choice is empty"),
        ("[" + GOOD.replace(': 1, "b": 0', ": 1", 1) + "]", "mc1 has 1 true choices of 1"),
        ("[" + GOOD.replace("{", '{"question": "R?", ', 1) + "]", "'question' stands there twice"),
        (f'[\n{GOOD},\n{{"question": 3}}]', r"mc_task.json, question 1: expected .*found"),
        ("[\n" + GOOD.replace('"a": 1', '"a": 2', 1) + "]", "mc1 choice 'a' has label 2"),
        ("[\n" + GOOD.replace('"b": 0', '"b": 1', 1) + "]", "mc1 has 2 true choices of 2"),
        (
            "[" + GOOD.replace('"mc2_targets": {"a": 1', '"mc2_targets": {"a": 0') + "]",
            r"question 0.*mc2 labels are \(0, 0\)",
        ),
    ],
)
def test_malformed_truthfulqa(tmp_path, text, message):
    write_truthfulqa(tmp_path, text)
    with pytest.raises(UserError, match=message):
        load_truthfulqa(tmp_path)


@pytest.mark.parametrize(
    "subset, text, message",
    [
        ("commonsense", "label,text\n0,x\n", "line 1: expected a heading.*missing: input"),
        ("commonsense", 'label,input\n0,"two\nlines"\n7,x\n', "line 4: expected a label.*'7'"),
        ("justice", "label,scenario\n1,a,b\n", "line 2: expected 2 columns.*found 3"),
        ("utilitarianism", "one\n", "line 1: expected 2 columns"),
        ("utilitarianism", "a,b\na, \n", "line 2: baseline is empty"),
        ("utilitarianism", "baseline,less_pleasant\na,b\n", "line 1: found a heading"),
        ("commonsense", 'label,input\n0,""\n', "line 2: input is empty"),
        ("virtue", "label,scenario\n" + "1,s [SEP] a\n" * 5, "line 2: 5 of the 5 rows"),
        ("virtue", "label,scenario\n1,no trait\n", "line 2: .*found 0 separators"),
        ("deontology", "label,scenario,excuse\n", "contains no row"),
        ("commonsense", "label,input\n0,cut in the mid", "line 2: the file ends within this line"),
        ("commonsense", 'label,input\n0,"cut in a quote\n', "line 2: not valid CSV"),
        ("justice", "label,scenario\n" + "1,a\n" * 7, "has 7 rows, .* groups of 4. A row is"),
        (
            "virtue",
            "label,scenario\n1,s [SEP] a\n" + "0,s [SEP] a\n" * 3 + "0,t [SEP] a\n" * 6,
            "line 6: every 5 rows are a group .* than line 2",
        ),
        (
            "deontology",
            "label,scenario,excuse\n" + "1,s,a\n" * 3 + "0,t,a\n",
            "line 5: every 4 rows are a group",
        ),
    ],
)
def test_malformed_ethics(tmp_path, subset, text, message):
    folder = tmp_path / "ethics" / subset
    folder.mkdir(parents=True)
    (folder / "x_test.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        TASKS[f"ethics_{subset}"].load(tmp_path)


def test_missing_files(tmp_path):
    with pytest.raises(UserError, match="truthfulqa/mc_task.json does not exist"):
        load_truthfulqa(tmp_path)
    with pytest.raises(UserError, match="expected one file .*_test.csv.*found none"):
        TASKS["ethics_virtue"].load(tmp_path)
    with pytest.raises(UserError, match="is not a directory"):
        load_documents(["ethics_virtue"], tmp_path / "absent")


def test_files_are_known_to_be_the_published_ones(shared_data, tmp_path):
    tasks = [task.name for task in SUBSETS]
    published = describe_data(tasks, shared_data)
    assert {facts["variant"] for facts in published.values()} == {"as published"}
    shutil.copytree(shared_data / "ethics", tmp_path / "ethics")
    path = tmp_path / "ethics" / "justice" / "justice_test.csv"
    path.chmod(0o644)
    path.write_text(path.read_text().replace("deserve", "merit"))
    variants = {name: facts["variant"] for name, facts in describe_data(tasks, tmp_path).items()}
    changed = [name for name, variant in variants.items() if variant == "not the published file"]
    assert changed == ["ethics/justice/justice_test.csv"]
