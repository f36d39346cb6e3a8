"""What a data file holds, against counts of its JSON and of the files of its pictures."""

import json
import os
import shutil
from collections import Counter
from dataclasses import replace

import pytest

from mmalign.data.check import check_samples
from mmalign.data.dataset import ConversationDataset
from mmalign.data.facts import facts_of
from mmalign.data.overlap import QuestionIndex
from mmalign.data.report import markdown, sections_of
from mmalign.data.survey import Survey
from tests.data.conftest import VISION


def surveyed(dataset, questions=None, **options):
    texts = [text for task in (questions or {}).values() for text in task]
    survey = Survey(QuestionIndex(texts) if texts else None)
    report = check_samples(dataset, progress=False, observer=survey, **options)
    return report, facts_of(dataset, report, survey, questions or {})


@pytest.fixture
def repeated(world):
    """With repeated samples and pictures, a type, and two samples that cannot be used."""
    samples = world.samples
    for i, kind in enumerate(("conv", "detail_23k", "complex", "conversation")):
        samples[i]["type"] = kind
    samples += [dict(samples[2], id="again"), dict(samples[2], id="and again")]
    samples.append(dict(samples[3], id="other picture", image="5.png"))
    shutil.copy(world.root / "images" / "6.png", world.root / "images" / "copy.png")
    samples.append(dict(samples[6], id="same bytes", image="copy.png"))
    two = [{"from": "human", "value": "<image><image> which?"}, {"from": "gpt", "value": "both"}]
    samples.append({"id": "two", "image": ["9.png", "6.png"], "conversations": two})
    samples.append(dict(samples[7], id="no file", image="missing.png"))
    samples.append(dict(samples[8], id="no answer", conversations=[]))
    return world


def test_long_samples_are_listed_as_what_was_chosen_for_them(world):
    lengths = [len(world.dataset(text_only=True).encode(i).labels) for i in range(20)]
    most = sorted(lengths)[15]
    long = [f"sample-{i}" for i, length in enumerate(lengths) if length > most]
    found = {}
    for choice in ("error", "skip", "truncate"):
        dataset = world.dataset(
            text_only=True, max_length=most, on_long_sample=choice, on_bad_sample="skip"
        )
        report, facts = surveyed(dataset)
        lists = ("unusable", "left_out_as_too_long", "truncated")
        found[choice] = [[x["id"] for x in facts[name]] for name in lists]
        text = markdown(sections_of(facts, report, ""), [])
        titles = {
            "skip": "Left out as too long: 4 samples",
            "truncate": "Truncated: 4 samples, by ",
        }
        assert [x in text for x in titles.values()] == [x == choice for x in titles]
    assert found == {"error": [long, [], []], "skip": [[], long, []], "truncate": [[], [], long]}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_counts_equal_those_of_the_file(repeated, num_workers, monkeypatch):
    monkeypatch.setattr("mmalign.data.check._CHUNK", 5)
    dataset = repeated.dataset(on_bad_sample="skip")
    report, facts = surveyed(dataset, num_workers=num_workers)
    used = json.loads((repeated.root / "data.json").read_text())[:-2]
    images = [x for sample in used[:-1] for x in [sample.get("image")] if x]
    assert facts["samples"] == len(used) + 2 and facts["usable"] == len(used)
    kinds = {"conversation": 3, "reasoning": 3, "detail": 1}
    assert facts["types"] == {"none": len(used) - 7, **kinds}
    turns = Counter(str(len(sample["conversations"]) // 2) for sample in used)
    assert facts["questions_per_sample"] == dict(sorted(turns.items()))
    without = len(used) - 1 - len(images)
    assert facts["pictures_per_sample"] == {"0": without, "1": len(images), "2": 1}
    assert facts["different_pictures"] == len(set(images))
    assert facts["tokens"]["together"] == sum(len(dataset.encode(i).labels) for i in report.kept)
    assert [x["id"] for x in facts["unusable"]] == ["no file", "no answer"]
    assert facts["duplicates"] == {
        "samples": 3,
        "first_samples": [["sample-2", "again", "and again"], ["sample-6", "same bytes"]],
        "pictures": 1,
        "first_pictures": [["6.png", "copy.png"]],
        "pictures_not_compared": 0,
    }


def test_pictures_that_are_not_read_are_compared_by_name(repeated):
    _, facts = surveyed(repeated.dataset(on_bad_sample="skip", check_images=False))
    found = facts["duplicates"]
    assert found["first_samples"] == [["sample-2", "again", "and again"]]
    assert (found["samples"], found["pictures"]) == (2, 0)
    assert found["pictures_not_compared"] == facts["pictures_per_sample"]["1"] + 2
    assert any("by name alone" in note for note in _notes(repeated, check_images=False))


def test_pictures_in_a_zip_are_compared_without_reading(repeated):
    expected = surveyed(repeated.dataset(on_bad_sample="skip"))[1]["duplicates"]
    shutil.make_archive(str(repeated.root / "packed"), "zip", repeated.root / "images")
    settings = {"image_root": str(repeated.root / "packed.zip"), "check_images": False}
    data = repeated.dataset(on_bad_sample="skip").data
    dataset = ConversationDataset.open(replace(data, **settings), repeated.tokenizer.path, VISION)
    assert surveyed(dataset)[1]["duplicates"] == expected
    assert expected["pictures"] == 1


def _notes(world, **settings):
    dataset = world.dataset(on_bad_sample="skip", **settings)
    report, facts = surveyed(dataset)
    return [note for x in sections_of(facts, report, "images") for note in x.notes]


def test_questions_in_the_text_are_named(world):
    long = "why is the small red boat tied to a pier at sunset or not".split()  # noqa: SIM905
    asked = ["What colour is it?", " ".join(long)]
    questions = {"one": asked, "other": ["Never asked before here"]}
    world.samples[4]["conversations"][0]["value"] = "So, what colour is IT?"
    world.samples[8]["conversations"][1]["value"] = " ".join(long[:10])  # 3 of 7 runs of 8 words
    world.samples[12]["conversations"][1]["value"] = " ".join(long[2:])  # 5 of 7
    report, facts = surveyed(world.dataset(), questions)
    found = facts["overlap"]
    assert found["tasks"] == {
        "one": {"questions": 2, "too_short": 0, "whole": 1, "half": 2, "any": 2},
        "other": {"questions": 1, "too_short": 0, "whole": 0, "half": 0, "any": 0},
    }
    assert [(x["question"], x["samples"]) for x in found["first"]] == [
        ("What colour is it?", ["sample-4"]),
        (" ".join(long), ["sample-12"]),
    ]
    assert found["first"][1]["share"] == pytest.approx(5 / 7)
    text = markdown(sections_of(facts, report, "images"), ["lengths.png"])
    assert "| one | 2 | 1 | 2 | 2 | 0 |" in text and "71% of one" in text


def test_the_report_quotes_a_file_without_obeying_it(world):
    world.samples[0]["type"] = "![x](http://example.org) | <script>"
    world.samples[1]["id"] = "*id* `code`"
    world.samples[1]["conversations"][1]["value"] = ""
    report, facts = surveyed(world.dataset(on_bad_sample="skip"))
    text = markdown(sections_of(facts, report, "images"), [])
    assert r"!\[x\](http://example.org) \| \<script\>" in text and r"\*id\* \`code\`" in text


def test_an_observer_sees_what_is_checked_not_what_is_remembered(world, tmp_path):
    with pytest.raises(ValueError, match="observer"):
        check_samples(world.dataset(), tmp_path / "check.npz", observer=Survey())
    assert not os.path.exists(tmp_path / "check.npz")


def test_forms_are_counted(world):
    roles = {"human": "user", "gpt": "assistant"}
    turns = world.samples[4].pop("conversations")
    world.samples[4]["messages"] = [
        {"role": roles[turn["from"]], "content": turn["value"]} for turn in turns
    ]
    _, facts = surveyed(world.dataset())
    assert facts["forms"] == {"LLaVA": 19, "messages": 1}
