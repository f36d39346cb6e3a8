"""The toy world in miniature: the same bytes twice, and what reads its files."""

import subprocess
import sys

import pytest
import torch
from transformers import AutoTokenizer, CLIPVisionModel, LlamaForCausalLM

from mmalign.config import DataConfig
from mmalign.data.dataset import ConversationDataset
from mmalign.data.images import load_image
from mmalign.data.samples import read_samples
from mmalign.model.config import VisionConfig
from mmalign.model.hf import load_decoder, load_vision_tower
from mmalign.model.preprocessing import Preprocessing
from mmalign.tokenizer import Tokenizer
from mmalign.toy_world import toy_world
from mmalign.toy_world.scenes import IMAGE_SIZE
from tests.toy_world.helpers import MINIATURE, VARIANTS, contents


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
