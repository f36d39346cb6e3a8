"""A small world on disk, made by Hugging Face's own classes: decoder, tower, tokenizer, samples."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from PIL import Image
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

IMAGE_SIZE = 28
WORDS = ("red", "blue", "green", "small", "large", "circle", "square", "near", "above", "below")
WORDS += ("what", "is", "the", "a", "this", "it", "no")


@dataclass(frozen=True)
class SmallWorld:
    root: Path
    decoder: Path
    vision_tower: Path
    images: Path
    pretrain_json: Path
    finetune_json: Path
    projector: Path  # LLaVA's mm_projector.bin


@pytest.fixture(scope="session")
def small_world(tmp_path_factory) -> SmallWorld:
    root = tmp_path_factory.mktemp("small_world")
    world = SmallWorld(
        root,
        root / "decoder",
        root / "vision_tower",
        root / "images",
        root / "pretrain.json",
        root / "finetune.json",
        root / "mm_projector.bin",
    )
    torch.manual_seed(0)
    world.images.mkdir()
    vocab_size = train_tokenizer(world.decoder)
    _save_models(world, vocab_size)
    _save_samples(world)
    weight = {"model.mm_projector.weight": torch.randn(48, 32) * 0.1}
    torch.save(weight | {"model.mm_projector.bias": torch.randn(48) * 0.1}, world.projector)
    return world


def train_tokenizer(folder: Path, **options) -> int:
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    sentences = [" ".join(rng.choice(WORDS, size=9)) for _ in range(300)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=330,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
        **options,
    )
    return 330


def _save_models(world: SmallWorld, vocab_size: int) -> None:
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.1,
    )
    LlamaForCausalLM(config).save_pretrained(world.decoder)
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=IMAGE_SIZE,
        patch_size=14,
    )
    CLIPVisionModel(vision).save_pretrained(world.vision_tower)


def _save_samples(world: SmallWorld) -> None:
    """48 captions, and 48 instructions of which every third has no image and some several turns."""
    rng = np.random.default_rng(1)

    def sentence() -> str:
        return " ".join(rng.choice(WORDS, size=rng.integers(3, 14)))

    captions, instructions = [], []
    for i in range(48):
        pixels = rng.integers(0, 256, size=(IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(world.images / f"{i}.png")  # no resizing, no compression
        turns = [("human", f"<image>\n{sentence()}"), ("gpt", sentence())]
        captions.append(_sample(f"caption-{i}", turns, f"{i}.png"))
        if i % 3 == 0:
            instructions.append(
                _sample(f"text-{i}", [("human", sentence()), ("gpt", sentence())], None)
            )
            continue
        for _ in range(i % 4):
            turns += [("human", sentence()), ("gpt", sentence())]
        instructions.append(_sample(f"visual-{i}", turns, f"{i}.png"))
    world.pretrain_json.write_text(json.dumps(captions))
    world.finetune_json.write_text(json.dumps(instructions))


def _sample(sample_id: str, turns: list[tuple[str, str]], image: str | None) -> dict:
    sample = {
        "id": sample_id,
        "conversations": [{"from": speaker, "value": text} for speaker, text in turns],
    }
    return sample | ({"image": image} if image else {})
