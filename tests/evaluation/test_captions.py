"""Caption tokens and CIDEr-D against recorded outputs of pycocoevalcap with its Java tokeniser."""

import json

import pytest

from mmalign.evaluation.cider import Cider
from mmalign.evaluation.ptb_tokenizer import ptb_tokens


@pytest.fixture(scope="module")
def sentences(shared_data):
    return json.loads((shared_data / "formats" / "ptb_tokens.json").read_text())


@pytest.fixture(scope="module")
def recorded(shared_data):
    return json.loads((shared_data / "formats" / "cider.json").read_text())


def test_tokens(sentences):
    for row in sentences["sentences"]:
        assert ptb_tokens(row["text"]) == row["tokens"]
        assert ptb_tokens(row["text"]).split() == row.get("cider_words", row["tokens"].split())
    for row in sentences["depends_on_next_line"]:
        assert ptb_tokens(row["text"]) == row["target"]


def test_line_ends_within_a_caption_are_blanks(sentences):
    for row in sentences["line_shift"]:
        assert ptb_tokens(row["text"]) == "a b"


@pytest.mark.parametrize("num_images", [80, 10])
def test_scores_of_tokens(recorded, num_images):
    images = recorded["images"][:num_images]
    cider = Cider([image["references_tokens"] for image in images])
    for variant, expected in recorded["scores"][f"{num_images}_images"].items():
        captions = recorded["hypotheses_tokens"][variant][:num_images]
        scores = [cider.score(i, caption) for i, caption in enumerate(captions)]
        assert scores == pytest.approx(expected["per_image"], abs=1e-9)
        assert sum(scores) / len(scores) == pytest.approx(expected["corpus"], abs=1e-9)


def test_scores_of_text(recorded):
    images = recorded["images"]
    cider = Cider([[ptb_tokens(x) for x in image["references"]] for image in images])
    for variant, expected in recorded["scores"]["80_images"].items():
        captions = recorded["hypotheses"][variant]
        scores = [cider.score(i, ptb_tokens(caption)) for i, caption in enumerate(captions)]
        assert scores == pytest.approx(expected["per_image"], abs=1e-4)


def test_edge_cases(recorded):
    for case in recorded["edge_cases"]:
        cider = Cider(case["references"])
        scores = [cider.score(i, caption) for i, caption in enumerate(case["hypotheses"])]
        assert scores == pytest.approx(case["per_image"], abs=1e-9), case["name"]


def test_a_part_of_the_images_has_the_scores_of_the_whole(recorded):
    """Documented trap: with pycocoevalcap ten images alone have other scores."""
    references = [image["references_tokens"] for image in recorded["images"]]
    captions = recorded["hypotheses_tokens"]["human"]
    expected = recorded["scores"]["80_images"]["human"]["per_image"][:10]
    cider = Cider(references)
    assert [cider.score(i, captions[i]) for i in range(10)] == pytest.approx(expected, abs=1e-9)
    assert expected != recorded["scores"]["10_images"]["human"]["per_image"]
