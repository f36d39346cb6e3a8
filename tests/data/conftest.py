"""A tokenizer and a few samples with pictures that need nothing from outside."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from PIL import Image

from mmalign.config import DataConfig
from mmalign.data.controls.lengths import supervised_tokens
from mmalign.data.dataset import ConversationDataset
from mmalign.data.samples import read_samples
from mmalign.model.config import VisionConfig
from mmalign.tokenizer import Tokenizer

NUM_PATCHES, IMAGE_SIZE = 4, 28
VISION = VisionConfig(
    hidden_size=48,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    image_size=IMAGE_SIZE,
    patch_size=14,
)
WORDS = ("what", "colour", "is", "the", "small", "boat", "tied", "to", "a", "pier", "at", "sunset")
WORDS += ("it", "looks", "red", "green", "or", "blue")
KINDS = ("conversation", "detail", "complex_reasoning_77k", None)  # types of samples


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory) -> Path:
    """A byte-pair sentencepiece model with LLaMA's settings."""
    folder = tmp_path_factory.mktemp("tokenizer")
    rng = np.random.default_rng(0)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(" ".join(rng.choice(WORDS, size=9)) for _ in range(300)),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=340,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder) -> Tokenizer:
    return Tokenizer.from_pretrained(tokenizer_folder)


@pytest.fixture(scope="session")
def llama_tokenizer(shared_data) -> Tokenizer:
    return Tokenizer.from_pretrained(shared_data / "llama_tokenizer")


@dataclass
class World:
    """A data file that a test may change, its images, and the dataset that they make."""

    root: Path
    tokenizer: Tokenizer
    samples: list[dict]

    def dataset(self, **settings) -> ConversationDataset:
        path = self.root / "data.json"
        path.write_text(json.dumps(self.samples))
        settings = {"image_root": str(self.root / "images")} | settings
        data = DataConfig(path=str(path), **settings)
        return ConversationDataset(read_samples(path, data), self.tokenizer, data, VISION)


@pytest.fixture
def world(tmp_path, tokenizer) -> World:
    """20 samples of 1 to 4 questions; every fourth has no image."""
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    samples = []
    for i in range(20):
        turns = []
        for _ in range(int(rng.integers(1, 5))):
            turns += [("human", rng.choice(WORDS, 6)), ("gpt", rng.choice(WORDS, 1 + i))]
        turns = [{"from": speaker, "value": " ".join(words)} for speaker, words in turns]
        sample = {"id": f"sample-{i}", "conversations": turns}
        if i % 4:
            sample["image"] = f"{i}.png"
            turns[0]["value"] = "<image>\n" + turns[0]["value"]
            pixels = rng.integers(0, 256, (30 + i, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / f"{i}.png")
        samples.append(sample)
    return World(tmp_path, tokenizer, samples)


@pytest.fixture
def rows(world: World) -> list[dict]:
    """20 samples, every fourth without an image, of several types, some with the same picture."""
    for i, sample in enumerate(world.samples):
        if KINDS[i % 3]:
            sample["type"] = KINDS[i % 3]
        if "image" in sample and i % 5 == 0:
            sample["image"] = "1.png"
        sample["url"] = f"field {i}"
    return world.samples


@pytest.fixture
def text_rows() -> list[dict]:
    rng = np.random.default_rng(1)
    return [
        {
            "id": f"text-{i}",
            "conversations": [
                {"from": "human", "value": "what is it"},
                {"from": "gpt", "value": " ".join(["boat"] * int(rng.integers(1, 90)))},
            ],
        }
        for i in range(50)
    ]


@pytest.fixture
def count(tokenizer):
    return supervised_tokens(DataConfig(), tokenizer)
