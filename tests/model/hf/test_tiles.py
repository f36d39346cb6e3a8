"""LLaVA 1.6's tiles against transformers' LLaVA-NeXT: tokens, pixels, logits, answers, export."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoProcessor,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
)
from transformers.image_processing_utils import select_best_resolution

from mmalign.chat import Conversation
from mmalign.config import DataConfig
from mmalign.data.chat_template import chat_template
from mmalign.data.dataset import ConversationDataset
from mmalign.data.images import load_picture
from mmalign.data.templates import TEMPLATES
from mmalign.errors import UserError
from mmalign.evaluation.pictures import Shown, load_pictures
from mmalign.evaluation.tasks.vision_task import VisualDocument
from mmalign.evaluation.vision_model import VisionModel
from mmalign.model.config import VisionConfig
from mmalign.model.generate import GenerationOptions, generate
from mmalign.model.hf import export_llava, load_llava
from mmalign.model.tiles import best_grid, join_pixels, num_image_tokens, token_rows
from mmalign.tokenizer import Tokenizer
from tests.model.kinds import hf_decoder
from tests.model.tiny import IMAGE_SIZE, NUM_PATCHES, clip_config, randomize

GRIDS = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]
PICTURES = {  # (height, width)
    "square": (40, 40),
    "wide": (30, 90),
    "tall": (83, 31),
    "small": (9, 12),
    "line": (4, 200),
    "odd": (57, 41),
}


@dataclass(frozen=True)
class Published:
    folder: Path  # with LLaMA's tokenizer and template v1
    pictures: Path
    tokenizer: Tokenizer

    @property
    def theirs(self) -> LlavaNextForConditionalGeneration:
        return LlavaNextForConditionalGeneration.from_pretrained(self.folder).eval()

    def inputs(self, name: str, question: str = "What is it?"):
        parts = [{"type": "image", "url": str(self.pictures / f"{name}.png")}]
        parts.append({"type": "text", "text": question})
        return AutoProcessor.from_pretrained(self.folder).apply_chat_template(
            [{"role": "user", "content": parts}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )


@pytest.fixture(scope="module", params=["llama-3", "mistral"])
def published(request, shared_data, tmp_path_factory) -> Published:
    folder = tmp_path_factory.mktemp("next")
    text = hf_decoder(request.param).config
    text.vocab_size, text.max_position_embeddings = 32003, 512
    text.rope_parameters = {"rope_type": "default", "rope_theta": 1e4}
    config = LlavaNextConfig(
        vision_config=clip_config(),
        text_config=text,
        image_token_index=32000,
        image_grid_pinpoints=GRIDS,
        tie_word_embeddings=text.tie_word_embeddings,
    )
    model = randomize(LlavaNextForConditionalGeneration(config))
    model.save_pretrained(folder / "theirs")
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    edge = {"shortest_edge": IMAGE_SIZE}
    tokenizer = Tokenizer.from_pretrained(shared_data / "llama_tokenizer")
    processor = LlavaNextImageProcessor(size=edge, crop_size=size, image_grid_pinpoints=GRIDS)
    processor.save_pretrained(folder / "theirs")
    llava = load_llava(folder / "theirs", tokenizer)
    template = chat_template(TEMPLATES["v1"], tokenizer, False)
    export_llava(llava, folder / "llava", tokenizer, template)
    rng = np.random.default_rng(0)
    for name, (height, width) in PICTURES.items():
        pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.png")
    return Published(folder / "llava", folder, tokenizer)


def test_the_export_is_the_published_model(published):
    ours = load_file(published.folder / "model.safetensors")
    theirs = LlavaNextForConditionalGeneration.from_pretrained(published.pictures / "theirs")
    loaded = published.theirs.state_dict()
    assert loaded.keys() == theirs.state_dict().keys()
    assert all(torch.equal(loaded[name], x) for name, x in theirs.state_dict().items())
    assert "image_newline" in ours
    processor = AutoProcessor.from_pretrained(published.folder)
    assert isinstance(processor, LlavaNextProcessor)


@pytest.mark.parametrize("name", PICTURES)
def test_tokens_pixels_and_logits(published, name):
    inputs, llava = published.inputs(name), load_llava(published.folder, published.tokenizer)
    picture = load_picture(published.pictures / f"{name}.png", llava.vision_tower.config)
    pixels = llava.vision_tower.normalize_pixels(picture.pixels)
    torch.testing.assert_close(pixels, inputs["pixel_values"][0], atol=1e-5, rtol=0)
    ids = inputs["input_ids"][0]
    is_image = ids == published.tokenizer.image_token_id
    assert is_image.sum() == num_image_tokens(picture, NUM_PATCHES) == len(picture.rows)
    with torch.no_grad():
        expected = published.theirs(**inputs).logits[0]
        images = llava.image_inputs([picture], is_image.nonzero().squeeze(1))
        bounds = torch.tensor([0, len(ids)], dtype=torch.int32)
        positions = torch.arange(len(ids), dtype=torch.int32)
        packed = llava.decoder.packed_positions(positions, bounds, len(ids))
        found = llava.decoder(ids, packed, images) @ llava.decoder.lm_head.weight.T
    torch.testing.assert_close(found, expected, atol=1e-4 * expected.abs().max().item(), rtol=0)


def test_greedy_answers(published):
    conversation = Conversation(published.folder, template="v1", device="cpu")
    conversation.use_im_start_end = False
    answers = []
    for name in ("wide", "tall", "small"):
        inputs = published.inputs(name)
        with torch.no_grad():
            found = published.theirs.generate(**inputs, do_sample=False, max_new_tokens=6)
        conversation.start()
        conversation.show(published.pictures / f"{name}.png")
        answer = conversation.ask("What is it?", GenerationOptions(6), lambda text: None)
        theirs = found[0, inputs["input_ids"].shape[1] :].tolist()
        assert answer.token_ids == theirs[: len(answer.token_ids)]
        answers.append(tuple(answer.token_ids))
    assert len(set(answers)) > 1  # they depend on the picture


def test_questions_about_pictures(published):
    """As evaluate.py asks them: decoded in worker processes, two about one picture together."""
    model = VisionModel.load(published.folder, "v1", torch.float32, torch.device("cpu"))
    model = replace(model, use_im_start_end=False)
    names = ["wide", "odd"]
    files = [f"{name}.png" for name in names]
    sight = (published.pictures, files, model.vision)
    pictures = list(load_pictures(*sight, Shown(), seed=0, num_workers=1))
    prompts, expected = [], []
    for name, pixels in zip(names, pictures, strict=True):
        for question in ("What is it?", "Is it red?"):
            about = dict(task="pope", doc_id=len(prompts), image=f"{name}.png", gold="yes")
            document = VisualDocument(question=question, **about)
            prompts.append(model.prompt(document, pixels, model.template))
            inputs = published.inputs(name, question)
            with torch.no_grad():
                found = published.theirs.generate(**inputs, do_sample=False, max_new_tokens=4)
            expected.append(found[0, inputs["input_ids"].shape[1] :].tolist())
    answers = generate(model.llava, model.tokenizer, prompts, GenerationOptions(4))
    for answer, theirs in zip(answers, expected, strict=True):
        assert answer.token_ids == theirs[: len(answer.token_ids)]
    [changed] = load_pictures(
        published.pictures, files[:1], model.vision, Shown(None, ("brightness", 3)), 0, 0
    )
    assert torch.equal(changed.rows, pictures[0].rows)
    assert not torch.equal(changed.pixels, pictures[0].pixels)


def test_two_pictures_of_a_prompt(published):
    """As the features of one, then those of the other."""
    llava = load_llava(published.folder, published.tokenizer)
    vision = llava.vision_tower.config
    pair = [load_picture(published.pictures / f"{x}.png", vision) for x in ("wide", "odd")]
    lengths = [len(x.rows) for x in pair]
    both = llava.image_inputs([join_pixels(pair)], torch.arange(sum(lengths)))
    first = llava.image_inputs(pair[:1], torch.arange(lengths[0]))
    second = llava.image_inputs(pair[1:], torch.arange(lengths[0], sum(lengths)))
    torch.testing.assert_close(both.features, torch.cat((first.features, second.features)))
    assert torch.equal(both.positions, torch.cat((first.positions, second.positions)))


def test_grids_and_token_counts_of_every_size():
    """At the published sizes, where transformers counts tokens without a model."""
    grids = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
    processor = LlavaNextProcessor.__new__(LlavaNextProcessor)
    processor.patch_size, processor.num_additional_image_tokens = 14, 0
    processor.image_processor = LlavaNextImageProcessor(image_grid_pinpoints=grids)
    random = np.random.default_rng(0)
    for height, width in random.integers(8, 2000, (300, 2)).tolist():
        grid = best_grid(height, width, [tuple(x) for x in grids])
        assert grid == select_best_resolution((height, width), grids)
        rows = token_rows(height, width, grid, 336, 24)
        assert len(rows) == processor._get_number_of_features(height, width, 336, 336)


def test_folders_that_cannot_be_used(published, tmp_path):
    vision = VisionConfig.from_hf(published.folder)
    with pytest.raises(UserError, match="never pads them to squares"):
        ConversationDataset([], published.tokenizer, DataConfig(image_aspect_ratio="pad"), vision)
    for name in ("config.json", "preprocessor_config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((published.folder / name).read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    newline = weights.pop("image_newline")
    for changed, found in (({}, "none"), ({"image_newline": newline[:-1].clone()}, r"\(\d+,\)")):
        save_file(weights | changed, tmp_path / "model.safetensors")
        with pytest.raises(UserError, match=rf"image_newline: expected shape .*found {found}"):
            load_llava(tmp_path, published.tokenizer)
    settings = json.loads((tmp_path / "config.json").read_text())
    for grids in ([[28, 57]], [[28]], [28], [[28, 0]], [[28, 28 * 17]]):
        changed = settings | {"image_grid_pinpoints": grids}
        (tmp_path / "config.json").write_text(json.dumps(changed))
        with pytest.raises(UserError, match="image_grid_pinpoints"):
            VisionConfig.from_hf(tmp_path)
