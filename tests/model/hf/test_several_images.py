"""Conversations with several images at their places, against transformers' processor and LLaVA."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import cross_entropy
from transformers import AutoProcessor, LlavaForConditionalGeneration

from mmalign.batch import IGNORE_INDEX
from mmalign.chat import Conversation
from mmalign.config import DataConfig
from mmalign.data.chat_template import chat_template
from mmalign.data.check import check_samples
from mmalign.data.dataset import ConversationDataset
from mmalign.data.loader import StepLoader
from mmalign.data.samples import read_samples
from mmalign.data.templates import TEMPLATES
from mmalign.errors import UserError
from mmalign.model.generate import GenerationOptions
from mmalign.model.hf import export_llava, load_llava
from mmalign.model.llava import Llava
from mmalign.tokenizer import Tokenizer
from tests.model.tiny import GROUPED_QUERY, assert_same, hf_llava, ours

CONVERSATIONS = {  # (question, answer) pairs; <image> stands for the next of the pictures
    "two of a turn": [("<image>\n<image>\nWhich one is red?", "The first.")],
    "between words": [("Is <image>  like <image>, or like <image>?", "Neither.")],
    "in two turns": [("<image>\nWhat is it?", "A boat"), ("And <image>?", "A pier")],
    "at the end": [("Hi", "Hello"), ("Compare these: <image><image>", "They are\nalike")],
    "one": [("What is it? <image>", "A boat")],
    "none": [("What is red?", "A colour")],
}
SIZE = 28


@dataclass(frozen=True)
class Published:
    folder: Path
    theirs: LlavaForConditionalGeneration
    tokenizer: Tokenizer
    data: DataConfig

    def messages(self, pairs) -> list[dict]:
        """With every picture as a part of its own, as its processor takes them."""
        messages, number = [], 0
        for question, answer in pairs:
            first, *rest = question.split("<image>")
            parts = [{"type": "text", "text": first}]
            for text in rest:
                path = Path(self.data.image_root) / f"{number}.png"
                parts += [{"type": "image", "url": str(path)}, {"type": "text", "text": text}]
                number += 1
            messages.append({"role": "user", "content": parts})
            content = [{"type": "text", "text": answer}]
            messages.append({"role": "assistant", "content": content})
        return messages

    def inputs(self, messages, **settings) -> dict[str, torch.Tensor]:
        processor = AutoProcessor.from_pretrained(self.folder)
        common = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
        return processor.apply_chat_template(messages, **common, **settings)


@pytest.fixture(scope="module", params=["v0", "v1", "llava_llama_2", "v1 without marks"])
def published(request, shared_data, tmp_path_factory) -> Published:
    """A small random LLaVA with LLaMA's tokenizer, and the data file of the conversations."""
    name, _, without = request.param.partition(" ")
    folder = tmp_path_factory.mktemp("several")
    tokenizer = Tokenizer.from_pretrained(shared_data / "llama_tokenizer")
    small = ours(hf_llava(**(GROUPED_QUERY | {"max_position_embeddings": 512})), folder / "small")
    table = torch.randn(32003, 128, generator=torch.Generator().manual_seed(0))
    small.decoder.embed_tokens.weight = torch.nn.Parameter(table)
    small.decoder.lm_head.weight = torch.nn.Parameter(table.flip(0) / 8)
    config = small.decoder.config.__class__(**(vars(small.decoder.config) | {"vocab_size": 32003}))
    small.decoder.config = config
    model = Llava(small.decoder, small.vision_tower, small.projector, tokenizer)
    template = chat_template(TEMPLATES[name], tokenizer, not without)
    export_llava(model, folder / "llava", tokenizer, template)
    records, rng = [], np.random.default_rng(0)
    for i in range(3):
        pixels = rng.integers(0, 256, (SIZE, SIZE, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    for case, pairs in CONVERSATIONS.items():
        texts = [text for pair in pairs for text in pair]
        turns = [{"from": ("human", "gpt")[i % 2], "value": x} for i, x in enumerate(texts)]
        images = [f"{i}.png" for i in range("".join(texts).count("<image>"))]
        record = {"id": case, "image": images, "conversations": turns}
        records.append(record | ({"image": images[0]} if len(images) == 1 else {}))
    (folder / "data.json").write_text(json.dumps(records))
    data = DataConfig(
        path=str(folder / "data.json"),
        image_root=str(folder),
        template=name,
        use_im_start_end=not without,
        num_workers=0,
        shuffle=False,
    )
    theirs = LlavaForConditionalGeneration.from_pretrained(folder / "llava")
    return Published(folder / "llava", theirs, tokenizer, data)


def test_ids_pixels_logits_and_loss(published):
    """One packed batch of all of them, against one conversation at a time."""
    model = load_llava(published.folder, published.tokenizer)
    samples = read_samples(published.data.path, published.data)
    vision = model.vision_tower.config
    dataset = ConversationDataset(samples, published.tokenizer, published.data, vision)
    report = check_samples(dataset, progress=False)
    assert report.num_images.tolist() == [2, 3, 2, 2, 1, 0]
    sizes = dict(global_batch_size=len(samples), micro_batch_tokens=4096, num_steps=1, seed=0)
    [step] = StepLoader(dataset, report, **sizes)
    [batch] = step.batches
    assert len(batch.pixel_values) == 10
    with torch.no_grad():
        logits = model.hidden_states(batch) @ model.decoder.lm_head.weight.T
    expected, losses = [], []
    for i, pairs in enumerate(CONVERSATIONS.values()):
        inputs, sample = published.inputs(published.messages(pairs)), dataset.encode(i)
        assert inputs["input_ids"][0].tolist() == sample.input_ids.tolist()
        if "pixel_values" in inputs:
            pixels = model.vision_tower.normalize_pixels(dataset.load_pixels(i))
            torch.testing.assert_close(pixels, inputs["pixel_values"], atol=1e-5, rtol=0)
        with torch.no_grad():
            expected.append(published.theirs(**inputs).logits[0])
        labels = torch.from_numpy(sample.labels[1:]).long()
        assert (labels != IGNORE_INDEX).any()
        losses.append(cross_entropy(expected[-1][:-1], labels, reduction="sum"))
    assert_same(logits, torch.cat(expected))
    assert model(batch).item() == pytest.approx(sum(losses).item(), rel=1e-5)


@pytest.mark.parametrize("case", ["two of a turn", "between words", "in two turns"])
def test_chat_answers_as_transformers(published, case):
    name, marks = published.data.template, published.data.use_im_start_end
    conversation = Conversation(published.folder, template=name, device="cpu")
    conversation.use_im_start_end = marks
    pairs, options = [], GenerationOptions(max_new_tokens=6)
    number = 0
    for question, _ in CONVERSATIONS[case]:
        for _ in range(question.count("<image>")):
            conversation.show(Path(published.data.image_root) / f"{number}.png")
            number += 1
        messages = published.messages([*pairs, (question, "")])[:-1]
        inputs = published.inputs(messages, add_generation_prompt=True)
        with torch.no_grad():
            found = published.theirs.generate(**inputs, do_sample=False, max_new_tokens=6)
        answer = conversation.ask(question, options, lambda text: None)
        theirs = found[0, inputs["input_ids"].shape[1] :].tolist()
        assert answer.token_ids == theirs[: len(answer.token_ids)]
        pairs.append((question, answer.text.strip()))


def test_images_without_a_place_stand_before_the_question(published):
    conversation = Conversation(published.folder, template="v1", device="cpu")
    root, options = Path(published.data.image_root), GenerationOptions(max_new_tokens=1)
    for number in (0, 1):
        conversation.show(root / f"{number}.png")
    with pytest.raises(UserError, match="the question has 1 <image>, but 2 images are shown"):
        conversation.ask("<image> what", options, lambda text: None)
    conversation.ask("what", options, lambda text: None)
    assert conversation.turns[0].text == "<image>\n<image>\nwhat"
    conversation.show(root / "2.png")
    conversation.ask("and this?", options, lambda text: None)
    assert conversation.turns[2].text == "<image>\nand this?"
