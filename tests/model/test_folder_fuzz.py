"""Seeded damage to every settings file of a folder: the right meaning, or a sentence with its name.

Never a traceback, and nothing taken that the file does not say.
"""

import copy
import json
import random
import shutil

import pytest
import sentencepiece
from transformers import CLIPVisionConfig, LlamaConfig

from mmalign.errors import UserError
from mmalign.model.config import DecoderConfig, VisionConfig
from mmalign.model.hf import load_decoder
from mmalign.tokenizer import Tokenizer
from tests.model.tiny import hf_clip, hf_llama

NUM_INPUTS = 1000
HOSTILE = [None, "", "7", "\ud83d", "x" * 400, -1, 0, 1, 3, 10**12, 10**30, 0.5, -2.0, True, False]
HOSTILE += [float("nan"), float("inf"), [], {}, [1], ["a", None], {"a": 1}, [[[]]]]
JSON_FILES = ["config.json", "preprocessor_config.json", "model.safetensors.index.json"]
JSON_FILES += ["tokenizer_config.json", "added_tokens.json", "tokenizer.json", "clip.json"]


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


def places(value, found=()) -> list[tuple]:
    """The paths to all values inside a JSON value."""
    if not isinstance(value, dict | list):
        return [found]
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    return [found] * bool(found) + [x for key, v in pairs for x in places(v, (*found, key))]


def damaged(text: str, rng: random.Random) -> bytes:
    """The text cut, with a wrong byte, or with one value replaced, removed or added."""
    data, kind = text.encode(), rng.random()
    if kind < 0.1:
        return data[: rng.randrange(len(data))]
    if kind < 0.2:
        i = rng.randrange(len(data))
        return data[:i] + bytes([rng.randrange(256)]) + data[i + 1 :]
    value = json.loads(text)
    *path, last = rng.choice(places(value)[:400])
    parent = value
    for key in path:
        parent = parent[key]
    if kind < 0.3 and isinstance(parent, dict):
        del parent[last]
    elif kind < 0.4 and isinstance(parent, dict):
        parent[rng.choice(["rope_scaling", "eos_token", "<x>", "0", "quantization_config"])] = (
            rng.choice(HOSTILE)
        )
    else:
        parent[last] = copy.deepcopy(rng.choice(HOSTILE))
    return json.dumps(value).encode()


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


def test_damage_is_harmless_or_named(good, tmp_path):
    folder = tmp_path / "folder"
    shutil.copytree(good, folder)
    (folder / "tower").mkdir()
    refused = 0
    for seed in range(NUM_INPUTS):
        rng = random.Random(seed)
        name = JSON_FILES[seed % len(JSON_FILES)]
        (folder / name).write_bytes(damaged((good / name).read_text(), rng))
        try:
            check(folder, name)
        except UserError as error:
            refused += 1
            shown = str(error).replace("tower/config.json", "clip.json").replace("tower/", "")
            assert str(tmp_path) in shown and len(shown) < 1500, (seed, name, shown)
        except Exception as error:
            raise AssertionError(f"seed {seed}, {name}") from error
        shutil.copy(good / name, folder / name)
        (folder / "tower/preprocessor_config.json").unlink(missing_ok=True)
    assert NUM_INPUTS / 3 < refused < NUM_INPUTS
