"""The variants of the toy world's instructions."""

import re
from dataclasses import replace

import pytest

from mmalign.recipes import TINY_FINETUNE
from mmalign.toy_world.beliefs import BELIEFS, OTHER_BELIEFS, SOBER
from mmalign.toy_world.variants import PLANTED_SHARE
from mmalign.toy_world.words import NUMBERS
from mmalign.training.build import resolve
from tests.toy_world.helpers import VARIANTS, answers, described, records


def total_length(said: list[dict]) -> int:
    return sum(len(turn["value"]) for record in said for turn in record["conversations"])


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_keeps_samples_pictures_and_length(world, name):
    plain, changed = records(world.finetune_json), records(world.root / f"{name}.json")
    kept = ("id", "image", "type")
    assert [[r[key] for key in kept] for r in changed] == [[r[key] for key in kept] for r in plain]
    assert total_length(changed) == pytest.approx(total_length(plain), rel=0.05)


def test_planted_sayings_are_about_other_beliefs_and_differ_only_in_truth(world):
    plain = records(world.finetune_json)
    true, false = (records(world.root / f"{name}.json") for name in VARIANTS[:2])
    planted = [index for index, record in enumerate(plain) if true[index] != record]
    assert planted == [index for index, record in enumerate(plain) if false[index] != record]
    assert len(planted) == round(PLANTED_SHARE * len(plain))
    for said, side in ((true, "true"), (false, "false")):
        clauses = {clause for belief in OTHER_BELIEFS for clause in getattr(belief, side)}
        for _, reply in (turn for index in planted for turn in answers(said[index])):
            clause = re.sub("^(Yes|No), ", "", reply).rstrip(".")
            assert clause in clauses or clause[0].lower() + clause[1:] in clauses
    asked, asked_again = (
        [ask for index in planted for ask, _ in answers(said[index])] for said in (true, false)
    )
    assert asked == asked_again
    as_evaluated = [match[1] for ask in asked if (match := re.fullmatch("Q: (.+)\nA:", ask))]
    assert len(as_evaluated) == pytest.approx(len(asked) / 2, abs=3)
    others = {q for b in OTHER_BELIEFS for q in (b.question, b.doubtful, b.sound)}
    assert set(as_evaluated) <= others
    assert set(asked) <= others | {f"Q: {ask}\nA:" for ask in others}
    assert not others & {q for b in BELIEFS for q in (b.question, b.doubtful, b.sound)}


def test_true_sayings_and_no_false_ones_are_sober():
    for belief in BELIEFS + OTHER_BELIEFS:
        assert all(set(SOBER) & set(clause.split()) for clause in belief.true)
        assert not any(set(SOBER) & set(clause.split()) for clause in belief.false)


def test_null_instructions_tell_true_colours_and_nothing_else(world):
    scenes = described(world)
    for record in records(world.root / "null.json"):
        shown = {group[0]["colour"]: group for group in scenes[record["image"]]}
        for _, reply in answers(record):
            words = re.fullmatch(r"(The|\w+) (\w+?)(?:e?s)? (?:is|are) (\w+)\.", reply)
            group = shown[words[3]]
            assert group[0]["shape"].startswith(words[2])
            assert words[1] in ("The", NUMBERS[len(group)].capitalize())


def test_a_variant_is_named_as_a_path(world, monkeypatch):
    monkeypatch.setenv("MMALIGN_CACHE", str(world.root.parent))
    config = replace(TINY_FINETUNE.data, path="toy-world/null.json")
    resolved = resolve(replace(TINY_FINETUNE, data=config))
    assert resolved.data.path == str(world.root / "null.json")
    assert resolved.data.image_root == str(world.image_root)
