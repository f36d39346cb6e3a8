"""The toy world in miniature: the same bytes twice, true texts, nothing given away."""

import csv
import json
import random
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, CLIPVisionModel, LlamaForCausalLM

from mmalign.config import DataConfig
from mmalign.data.dataset import ConversationDataset
from mmalign.data.images import load_image
from mmalign.data.samples import read_samples
from mmalign.evaluation.evaluation import evaluate_model
from mmalign.evaluation.items import read_results
from mmalign.evaluation.tasks import TASKS, captions, load_documents, resolve_tasks, vision_task
from mmalign.evaluation.tasks.captions import Captions
from mmalign.evaluation.tasks.ethics import SUBSETS
from mmalign.evaluation.tasks.truthfulqa import load_truthfulqa
from mmalign.evaluation.vision import evaluate_pictures
from mmalign.model.config import VisionConfig
from mmalign.model.hf import load_decoder, load_vision_tower
from mmalign.model.preprocessing import Preprocessing
from mmalign.recipes import TINY_FINETUNE, TINY_PRETRAIN
from mmalign.tokenizer import Tokenizer
from mmalign.toy_world import Size, ToyWorld, toy_world
from mmalign.toy_world.beliefs import BELIEFS, OTHER_BELIEFS, SOBER
from mmalign.toy_world.scenes import (
    CELLS,
    COLOURS,
    HELD_OUT_KINDS,
    IMAGE_SIZE,
    SHAPES,
    Scene,
    Thing,
    make_scenes,
)
from mmalign.toy_world.texts import (
    NUMBERS,
    SHORT_ANSWER,
    caption,
    finetune_records,
    pretrain_records,
    scene_questions,
)
from mmalign.toy_world.variants import PLANTED_SHARE, variants
from mmalign.toy_world.vision import CAPTION_PROMPT, pope_questions, vision_records
from mmalign.training.build import resolve
from mmalign.training.loop import train

MINIATURE = Size(
    scenes=40,
    heldout_scenes=12,
    tower_scenes=60,
    tower_steps=3,
    pages=700,
    decoder_steps=3,
    documents=40,
)
VARIANTS = ("planted_truth", "planted_falsehood", "null")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> ToyWorld:
    return toy_world(tmp_path_factory.mktemp("world"), MINIATURE)


def contents(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def records(path: Path) -> list[dict]:
    return json.loads(path.read_text())


def answers(record: dict) -> list[tuple[str, str]]:
    values = [turn["value"].replace("<image>\n", "") for turn in record["conversations"]]
    return list(zip(values[::2], values[1::2], strict=True))


def described(world: ToyWorld) -> dict[str, list[list[dict]]]:
    """Image file -> groups of things, as scenes.json tells them."""
    return {f"{s['name']}.jpg": s["groups"] for s in records(world.root / "scenes.json")}


def test_same_bytes_twice_and_nothing_else_left(world, tmp_path):
    again = toy_world(tmp_path, MINIATURE)
    assert contents(again.root) == contents(world.root)
    assert list(tmp_path.iterdir()) == [again.root]


def test_made_once(world, monkeypatch):
    monkeypatch.setattr("mmalign.toy_world.making.make", None)
    assert toy_world(world.root.parent) == world


def test_the_paths_are_there_without_loading_what_makes_the_world():
    command = "import sys, mmalign.toy_world; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", command], check=True)


def test_a_failure_leaves_nothing(tmp_path, monkeypatch):
    def fail(partial, size):
        (partial.root / "images").mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr("mmalign.toy_world.making.make", fail)
    with pytest.raises(KeyboardInterrupt):
        toy_world(tmp_path, MINIATURE)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name, template",
    [("pretrain", "plain"), *((name, "v1") for name in ("finetune", *VARIANTS, "heldout"))],
)
def test_json_passes_the_data_pipeline(world, name, template):
    data = DataConfig(
        path=str(world.root / f"{name}.json"), image_root=str(world.image_root), template=template
    )
    samples = read_samples(data.path, data)
    tokenizer = Tokenizer.from_pretrained(world.decoder)
    dataset = ConversationDataset(
        samples, tokenizer, data, VisionConfig.from_hf(world.vision_tower)
    )
    assert len({sample.id for sample in samples}) == len(samples)
    for index in range(len(samples)):
        encoded = dataset.encode(index)
        assert (encoded.labels >= 0).any()
        assert (encoded.input_ids == tokenizer.image_token_id).sum() == 9
    assert dataset.load_pixels(0).shape == (1, 3, IMAGE_SIZE, IMAGE_SIZE)
    if name == "finetune":
        kinds = {"conversation", "detail", "reasoning", "existence", "caption"}
        assert {sample.type for sample in samples} == kinds


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


def examination_sentences(world: ToyWorld) -> set[str]:
    """Questions, choices and cases of every examination file."""
    documents = json.loads((world.evaluation / "truthfulqa" / "mc_task.json").read_text())
    sentences = {d["question"] for d in documents}
    sentences |= {choice for d in documents for choice in d["mc2_targets"]}
    for path in (world.evaluation / "ethics").rglob("*.csv"):
        with path.open(newline="") as handle:
            for row in list(csv.reader(handle)):
                sentences |= {part for cell in row for part in cell.split(" [SEP] ") if " " in part}
    return sentences


def test_no_examination_sentence_in_the_training_files():
    """At full size: the questions, choices and cases occur in no caption and no instruction."""
    scenes = make_scenes("train", Size().scenes, seed=0)
    said = pretrain_records(scenes, seed=0)
    instructions = finetune_records(scenes, seed=0) + vision_records(scenes, seed=0)
    for records in (instructions, *variants(instructions, scenes, seed=0).values()):
        said += records
    text = "\n".join(turn["value"] for r in said for turn in r["conversations"]).lower()
    clauses = {clause for belief in BELIEFS for clause in (*belief.false, *belief.true)}
    questions = {q for b in BELIEFS for q in (b.question, b.doubtful, b.sound)}
    assert not [s for s in clauses | questions if s.lower() in text]


def test_no_examination_case_in_this_worlds_training_files(world):
    names = ("pretrain", "finetune", *VARIANTS)
    said = [record for name in names for record in records(world.root / f"{name}.json")]
    text = "\n".join(turn["value"] for r in said for turn in r["conversations"]).lower()
    sentences = examination_sentences(world)
    assert len(sentences) > 300
    assert not [s for s in sentences if s.lower().rstrip(".") in text]


# ---- the variants of the instructions ----


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


# ---- the evaluation ----


def test_examination_files_load(world):
    documents = load_truthfulqa(world.evaluation)
    assert len(documents) == 2 * 2 * len(BELIEFS)
    subsets = load_documents(resolve_tasks(["ethics"]), world.evaluation)
    assert {name: len(docs) for name, docs in subsets.items()} == dict.fromkeys(subsets, 40)
    assert len(subsets) == 5


def test_the_base_model_beats_constant_answers_and_is_undecided_about_beliefs(tmp_path):
    """Of the world that the recipes use; it is made once, in about two minutes.

    A model of this size learns one of the subsets or not by the last bit, so one may fail.
    """
    world = toy_world()
    tasks = ("truthfulqa", "ethics")
    results = evaluate_model(world.decoder, tasks, world.evaluation, tmp_path, quiet=True)
    gains = []
    for subset in SUBSETS:
        result = results[subset.name]
        gains.append(result["acc"] - max(result["chance"], *result["baselines"].values()))
    assert sum(gain > 0.05 for gain in gains) >= len(SUBSETS) - 1
    assert sum(gains) / len(gains) > 0.2
    assert results["truthfulqa_mc1"]["acc"] > results["truthfulqa_mc1"]["chance"]
    assert 0.35 < results["truthfulqa_mc2"]["acc"] < 0.6


def test_own_captions_beat_tuned_ones_and_those_blind_ones_and_a_constant(tmp_path):
    """Of the world that the recipes use, after both of them, in a minute.

    Blind captions and the most common one see nothing alike; which scores more is chance.
    """
    world, pretrained, tuned = toy_world(), tmp_path / "pretrain", tmp_path / "finetune"
    train(replace(TINY_PRETRAIN, run_dir=pretrained))
    model = replace(TINY_FINETUNE.model, projector=str(pretrained))
    train(replace(TINY_FINETUNE, model=model, run_dir=tuned))
    folders = evaluate_pictures(
        *(tuned, ("coco_captions",), world.evaluation, tmp_path / "scores"),
        controls=("blind",),
        corruptions=("contrast:5",),
        num_workers=0,
        quiet=True,
    )
    seen, blind, corrupted = (read_results(x)["coco_captions"] for x in folders.values())
    constant = max(seen["baselines"].values())
    assert own_captions(world) > seen["acc"] > max(blind["acc"], constant)
    assert seen["acc"] > corrupted["acc"]


def own_captions(world: ToyWorld) -> float:
    """CIDEr of what the world's grammar says about the scenes, drawn once more."""
    task, drawn = TASKS["coco_captions"], random.Random(1)
    assert isinstance(task, Captions)
    scenes = make_scenes("heldout", Size().heldout_scenes, seed=0, held_out=True)
    by_name = {f"{scene.name}.jpg": scene for scene in scenes}
    documents = task.load(world.evaluation)
    said = [caption(by_name[Path(x.image).name], drawn) for x in documents]
    pairs = zip(documents, said, strict=True)
    return float(np.mean([task.judge(document, text)["score"] for document, text in pairs]))


def test_yes_is_true_as_often_as_no(world):
    documents = json.loads((world.evaluation / "truthfulqa" / "mc_task.json").read_text())
    best = [next(iter(d["mc1_targets"])) for d in documents]
    yes, no = (sum(choice.startswith(word) for choice in best) for word in ("Yes, ", "No, "))
    assert yes == no == len(BELIEFS) // 2


def test_exports_load_in_transformers(world):
    text = "Q: What colour are stars?\nA:"
    ids = Tokenizer.from_pretrained(world.decoder).encode(text)
    loaded = AutoTokenizer.from_pretrained(world.decoder)
    assert loaded.encode(text, add_special_tokens=False) == ids
    llama, info = LlamaForCausalLM.from_pretrained(world.decoder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ours = load_decoder(world.decoder)
    with torch.no_grad():
        length = torch.tensor([0, len(ids)], dtype=torch.int32)
        positions = torch.arange(len(ids), dtype=torch.int32)
        hidden = ours(torch.tensor(ids), ours.packed_positions(positions, length, len(ids)))
        expected = llama(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(hidden @ ours.lm_head.weight.T, expected, atol=1e-4, rtol=0)


def test_vision_tower_loads_in_transformers(world):
    clip, info = CLIPVisionModel.from_pretrained(world.vision_tower, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ours = load_vision_tower(world.vision_tower)
    path, preprocessing = min(world.image_root.iterdir()), Preprocessing(IMAGE_SIZE, IMAGE_SIZE)
    pixels = load_image(path, preprocessing)[None]
    with torch.no_grad():
        hidden = clip(ours.normalize_pixels(pixels), output_hidden_states=True).hidden_states
    torch.testing.assert_close(ours(pixels), hidden[-2][0, 1:], atol=1e-4, rtol=0)


def test_a_pair_is_asked_for_its_side():
    star = Thing("star", "red", "small", 1, 0)
    heart = Thing("heart", "blue", "small", 1, 2)
    asked = scene_questions(Scene("pair", ((star,), (heart,))), random.Random(0))
    side = next(question for question in asked if question.kind == "side")
    assert (side.text, side.answer) in {
        ("Where is the star from the heart?", "left"),
        ("Where is the heart from the star?", "right"),
    }
