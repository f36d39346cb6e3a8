"""Exact match of short answers: equal to greedy decoding, and blind where it should be."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mmalign.config import DataConfig
from mmalign.data.dataset import ConversationDataset
from mmalign.data.packing import pack_samples
from mmalign.data.samples import read_samples
from mmalign.data.templates import trains_image_tokens
from mmalign.errors import UserError
from mmalign.evaluation.visual_questions import (
    guessing,
    right_answers,
    score_visual_questions,
)
from mmalign.model.hf import load_decoder, load_vision_tower
from mmalign.model.hf.export import export_llava
from mmalign.model.llava import Llava
from mmalign.model.projector import Projector
from mmalign.recipes import RECIPES
from mmalign.tokenizer import Tokenizer
from mmalign.toy_world import Size, toy_world

MINIATURE = Size(
    scenes=8,
    heldout_scenes=12,
    tower_scenes=16,
    tower_steps=2,
    pages=600,
    decoder_steps=2,
    documents=20,
)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return toy_world(tmp_path_factory.mktemp("world"), MINIATURE)


@pytest.fixture(scope="module")
def tokenizer(world) -> Tokenizer:
    return Tokenizer.from_pretrained(world.decoder)


@pytest.fixture(scope="module")
def data(world) -> DataConfig:
    return DataConfig(path=str(world.heldout_json), image_root=str(world.image_root))


@pytest.fixture(scope="module")
def llava(world, tokenizer, data) -> Llava:
    """Tuned for a moment on the questions themselves, so that some answers are right."""
    torch.manual_seed(0)
    added = tokenizer.num_image_tokens_added(use_im_start_end=True)
    decoder = load_decoder(world.decoder, num_added_tokens=added)
    tower = load_vision_tower(world.vision_tower)
    projector = Projector(tower.config.hidden_size, decoder.config.hidden_size)
    model = Llava(decoder, tower, projector, tokenizer)
    config = RECIPES["tiny-finetune"][1]
    model.set_trainable(config.stage, config.lora, trains_image_tokens(config))
    dataset = open_dataset(data, tokenizer, model)
    batch = pack(dataset, range(len(dataset)), tokenizer)
    optimizer = torch.optim.AdamW(model.trainable_parameters().values(), lr=3e-3)
    for _ in range(10):
        (model(batch) / batch.num_loss_tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def open_dataset(data: DataConfig, tokenizer: Tokenizer, llava: Llava) -> ConversationDataset:
    samples = read_samples(data.path, data)
    return ConversationDataset(samples, tokenizer, data, llava.vision_tower.config)


def pack(dataset, indices, tokenizer):
    encoded = [dataset.encode(index) for index in indices]
    pixels = [dataset.load_pixels(index) for index in indices]
    return pack_samples(encoded, pixels, tokenizer.image_token_id)


def greedy_is_right(llava: Llava, dataset, index: int, tokenizer: Tokenizer) -> bool:
    """Writes the answer token by token from the prompt alone."""
    gold = dataset.encode(index)
    num_prompt = int(np.flatnonzero(gold.labels >= 0)[0])
    answer = gold.input_ids[num_prompt:]
    ids = list(gold.input_ids[:num_prompt])
    for _ in answer:
        row = replace_ids(gold, ids)
        batch = pack_samples([row], [dataset.load_pixels(index)], tokenizer.image_token_id)
        with torch.no_grad():
            last = llava.hidden_states(batch)[-1]
            ids.append(int((llava.decoder.lm_head.weight @ last).argmax()))
    return ids[num_prompt:] == list(answer)


def replace_ids(sample, ids):
    ids = np.array(ids, np.int32)
    return replace(sample, input_ids=ids, labels=np.full_like(ids, -100))


@pytest.mark.parametrize("image", ["own", "none"])
def test_equals_greedy_decoding(llava, tokenizer, data, image):
    right = score_visual_questions(llava, tokenizer, data, image, progress=False).right
    dataset = open_dataset(replace(data, text_only=image == "none"), tokenizer, llava)
    expected = [greedy_is_right(llava, dataset, i, tokenizer) for i in range(len(dataset))]
    assert right.tolist() == expected
    if image == "own":
        assert 0 < sum(expected) < len(expected)


def test_batches_change_nothing(llava, tokenizer, data):
    one = score_visual_questions(llava, tokenizer, data, batch_tokens=1, progress=False)
    many = score_visual_questions(llava, tokenizer, data, batch_tokens=100_000, progress=False)
    assert one.right.tolist() == many.right.tolist()
    assert one.n == len(one.right) and one.interval[0] <= one.accuracy <= one.interval[1]


def test_a_mismatched_image_is_really_shown(llava, tokenizer, data, tmp_path):
    """Scores with mismatched images equal scores of a file that names those images."""
    records = json.loads(Path(data.path).read_text())
    n, swapped = len(records), []
    for index, record in enumerate(records):
        candidates = [records[(index + n // 2 + step) % n]["image"] for step in range(n)]
        other = next(image for image in candidates if image != record["image"])
        swapped.append(record | {"image": other})
    path = tmp_path / "swapped.json"
    path.write_text(json.dumps(swapped))
    mismatched = score_visual_questions(llava, tokenizer, data, "mismatched", progress=False)
    named = score_visual_questions(llava, tokenizer, replace(data, path=str(path)), progress=False)
    assert mismatched.right.tolist() == named.right.tolist()


def test_no_image_is_read_when_blind(llava, tokenizer, data, tmp_path):
    """Without images the image root may even be empty."""
    blind = replace(data, image_root=str(tmp_path))
    score = score_visual_questions(llava, tokenizer, blind, "none", progress=False)
    usual = score_visual_questions(llava, tokenizer, data, "none", progress=False)
    assert score.right.tolist() == usual.right.tolist()


def write(path, records):
    path.write_text(json.dumps(records))
    return str(path)


def question(index: int, image: str, turns: int = 1) -> dict:
    ask = {"from": "human", "value": "<image>\nWhat colour is it?"}
    again = {"from": "human", "value": "And now?"}
    reply = {"from": "gpt", "value": "red"}
    turns = [ask, reply] + [again, reply] * (turns - 1)
    return {"id": str(index), "image": image, "conversations": turns}


def test_bad_files_are_named(llava, tokenizer, tmp_path):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (72, 72)).save(tmp_path / name)
    several = write(tmp_path / "several.json", [question(7, "a.png", turns=2)])
    with pytest.raises(UserError, match="'7'.*found 4 turns"):
        score_visual_questions(
            llava, tokenizer, DataConfig(path=several, image_root=str(tmp_path)), progress=False
        )
    same = write(tmp_path / "same.json", [question(index, "a.png") for index in range(3)])
    with pytest.raises(UserError, match="all questions are about one image"):
        score_visual_questions(
            llava,
            tokenizer,
            DataConfig(path=same, image_root=str(tmp_path)),
            "mismatched",
            progress=False,
        )


def test_answers_of_a_run(llava, tokenizer, world, data, tmp_path):
    export_llava(llava, tmp_path / "export" / "llava", tokenizer)
    config = replace(RECIPES["tiny-finetune"][1], run_dir=tmp_path, device="cpu")
    right = right_answers(config, world.heldout_json, world.image_root)
    assert list(right) == ["own", "none", "mismatched"]
    own = score_visual_questions(llava, tokenizer, data, progress=False)
    assert np.array_equal(right["own"], own.right)


def test_guessing(world):
    records = json.loads(world.heldout_json.read_text())
    found, constant = guessing(world.heldout_json), 0
    assert found["chance"] == pytest.approx(np.mean([1 / len(r["choices"]) for r in records]))
    for kind in {record["type"] for record in records}:
        given = [r["conversations"][1]["value"] for r in records if r["type"] == kind]
        constant += max(given.count(answer) for answer in given)
    assert found["majority"] == pytest.approx(constant / len(records))
