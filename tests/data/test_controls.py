"""What a control must keep stays, what it must change changes, and bad input is named."""

import json
from copy import deepcopy

import numpy as np
import pytest

from mmalign.data.captions import read_captions
from mmalign.data.check import check_samples
from mmalign.data.controls import CONTROLS, MOST_WORDS
from mmalign.data.controls.control import read_records
from mmalign.data.samples import parse_sample
from mmalign.errors import SampleError, UserError


def apply(name: str, rows, text_rows, count, seed: int = 0):
    second = {
        "length-matched": text_rows,
        "caption-for-image": {f"{i}": f"caption {i}" for i in range(20)},
    }.get(name)
    return CONTROLS[name](rows, seed, second, count)


@pytest.mark.parametrize("name", CONTROLS)
def test_same_seed_same_result_and_the_input_is_left_alone(name, rows, text_rows, count):
    before = deepcopy(rows)
    first, second = (apply(name, rows, text_rows, count, seed=7) for _ in range(2))
    assert first == second
    assert rows == before
    json.dumps(first.about)  # the manifest is JSON


@pytest.mark.parametrize("name", ["shuffle-images", "permute-answers", "length-matched"])
def test_another_seed_gives_another_result(name, rows, text_rows, count):
    results = [apply(name, rows, text_rows, count, seed).records for seed in range(3)]
    assert results[0] != results[1] != results[2]


@pytest.mark.parametrize("name", sorted(set(CONTROLS) - {"length-matched", "short-answers"}))
def test_ids_order_and_other_fields_stay(name, rows, text_rows, count):
    after = apply(name, rows, text_rows, count).records
    for key in ("id", "type", "url"):
        assert [row.get(key) for row in after] == [row.get(key) for row in rows]


@pytest.mark.parametrize("name", CONTROLS)
def test_what_comes_out_can_be_trained_on(name, rows, text_rows, count, world):
    control, controlled = CONTROLS[name], apply(name, rows, text_rows, count)
    for file, content in control.files.items():
        (world.root / "images" / file).write_bytes(content())
    settings = {x.removeprefix("data.").replace("-", "_"): y for x, y in control.settings.items()}
    world.samples = controlled.records
    dataset = world.dataset(**{"max_length": 500} | settings)
    report = check_samples(dataset, num_workers=0, progress=False)
    assert len(report.kept) == len(controlled.records)
    with_image = sum("image" in row for row in rows)
    expected = 0 if settings.get("text_only") else with_image
    assert report.num_images.sum() == expected or name == "short-answers"


# ---- answers ----


def answers(row: dict) -> list[str]:
    return [turn["value"] for turn in row["conversations"][1::2]]


def of_type(rows: list[dict], kind: str | None) -> list[dict]:
    return [row for row in rows if row.get("type") == kind]


def test_permuted_answers_stay_within_type_and_turn(rows, text_rows, count):
    after = apply("permute-answers", rows, text_rows, count).records
    for kind in {row.get("type") for row in rows}:
        for turn in range(4):
            texts = [
                sorted(
                    answers(row)[turn]
                    for row in x
                    if row.get("type") == kind and len(answers(row)) > turn
                )
                for x in (rows, after)
            ]
            assert texts[0] == texts[1]
    for before, row in zip(rows, after, strict=True):
        assert len(before["conversations"]) == len(row["conversations"])
        assert before["conversations"][::2] == row["conversations"][::2]
    # answers are longer from sample to sample, so each is another sample's
    moved = sum(
        a != b
        for x, y in zip(rows, after, strict=True)
        for a, b in zip(answers(x), answers(y), strict=True)
    )
    total = sum(len(answers(row)) for row in rows)
    assert moved == total - CONTROLS["permute-answers"](rows, 0).about["unchanged"]


def test_plain_text_trains_on_the_answers_and_nothing_else(
    rows, text_rows, count, world, tokenizer
):
    control = CONTROLS["plain-text"]
    world.samples = apply("plain-text", rows, text_rows, count).records
    dataset = world.dataset(template=control.settings["data.template"], text_only=True)
    for i, row in enumerate(rows):
        encoded = dataset.encode(i)
        text = "\n".join(answers(row)) + "\n"
        assert encoded.input_ids.tolist() == [tokenizer.bos_token_id, *tokenizer.encode(text)]
        assert (encoded.labels[1:] == encoded.input_ids[1:]).all()


def test_short_answers_keep_short_turns_and_the_image(rows, text_rows, count):
    controlled = apply("short-answers", rows, text_rows, count)
    kept = {row["id"]: row for row in controlled.records}
    for i, row in enumerate(rows):  # all answers of sample i have i + 1 words
        assert (row["id"] in kept) == (i + 1 <= MOST_WORDS)
    rows[3]["conversations"] += [{"from": "human", "value": "and?"}, {"from": "gpt", "value": "a"}]
    rows[3]["conversations"][1]["value"] = "boat " * 11
    row = next(x for x in CONTROLS["short-answers"](rows, 0).records if x["id"] == "sample-3")
    assert row["conversations"][0]["value"].startswith("<image>\n")
    assert sum(turn["value"].count("<image>") for turn in row["conversations"]) == 1


def test_no_short_answer_is_an_error(rows):
    for row in rows:
        row["conversations"][1::2] = [{"from": "gpt", "value": "a " * 20} for _ in answers(row)]
    with pytest.raises(UserError, match="has at most 10 words"):
        CONTROLS["short-answers"](rows, 0)


# ---- lengths ----


def test_length_matched_draws_the_same_lengths(rows, text_rows, count):
    controlled = apply("length-matched", rows, text_rows, count)
    assert len(controlled.records) == len(rows)
    assert all(row in text_rows for row in controlled.records)
    assert controlled.about["most_often_drawn"] == 1
    wanted, found = (
        [count(parse_sample(row, "x")) for row in x] for x in (rows, controlled.records)
    )
    assert controlled.about["supervised_tokens"] == [sum(wanted), sum(found)]
    pool = [count(parse_sample(row, "x")) for row in text_rows]
    at_random = np.abs(np.sort(wanted) - np.sort(pool[:20])).mean()
    assert controlled.about["wasserstein"] < at_random / 3


def test_length_matched_takes_alpacas_form(tmp_path, rows, count):
    alpaca = [{"instruction": "say", "input": "it", "output": "boat " * n} for n in range(30)]
    (tmp_path / "alpaca.json").write_text(json.dumps(alpaca))
    control = CONTROLS["length-matched"]
    second = control.read_second(tmp_path / "alpaca.json")
    assert second[1]["conversations"][0] == {"from": "human", "value": "say\nit"}
    controlled = control(rows, 0, second, count)
    assert controlled.about["unusable"] == 1  # the empty answer


def test_second_file_with_pictures_is_refused(rows, count):
    with pytest.raises(SampleError, match="sample 'sample-1'.*draws text alone"):
        CONTROLS["length-matched"](rows, 0, rows, count)


# ---- bad input ----


@pytest.mark.parametrize("name", CONTROLS)
def test_malformed_sample_is_named(name, rows, text_rows, count):
    rows[4] = {"id": "broken", "conversations": "text"}
    with pytest.raises(SampleError, match="sample 'broken': its conversations are str"):
        apply(name, rows, text_rows, count)


@pytest.mark.parametrize("name", ["permute-answers", "plain-text", "short-answers"])
def test_speakers_out_of_turn_are_named(name, rows, text_rows, count):
    rows[4]["conversations"] = rows[4]["conversations"][1:]
    with pytest.raises(SampleError, match="sample 'sample-4': turn 1 is from 'gpt'"):
        apply(name, rows, text_rows, count)


def test_second_file_is_needed_or_refused(rows):
    with pytest.raises(UserError, match="needs a second file with captions"):
        CONTROLS["caption-for-image"](rows, 0)
    with pytest.raises(UserError, match="needs no second file"):
        CONTROLS["blank-image"](rows, 0, rows)


def test_records_of_a_real_file(shared_data, tmp_path):
    """LLaVA's 90 questions, written as a LLaVA file, through the controls."""
    lines = (shared_data / "llava" / "coco2014_val_gpt4_qa_30x3.jsonl").read_text().splitlines()
    rows = []
    for row in map(json.loads, lines):
        turns = [("human", f"<image>\n{row['instruction']}"), ("gpt", row["output"])]
        turns = [{"from": speaker, "value": text} for speaker, text in turns]
        rows.append({x: row[x] for x in ("id", "image", "type")} | {"conversations": turns})
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    rows = read_records(tmp_path / "rows.json")
    assert CONTROLS["shuffle-images"](rows, 0).about == {"images": 90, "unchanged": 0}
    assert CONTROLS["permute-answers"](rows, 0).about == {"answers": 90, "unchanged": 0}
    assert CONTROLS["short-answers"](rows, 0).about["samples_kept"] == 7
    captions = read_captions(shared_data / "llava" / "caps_boxes_coco2014_val_80.jsonl")
    assert CONTROLS["caption-for-image"](rows, 0, captions).about == {"captioned": 90}
