"""Texts and pictures of the toy world: true, and nothing given away."""

import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmalign.evaluation.tasks import captions, load_documents, vision_task
from mmalign.toy_world import ToyWorld
from mmalign.toy_world.scenes import CELLS, COLOURS, HELD_OUT_KINDS, IMAGE_SIZE, SHAPES, make_scenes
from mmalign.toy_world.texts import SHORT_ANSWER
from mmalign.toy_world.vision import CAPTION_PROMPT, pope_questions
from mmalign.toy_world.words import NUMBERS
from tests.toy_world.helpers import answers, described, records


def test_pictures_show_what_scenes_say(world):
    """The middle of every thing has its colour, every empty cell is light."""
    names, levels = list(COLOURS), np.array(list(COLOURS.values()))
    for file, groups in described(world).items():
        pixels = np.array(Image.open(world.image_root / file)).astype(int)
        things = {(t["row"], t["column"]): t["colour"] for group in groups for t in group}
        for row in range(3):
            for column in range(3):
                y, x = (IMAGE_SIZE * (2 * index + 1) // 6 for index in (row, column))
                middle = pixels[y - 1 : y + 2, x - 1 : x + 2].mean((0, 1))
                if (row, column) in things:
                    nearest = names[np.abs(levels - middle).sum(1).argmin()]
                    assert nearest == things[row, column], file
                else:
                    assert middle.min() > 200, file


def test_captions_are_true(world):
    scenes = described(world)
    said = records(world.pretrain_json)
    said += [r for r in records(world.finetune_json) if r["type"] == "caption"]
    told = [(record["image"], answers(record)[0][1]) for record in said]
    told += [(image, text) for image, texts in references(world).items() for text in texts]
    for image, text in told:
        groups = scenes[image]
        for group in groups:
            thing, count = group[0], len(group)
            plural = r"(e?s)\b" if count > 1 else r"\b"
            number = NUMBERS[count] if count > 1 else "an?"
            words = rf"\b{number} ({thing['size']} )?{thing['colour']} {thing['shape']}{plural}"
            assert re.search(words, text), (text, groups)
        assert sum(text.count(shape) for shape in SHAPES) == len(groups)
        check_side(text, groups)


def references(world: ToyWorld) -> dict[str, list[str]]:
    """Picture -> its captions, as evaluate.py reads them."""
    (documents,) = load_documents(["coco_captions"], world.evaluation).values()
    return {Path(x.image).name: x.gold for x in documents}


def check_side(text: str, groups: list[list[dict]]) -> None:
    things = {group[0]["shape"]: group[0] for group in groups}
    pattern = r"(\w+) (?:is )?(?:to the )?(left|right|above|below)(?: of)? (?:an?|the) (?:\w+ )*?"
    for first, side, second in re.findall(pattern + f"({'|'.join(SHAPES)})", text):
        axis = "column" if side in ("left", "right") else "row"
        other = "row" if axis == "column" else "column"
        one, two = things[first], things[second]
        assert one[other] == two[other]
        assert (one[axis] < two[axis]) == (side in ("left", "above"))


def test_short_answers_are_true(world):
    scenes = described(world)
    asked = set()
    pairs = [(r, a) for r in records(world.heldout_json) for a in answers(r)]
    pairs += [
        (r, a)
        for r in records(world.finetune_json)
        if r["type"] == "conversation"
        for a in answers(r)
    ]
    for record, (question, answer) in pairs:
        groups = scenes[record["image"]]
        thing = next((g[0] for g in groups if g[0]["shape"] in question), None)
        if match := re.fullmatch(r"Where is the (\w+) from the (\w+)\?", question):
            check_side(f"{match[1]} {answer} the {match[2]}", groups)
        elif question.startswith("Where"):
            assert answer == CELLS[thing["row"]][thing["column"]]
        elif question.startswith("How many"):
            shown = [g for g in groups if "shapes" in question or g[0]["shape"] in question]
            assert answer == NUMBERS[sum(map(len, shown))]
        elif question.startswith("Which shape"):
            assert [answer] == [g[0]["shape"] for g in groups if g[0]["colour"] in question]
        else:
            assert answer == thing["colour" if "colour" in question else "size"]
        asked.add(question.split()[0])
    assert asked == {"Where", "How", "Which", "What"}


def test_existence_answers_are_true_and_balanced(world):
    """In stage 2, and in POPE's files; a picture has as many questions about shapes it lacks."""
    scenes = described(world)
    tuned = [r for r in records(world.finetune_json) if r["type"] == "existence"]
    (asked,) = load_documents(["pope"], world.evaluation).values()
    told = [(r["image"], *turn) for r in tuned for turn in answers(r)]
    told += [(Path(x.image).name, x.question, x.gold) for x in asked]
    for image, question, answer in told:
        shape = re.match(r"Is there an? (\w+) in the image\?", question)[1]
        assert shape in SHAPES
        shown = any(group[0]["shape"] == shape for group in scenes[image])
        assert answer.lower() == ("yes" if shown else "no")
    replies = [reply for r in tuned for _, reply in answers(r)]
    assert replies.count("Yes") == pytest.approx(len(replies) / 2, abs=2 * len(replies) ** 0.5)
    for image in scenes:
        mine = [(x.category, x.gold) for x in asked if Path(x.image).name == image]
        assert len({mine.count(x) for x in mine}) <= 1


def test_absent_shapes_are_chosen_as_popes():
    """The definitions of arXiv 2305.10355, counted here anew."""
    scenes = make_scenes("heldout", 80, seed=3, held_out=True)
    shown = {f"{x.name}.jpg": {group[0].shape for group in x.groups} for x in scenes}
    frequency = Counter(shape for shapes in shown.values() for shape in shapes)
    found = pope_questions(scenes, seed=0)
    for category in ("popular", "adversarial"):
        for image, shapes in shown.items():
            weights = {
                x: frequency[x]
                if category == "popular"
                else sum(
                    x in others and there in others for there in shapes for others in shown.values()
                )
                for x in SHAPES
                if x not in shapes
            }
            rows = [x for x in found[category] if x["image"] == image and x["label"] == "no"]
            chosen = [re.findall(r"an? (\w+) in", x["text"])[0] for x in rows]
            best = sorted(weights.values(), reverse=True)[: len(chosen)]
            assert [weights[x] for x in chosen] == best
    drawn = [x["text"] for x in found["random"] if x["label"] == "no"]
    assert len(set(drawn)) == len(SHAPES)


def test_stage_2_asks_with_the_published_prompts():
    assert captions.PROMPT == CAPTION_PROMPT and SHORT_ANSWER == vision_task.SHORT_ANSWER


def test_details_are_true(world):
    scenes = described(world)
    for record in records(world.finetune_json):
        if record["type"] == "detail":
            groups = scenes[record["image"]]
            (_, text), *_ = answers(record)
            for thing in (group[0] for group in groups):
                sentence = next(s for s in text.split(". ")[1:] if thing["shape"] in s)
                assert thing["colour"] in sentence and thing["size"] in sentence
            assert NUMBERS[sum(map(len, groups))] in text.split(". ")[0]
            check_side(text, groups)


def test_heldout_kinds_are_in_no_training_picture_or_text(world):
    kinds = {
        file: {(t["shape"], t["colour"]) for group in groups for t in group}
        for file, groups in described(world).items()
    }
    heldout = {record["image"] for record in records(world.heldout_json)}
    for record in records(world.pretrain_json) + records(world.finetune_json):
        assert record["image"] not in heldout
        assert not kinds[record["image"]] & HELD_OUT_KINDS
        texts = " ".join(turn["value"] for turn in record["conversations"])
        for shape, colour in HELD_OUT_KINDS:
            assert f"{colour} {shape}" not in texts
    assert all(kinds[file] & HELD_OUT_KINDS for file in heldout)
    for scene in make_scenes("seen", 300, seed=0, rare=True):  # the vision tower's own
        assert not {thing.kind for thing in scene.things} & HELD_OUT_KINDS
