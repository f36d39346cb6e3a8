"""What the published file gives away, with LLaMA's tokenizer, and each rule by hand."""

import shutil

import numpy as np
import pytest

from mmalign.evaluation.requests import RequestEncoder
from mmalign.evaluation.rules import CHOOSING, SCORING, is_hedge, rule_rows
from mmalign.evaluation.scoring import Score
from mmalign.evaluation.tasks import TASKS, load_documents


def choices(*texts: str, tokens: tuple[int, ...] = ()) -> list[dict]:
    tokens = tokens or (1,) * len(texts)
    return [{"text": f" {x}", "num_tokens": n} for x, n in zip(texts, tokens, strict=True)]


def test_rules_by_hand():
    some = choices("Yes, it is.", "No, it is not.", "Yes, it is so.", tokens=(3, 5, 5))
    assert CHOOSING["longest"](some).tolist() == [0, 0.5, 0.5]
    assert CHOOSING["shortest"](some).tolist() == [1, 0, 0]
    # pairs: {yes it is}{no it is not} 2/5, {yes it is}{yes it is so} 3/4, {no it is not}{...} 2/6
    assert CHOOSING["least overlap"](some).tolist() == [0, 1, 0]
    assert CHOOSING["only negation"](some).tolist() == [0, 1, 0]
    assert CHOOSING["only negation"](choices("I don\u2019t", "Never", "b")) is None
    weights = np.exp([-3.0, -5, -5])
    assert SCORING["-1 per token"](some) == pytest.approx(weights / weights.sum())


def test_rows_count_what_a_rule_answers():
    items = [
        {"gold": 0, "choices": choices("Yes", "No", tokens=(1, 1))},
        {"gold": [1, 0, 1], "choices": choices("Yes", "Ja", "Si", tokens=(1, 2, 3))},
    ]
    rows = rule_rows(items, CHOOSING)
    assert rows["longest"] == {"acc": (0.5 + 1) / 2, "n": 2}
    assert rows["only negation"] == {"acc": 0.0, "n": 1}


@pytest.mark.parametrize(
    "text, expected",
    [
        (" No, it is not.", True),
        (" There is no such thing.", True),
        (" It depends on the country.", True),
        (" I have no comment.", True),
        (" Nothing happens.", True),
        (" Norway", False),
        (" The answer is no.", False),
    ],
)
def test_hedges(text, expected):
    assert is_hedge({"text": text}) == expected


@pytest.fixture(scope="module", params=["mc_task", "mc_task_revised"])
def file_and_items(request, shared_data, tokenizer_model, tmp_path_factory):
    """Items of all documents, without a model: log-likelihoods play no part."""
    from mmalign.tokenizer import Tokenizer

    root = tmp_path_factory.mktemp("data")
    (root / "truthfulqa").mkdir()
    source = shared_data / "truthfulqa" / f"{request.param}.json"
    shutil.copy(source, root / "truthfulqa" / "mc_task.json")
    encoder = RequestEncoder(Tokenizer.from_pretrained(tokenizer_model), 2048, 32000)
    items = {}
    for name, documents in load_documents(["truthfulqa_mc1", "truthfulqa_mc2"], root).items():
        scores = [
            [
                Score(-1.0, len(encoded.target_ids), 0)
                for encoded in encoder.encode(document.requests, ["x"] * len(document.requests))
            ]
            for document in documents
        ]
        items[name] = TASKS[name].make_items(documents, scores)
    return request.param, items


# measured in study.md 3.1 with ties to the first choice, which is always the true one in mc1
TIES_TO_FIRST = {
    "mc_task": {"longest": 39.9, "shortest": 29.5, "least overlap": 57.0, "only negation": 93.5},
    "mc_task_revised": {
        "longest": 37.0,
        "shortest": 29.6,
        "least overlap": 55.0,
        "only negation": 91.5,
    },
}
# study.md has one less: it does not know the typographic apostrophe
NUM_ONE_NEGATION = {"mc_task": 337, "mc_task_revised": 342}
PER_TOKEN = {"mc_task": (49.2, 52.3), "mc_task_revised": (49.6, 58.3)}
TIES_SHARED = {"mc_task": (33.4, 24.1), "mc_task_revised": (30.9, 24.2)}


def test_rules_on_the_published_file(file_and_items):
    file, items = file_and_items
    mc1 = items["truthfulqa_mc1"]
    assert all(item["gold"] == 0 for item in mc1)
    for name, expected in TIES_TO_FIRST[file].items():
        answers = [CHOOSING[name](item["choices"]) for item in mc1]
        right = [x.argmax() == 0 for x in answers if x is not None]
        # "only negation" depends on the list of negations, by 3 questions here
        tolerance = 1.0 if name == "only negation" else 0.06
        assert 100 * np.mean(right) == pytest.approx(expected, abs=tolerance), name
    shared = rule_rows(mc1, CHOOSING)
    assert shared["only negation"]["n"] == NUM_ONE_NEGATION[file]
    found = [100 * shared[name]["acc"] for name in ("longest", "shortest")]
    assert found == pytest.approx(TIES_SHARED[file], abs=0.1)


def test_lengths_alone_on_the_published_file(file_and_items):
    file, items = file_and_items
    rows = rule_rows(items["truthfulqa_mc2"], SCORING)
    assert [100 * row["acc"] for row in rows.values()] == pytest.approx(PER_TOKEN[file], abs=0.2)
