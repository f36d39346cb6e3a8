"""Weights that are wrong, in every way in which they can be."""

import json
import logging
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from mmalign.errors import UserError
from mmalign.model.hf import load_decoder, load_projector, load_vision_tower
from tests.model.hf.test_read import rewrite, same_weights
from tests.model.tiny import (
    TIED,
    hf_clip,
    hf_llama,
)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda s: {k: v for k, v in s.items() if k != "model.norm.weight"},
            r"missing model\.norm\.weight",
        ),
        (lambda s: s | {"model.extra": torch.ones(1)}, r"unexpected model\.extra"),
        (
            lambda s: s | {"model.layers.0.self_attn.q_proj.bias": torch.ones(256)},
            r"unexpected model\.layers\.0\.self_attn\.q_proj\.bias",
        ),
        (
            lambda s: s | {"model.layers.1.self_attn.k_proj.weight": torch.ones(64, 128)},
            r"k_proj\.weight: expected shape \(128, 128\), found \(64, 128\)",
        ),
        (
            lambda s: s | {"lm_head.weight": torch.ones(100, 128)},
            r"lm_head\.weight: expected shape \(103, 128\), found \(100, 128\)",
        ),
    ],
)
def test_keys_and_shapes_that_do_not_fit(folder, change, message):
    rewrite(folder, change)
    with pytest.raises(UserError, match=message):
        load_decoder(folder)


def test_wrong_image_size_is_refused(tmp_path):
    hf_clip().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"image_size": 56}))
    message = r"position_embedding\.weight: expected shape \(17, 48\), found \(5, 48\)"
    with pytest.raises(UserError, match=message):
        load_vision_tower(tmp_path)


def test_multimodal_leftovers_are_listed(folder, caplog):
    expected = load_decoder(folder)
    extra = {
        "model.mm_projector.weight": torch.ones(128, 48),
        "model.mm_projector.bias": torch.ones(128),
        "model.vision_tower.vision_tower.vision_model.pre_layrnorm.bias": torch.ones(48),
    }
    rewrite(folder, lambda s: s | extra)
    with caplog.at_level(logging.WARNING, logger="mmalign"):
        assert same_weights(load_decoder(folder), expected)
    assert "3 tensors" in caplog.text
    assert all(key in caplog.text for key in extra)


def test_tied_folder_with_its_own_head(tmp_path):
    hf_llama(**TIED).save_pretrained(tmp_path)
    embeddings = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
    rewrite(tmp_path, lambda s: s | {"lm_head.weight": embeddings.clone()})
    assert torch.equal(load_decoder(tmp_path).lm_head.weight, embeddings)
    rewrite(tmp_path, lambda s: s | {"lm_head.weight": embeddings + 1})
    with pytest.raises(UserError, match="tie_word_embeddings"):
        load_decoder(tmp_path)


def test_folder_without_weights(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"looked for model\.safetensors, .*\.bin"):
        load_decoder(folder)


def test_key_in_two_shards(folder):
    whole = folder / "model.safetensors"
    for name in ("a.safetensors", "b.safetensors"):
        (folder / name).write_bytes(whole.read_bytes())
    whole.unlink()
    index = {"weight_map": {"one": "a.safetensors", "two": "b.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"b\.safetensors: .* is also in a\.safetensors"):
        load_decoder(folder)


def test_bin_file_with_something_else(folder):
    (folder / "model.safetensors").unlink()
    torch.save({"state_dict": {"model.norm.weight": torch.ones(128)}}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="does not contain a state dict"):
        load_decoder(folder)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_damaged_file(folder, name):
    if name == "pytorch_model.bin":
        torch.save(load_file(folder / "model.safetensors"), folder / name)
        (folder / "model.safetensors").unlink()
    os.truncate(folder / name, (folder / name).stat().st_size // 2)
    with pytest.raises(UserError, match=f"{name} is damaged"):
        load_decoder(folder)


def test_pickles_with_code_are_refused(folder):
    (folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": logging.Handler}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="is damaged or not a file of weights"):
        load_decoder(folder)


def test_one_whole_file_comes_before_a_stale_index(folder, caplog):
    """As in transformers, whose own choice is the reference."""
    whole = load_file(folder / "model.safetensors")
    save_file({k: v * 0.5 for k, v in whole.items()}, folder / "old.safetensors")
    index = {"weight_map": dict.fromkeys(whole, "old.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    theirs = LlamaForCausalLM.from_pretrained(folder)
    with caplog.at_level(logging.WARNING, logger="mmalign"):
        decoder = load_decoder(folder)
    assert torch.equal(decoder.lm_head.weight, theirs.lm_head.weight)
    assert "model.safetensors.index.json beside it is not" in caplog.text


Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
BROKEN_VALUES = {
    "int8": lambda w: w.to(torch.int8),
    "complex64": lambda w: w.to(torch.complex64),
    "float8_e4m3fn": lambda w: w.to(torch.float8_e4m3fn),
    "bool": lambda w: w > 0,
    "no values": lambda w: w.to("meta"),
    "torch.sparse_coo": lambda w: w.to_sparse(),
    "NaN or infinite": lambda w: w.index_fill(0, torch.tensor([7]), float("nan")),
    "NaN or infinite, half": lambda w: w.half().index_fill(0, torch.tensor([7]), float("inf")),
    "NaN or infinite, as fp32": lambda w: w.double() * 1e300,
}


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("kind", BROKEN_VALUES)
def test_values_that_are_not_weights(folder, name, kind):
    state = load_file(folder / "model.safetensors")
    state[Q_PROJ] = BROKEN_VALUES[kind](state[Q_PROJ])
    if name.endswith("safetensors") and kind in ("no values", "torch.sparse_coo"):
        return  # which that format cannot hold
    (folder / "model.safetensors").unlink()
    (save_file if name.endswith("safetensors") else torch.save)(state, folder / name)
    with pytest.raises(UserError, match=rf"{name}: {Q_PROJ} has .*{kind.partition(',')[0]}"):
        load_decoder(folder)


def test_tower_and_projector_with_nan(tmp_path):
    hf_clip().save_pretrained(tmp_path)
    key = "encoder.layers.0.self_attn.q_proj.weight"
    rewrite(tmp_path, lambda s: s | {n: s[n] * float("nan") for n in s if n.endswith(key)})
    with pytest.raises(UserError, match=rf"safetensors: .*{key} has values that are NaN"):
        load_vision_tower(tmp_path)
    weights = {"model.mm_projector.weight": torch.full((8, 8), float("inf"))}
    torch.save(weights | {"model.mm_projector.bias": torch.ones(8)}, tmp_path / "mm_projector.bin")
    with pytest.raises(UserError, match=r"mm_projector\.bin: model\.mm_projector\.weight has val"):
        load_projector(tmp_path / "mm_projector.bin")


def test_extra_tensors_of_published_folders(folder, tmp_path):
    expected = load_decoder(folder)
    extra = {"model.image_newline": torch.ones(128), "model.rotary_emb.inv_freq": torch.ones(32)}
    rewrite(folder, lambda s: s | extra)
    assert same_weights(load_decoder(folder), expected)
    hf_clip().save_pretrained(tmp_path / "clip")
    tower = load_vision_tower(tmp_path / "clip")
    rewrite(tmp_path / "clip", lambda s: s | {"visual_projection.weight": torch.ones(16, 48)})
    assert same_weights(load_vision_tower(tmp_path / "clip"), tower)


@pytest.mark.parametrize(
    "index, message",
    [
        ({}, "weight_map names no files"),
        ({"weight_map": []}, "weight_map is .*; expected an object"),
        ({"weight_map": {"a": 5}}, r"weight_map\.a is 5; expected the name of a file"),
        ({"weight_map": {"a": "../model.safetensors"}}, "'../model.*' , which lies outside"),
        ({"weight_map": {"a": "/etc/passwd"}}, "'/etc/passwd', which lies outside"),
        ({"weight_map": {"a": "fifo"}}, "fifo is not a regular file"),
        ({"weight_map": {"a": "."}}, r"weight_map\.a is '\.'; expected the name of a file"),
    ],
)
def test_indexes_that_are_refused(folder, index, message):
    (folder / "model.safetensors").rename(folder.parent / "model.safetensors")
    os.mkfifo(folder / "fifo")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=message.replace(" ,", ",")):
        load_decoder(folder)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a git-LFS pointer"),
        (b"GGUF" + bytes(60), "a GGUF file"),
        (b"\x1f\x8b" + bytes(60), "compressed with gzip"),
        (b"<!DOCTYPE html><html>", "a web page"),
        (b"", "empty"),
        (b"PK", "damaged"),
    ],
)
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_files_of_another_kind_are_called_by_their_names(folder, name, content, message):
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{name} is {message}") as error:
        load_decoder(folder)
    assert "weights_only" not in str(error.value)


def test_every_cut_of_a_projector_file_is_refused(tmp_path):
    path = tmp_path / "mm_projector.bin"
    weights = {"model.mm_projector.weight": torch.ones(8, 8)}
    torch.save(weights | {"model.mm_projector.bias": torch.ones(8)}, path)
    whole = path.read_bytes()
    for length in range(0, len(whole), 37):
        path.write_bytes(whole[:length])
        kind = "damaged" if length else "empty"
        with pytest.raises(UserError, match=rf"mm_projector\.bin is {kind}"):
            load_projector(path)


def test_quantised_weights_are_called_so(folder):
    rewrite(folder, lambda s: s | {f"{Q_PROJ}.absmax": torch.ones(4)})
    with pytest.raises(UserError, match="the weights are quantised"):
        load_decoder(folder)


def test_what_is_wrong_with_a_folder_is_said(folder):
    whole = folder / "model.safetensors"
    whole.rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model.bin is a safetensors file\. Give"):
        load_decoder(folder)
    (folder / "pytorch_model.bin").rename(folder / "model-00001-of-00002.safetensors")
    with pytest.raises(UserError, match=r"without their index\. Download model.safetensors.index"):
        load_decoder(folder)
    (folder / "export").mkdir()
    with pytest.raises(UserError, match="is a run without export/projector.safetensors: it is un"):
        load_projector(folder)


def test_sizes_are_compared_before_memory_is_taken(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 2**24}))
    with pytest.raises(UserError, match=r"expected shape \(16777216, 128\), found \(103, 128\)"):
        load_decoder(folder)
