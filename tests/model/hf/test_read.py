"""Weights in every published form."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel

from mmalign.errors import UserError
from mmalign.model.hf import load_decoder, load_projector, load_vision_tower
from tests.model.tiny import (
    GROUPED_QUERY,
    TIED,
    clip_config,
    hf_clip,
    hf_llama,
    hf_llava,
    randomize,
)


def same_weights(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    return all(torch.equal(p, second.get_parameter(name)) for name, p in first.named_parameters())


def rewrite(folder, change) -> dict[str, torch.Tensor]:
    """Passes the tensors of model.safetensors through `change` and writes them back."""
    path = folder / "model.safetensors"
    state = change(load_file(path))
    save_file(state, path, metadata={"format": "pt"})
    return state


def test_sharded_files_of_both_formats(folder):
    expected, state = load_decoder(folder), load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    keys = sorted(state)
    for suffix, write in (
        ("pytorch_model-{}-of-00002.bin", torch.save),
        ("model-{}-of-00002.safetensors", save_file),
    ):
        weight_map = {}
        for i, part in enumerate((keys[::2], keys[1::2])):
            name = suffix.format(f"{i + 1:05d}")
            write({key: state[key] for key in part}, folder / name)
            weight_map |= dict.fromkeys(part, name)
        stem = "pytorch_model.bin" if "bin" in suffix else "model.safetensors"
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / f"{stem}.index.json").write_text(json.dumps(index))
        assert same_weights(load_decoder(folder), expected)
    (folder / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match=r"model-00001-of-00002\.safetensors is missing"):
        load_decoder(folder)


@pytest.mark.parametrize("zip_format", [True, False])
def test_bin_files_of_both_ages(folder, zip_format):
    expected, state = load_decoder(folder), load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    path = folder / "pytorch_model.bin"
    torch.save(state, path, _use_new_zipfile_serialization=zip_format)
    assert same_weights(load_decoder(folder), expected)


def test_old_buffers_are_left_out(folder, tmp_path):
    expected = load_decoder(folder)
    buffer = "model.layers.{}.self_attn.rotary_emb.inv_freq"
    rewrite(folder, lambda s: s | {buffer.format(i): torch.ones(32) for i in range(2)})
    assert same_weights(load_decoder(folder), expected)
    hf_clip().save_pretrained(tmp_path / "clip")
    tower = load_vision_tower(tmp_path / "clip")
    position_ids = {"embeddings.position_ids": torch.arange(5)[None]}
    rewrite(
        tmp_path / "clip",
        lambda s: {f"vision_model.{key}": value for key, value in (s | position_ids).items()},
    )
    assert same_weights(load_vision_tower(tmp_path / "clip"), tower)


def test_tower_of_a_whole_clip(tmp_path):
    text = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    config = CLIPConfig(vision_config=clip_config().to_dict(), text_config=text | {"vocab_size": 9})
    model = randomize(CLIPModel(config))
    model.save_pretrained(tmp_path / "clip")
    model.vision_model.save_pretrained(tmp_path / "tower")
    tower = load_vision_tower(tmp_path / "tower")
    assert same_weights(load_vision_tower(tmp_path / "clip"), tower)


@pytest.mark.parametrize(
    "prefixes",
    [
        {},  # as transformers 5 writes it
        {"vision_tower.": "vision_tower.vision_model."},  # as published (llava-hf)
        {
            "language_model.model.": "model.language_model.",
            "language_model.lm_head": "lm_head",
            "vision_tower.": "model.vision_tower.",
            "multi_modal_projector": "model.multi_modal_projector",
        },  # as the module itself names them
    ],
)
def test_parts_of_a_llava_folder(tmp_path, prefixes):
    theirs = hf_llava(**GROUPED_QUERY)
    theirs.save_pretrained(tmp_path)

    def rename(state):
        return {
            next((new + k[len(old) :] for old, new in prefixes.items() if k.startswith(old)), k): v
            for k, v in state.items()
        }

    rewrite(tmp_path, rename)
    language_model, linear = (
        theirs.model.language_model,
        theirs.model.multi_modal_projector.linear_1,
    )
    decoder, tower = load_decoder(tmp_path), load_vision_tower(tmp_path)
    assert torch.equal(decoder.lm_head.weight, theirs.lm_head.weight)
    assert torch.equal(decoder.norm.weight, language_model.norm.weight)
    down_proj = language_model.layers[1].mlp.down_proj.weight
    assert torch.equal(decoder.layers[1].down_proj.weight, down_proj)
    class_embedding = theirs.model.vision_tower.embeddings.class_embedding
    assert torch.equal(tower.class_embedding, class_embedding)
    state = load_projector(tmp_path)
    assert torch.equal(state["weight"], linear.weight) and torch.equal(state["bias"], linear.bias)


def test_dtype_is_converted(folder):
    decoder, half = load_decoder(folder), load_decoder(folder, torch.bfloat16)
    assert same_weights(decoder.to(torch.bfloat16), half)


@pytest.mark.parametrize("shape", [GROUPED_QUERY, TIED], ids=["untied", "tied"])
def test_added_tokens_have_the_mean_embedding(tmp_path, shape):
    theirs = hf_llama(**shape)
    theirs.save_pretrained(tmp_path)
    decoder = load_decoder(tmp_path, num_added_tokens=3)
    assert decoder.config.vocab_size == 106
    for ours, weight in (
        (decoder.embed_tokens.weight, theirs.model.embed_tokens.weight),
        (decoder.lm_head.weight, theirs.lm_head.weight),
    ):
        assert ours.shape == (106, shape["hidden_size"])
        assert torch.equal(ours[:103], weight)
        torch.testing.assert_close(ours[103:], weight.mean(0).expand(3, -1))
