"""Seeded damage to every settings file of a folder: the right meaning, or a sentence with its name.

Never a traceback, and nothing taken that the file does not say.
"""

import json
import random
import shutil
from functools import partial

import pytest
import sentencepiece
import torch
from transformers import CLIPVisionConfig, LlamaConfig

from mmalign.model.config import DecoderConfig, VisionConfig
from mmalign.model.hf import load_decoder, load_projector
from mmalign.tokenizer import Tokenizer
from tests.fuzz.damage import damaged_bytes, damaged_json, ends_well
from tests.model.tiny import hf_clip, hf_llama

pytestmark = pytest.mark.fuzz
JSON_FILES = ["config.json", "preprocessor_config.json", "model.safetensors.index.json"]
JSON_FILES += ["tokenizer_config.json", "added_tokens.json", "tokenizer.json", "clip.json"]
KEYS = ("rope_scaling", "eos_token", "quantization_config")


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """One folder with every kind of settings file; clip.json is the tower's config.json."""
    folder = tmp_path_factory.mktemp("good")
    shape = dict(hidden_size=32, num_attention_heads=4, intermediate_size=48)
    hf_llama(**shape).save_pretrained(folder, max_shard_size="20KB")
    hf_clip().config.save_pretrained(folder / "clip")
    (folder / "clip/config.json").rename(folder / "clip.json")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a boat at the pier", "what is it", "the pier is red"] * 9),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=290,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()
    size = Tokenizer.from_pretrained(folder).vocab_size
    decoder = {str(size): {"content": "<loc>"}, str(size + 1): {"content": "<e>", "special": True}}
    write(folder / "tokenizer_config.json", {"eos_token": "<e>", "added_tokens_decoder": decoder})
    write(folder / "added_tokens.json", {"<pad>": size + 2, "<loc>": size})
    Tokenizer.from_pretrained(folder).save(folder / "saved")
    shutil.move(folder / "saved/tokenizer.json", folder / "tokenizer.json")
    size = {"shortest_edge": 28}
    settings = {"size": size, "crop_size": 28, "resample": 3, "image_std": [0.5, 0.5, 0.5]}
    write(folder / "preprocessor_config.json", settings)
    return folder


def write(path, value) -> None:
    path.write_text(json.dumps(value))


def check(folder, name: str) -> None:
    """Loads what reads the file and compares with the file's own words."""
    if name == "clip.json":
        shutil.copy(folder / name, folder / "tower/config.json")
        config, hf = VisionConfig.from_hf(folder / "tower"), json.loads((folder / name).read_text())
        expected = CLIPVisionConfig()
    elif name == "config.json":
        config, hf = DecoderConfig.from_hf(folder), json.loads((folder / name).read_text())
        expected = LlamaConfig()
    elif name == "preprocessor_config.json":
        shutil.copy(folder / "clip.json", folder / "tower/config.json")
        shutil.copy(folder / name, folder / "tower")
        config = VisionConfig.from_hf(folder / "tower").preprocessing
        hf = json.loads((folder / name).read_text())
        assert (config.size, config.crop_size) == (28, 28)
        assert list(config.image_std) == hf.get("image_std", list(type(config).image_std))
        return
    elif name == "model.safetensors.index.json":
        load_decoder(folder)
        return
    else:
        tokenizer = Tokenizer.from_pretrained(folder)
        ids, offsets = tokenizer.encode_with_offsets("what is the pier")
        assert len(ids) == len(offsets) and max(ids) < tokenizer.vocab_size
        tokenizer.check_rows(tokenizer.vocab_size, folder, 3)
        return
    for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        value = getattr(config, key)
        assert type(value) is int and value == hf.get(key, getattr(expected, key)) and value > 0


def test_damage_is_harmless_or_named(good, tmp_path, seeds):
    folder, accepted = tmp_path / "folder", 0
    shutil.copytree(good, folder)
    (folder / "tower").mkdir()
    for seed in seeds("model and tokenizer folders"):
        rng = random.Random(seed)
        name = rng.choice([*JSON_FILES, "tokenizer.model"])
        if name == "tokenizer.model":
            (folder / name).write_bytes(damaged_bytes((good / name).read_bytes(), rng))
        else:
            text = (good / name).read_text()
            (folder / name).write_bytes(damaged_json(text, rng, KEYS))
        accepted += ends_well((seed, name), (str(folder),), check, folder, name)
        shutil.copy(good / name, folder / name)
        (folder / "tower/preprocessor_config.json").unlink(missing_ok=True)
    assert 0.1 < accepted / len(seeds("model and tokenizer folders")) < 0.7


@pytest.mark.filterwarnings("ignore")
def test_damaged_weights_are_named(good, tmp_path, seeds):
    """A projector's .bin of both ages, and the header of a safetensors file."""
    names = ("model.mm_projector.weight", "model.mm_projector.bias")
    tensors = {names[0]: torch.ones(8, 8), names[1]: torch.ones(8)}
    shutil.copytree(good, tmp_path / "folder")
    shard = next((tmp_path / "folder").glob("*.safetensors"))
    header = 8 + int.from_bytes(shard.read_bytes()[:8], "little")
    files = [(shard, header, partial(load_decoder, shard.parent))]
    for zipped in (True, False):
        path = tmp_path / f"zip_{zipped}.bin"
        torch.save(tensors, path, _use_new_zipfile_serialization=zipped)
        files.append((path, None, partial(load_projector, path)))
    for seed in seeds("weight files"):
        rng = random.Random(seed)
        path, end, load = files[seed % 3]
        whole = path.read_bytes()
        path.write_bytes(damaged_bytes(whole, rng, end))
        ends_well((seed, path.name), (str(tmp_path),), load)
        path.write_bytes(whole)
