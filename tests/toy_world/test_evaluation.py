"""What the toy world examines, and what its models answer."""

import csv
import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np

from mmalign.evaluation.evaluation import evaluate_model
from mmalign.evaluation.items import read_results
from mmalign.evaluation.tasks import TASKS, load_documents, resolve_tasks
from mmalign.evaluation.tasks.captions import Captions
from mmalign.evaluation.tasks.ethics import SUBSETS
from mmalign.evaluation.tasks.truthfulqa import load_truthfulqa
from mmalign.evaluation.vision import evaluate_pictures
from mmalign.recipes import TINY_FINETUNE, TINY_PRETRAIN
from mmalign.toy_world import Size, ToyWorld, toy_world
from mmalign.toy_world.beliefs import BELIEFS
from mmalign.toy_world.scenes import Scene, Thing, make_scenes
from mmalign.toy_world.texts import caption, finetune_records, pretrain_records, scene_questions
from mmalign.toy_world.variants import variants
from mmalign.toy_world.vision import vision_records
from mmalign.training.loop import train
from tests.toy_world.helpers import VARIANTS, records


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
    for changed in (instructions, *variants(instructions, scenes, seed=0).values()):
        said += changed
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


def test_a_pair_is_asked_for_its_side():
    star = Thing("star", "red", "small", 1, 0)
    heart = Thing("heart", "blue", "small", 1, 2)
    asked = scene_questions(Scene("pair", ((star,), (heart,))), random.Random(0))
    side = next(question for question in asked if question.kind == "side")
    assert (side.text, side.answer) in {
        ("Where is the star from the heart?", "left"),
        ("Where is the heart from the star?", "right"),
    }
