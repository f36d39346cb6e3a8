"""Exports load in transformers without a missing or unexpected key, bit for bit."""

import json

import pytest
import torch
from safetensors import safe_open
from transformers import (
    CLIPImageProcessor,
    CLIPVisionModel,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
)

from mmalign.config import LoraConfig
from mmalign.model.hf import export as hf_export
from mmalign.model.hf import (
    export_llama,
    export_llava,
    export_vision_tower,
    load_decoder,
    load_projector,
    load_vision_tower,
    save_projector,
)
from mmalign.model.lora import LoraLinear, add_lora, merge_lora
from tests.model.tiny import (
    GROUPED_QUERY,
    NUM_PATCHES,
    SHAPES,
    hf_clip,
    hf_llama,
    hf_llava,
    hf_logits,
    mixed_samples,
    ours,
    pack,
    set_trainable,
    stage,
)

DTYPES = [torch.float32, torch.bfloat16]


def load_exactly(model_class: type, folder):
    """transformers' model; nothing may be missing, left over or reshaped."""
    model, info = model_class.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def assert_same_state(first: torch.nn.Module, second: torch.nn.Module) -> None:
    expected = dict(second.named_parameters())
    actual = dict(first.named_parameters())
    assert actual.keys() == expected.keys()
    for name, parameter in actual.items():
        assert parameter.dtype == expected[name].dtype, name
        assert torch.equal(parameter, expected[name]), name


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_llama_round_trip(tmp_path, shape, dtype):
    theirs = hf_llama(**shape).to(dtype)
    theirs.save_pretrained(tmp_path / "theirs")
    decoder = load_decoder(tmp_path / "theirs", dtype)
    export_llama(decoder, tmp_path / "ours")
    loaded = load_exactly(LlamaForCausalLM, tmp_path / "ours")
    assert_same_state(loaded, theirs)
    config, expected = loaded.config.to_dict(), theirs.config.to_dict()
    assert {k: v for k, v in config.items() if v != expected[k]}.keys() == {"_name_or_path"}
    again = load_decoder(tmp_path / "ours", dtype)
    assert again.config == decoder.config
    assert_same_state(again, decoder)


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
def test_vision_tower_round_trip(tmp_path, dtype):
    theirs = hf_clip().to(dtype)
    theirs.save_pretrained(tmp_path / "theirs")
    tower = load_vision_tower(tmp_path / "theirs", dtype)
    export_vision_tower(tower, tmp_path / "ours")
    assert_same_state(load_exactly(CLIPVisionModel, tmp_path / "ours"), theirs)
    assert_same_state(load_vision_tower(tmp_path / "ours", dtype), tower)
    processor = CLIPImageProcessor.from_pretrained(tmp_path / "ours")
    stock = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    assert processor.to_dict() == stock.to_dict()


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_llava_round_trip(tmp_path, shape, dtype):
    theirs = hf_llava(**shape)
    model = ours(theirs, tmp_path / "theirs").to(dtype)
    theirs.to(dtype)
    export_llava(model, tmp_path / "ours")
    loaded = load_exactly(LlavaForConditionalGeneration, tmp_path / "ours")
    assert_same_state(loaded, theirs)
    config = loaded.config
    assert (config.image_token_index, config.image_seq_length) == (100, NUM_PATCHES)
    assert (config.vision_feature_layer, config.vision_feature_select_strategy) == (-2, "default")
    loaded.save_pretrained(tmp_path / "saved by transformers")
    for folder in (tmp_path / "ours", tmp_path / "saved by transformers"):
        assert_same_state(load_decoder(folder, dtype), model.decoder)
        assert_same_state(load_vision_tower(folder, dtype), model.vision_tower)
        state = load_projector(folder)
        assert torch.equal(state["weight"], model.projector.weight)
        assert torch.equal(state["bias"], model.projector.bias)


def test_exported_llava_computes_the_same(tmp_path):
    model = ours(hf_llava(**GROUPED_QUERY), tmp_path / "theirs")
    export_llava(model, tmp_path / "ours")
    loaded = load_exactly(LlavaForConditionalGeneration, tmp_path / "ours")
    samples = mixed_samples()
    with torch.no_grad():
        logits = model.hidden_states(pack(samples)) @ model.decoder.lm_head.weight.T
        expected = torch.cat([hf_logits(loaded, sample) for sample in samples])
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


def test_trained_token_rows_are_in_every_export(tmp_path):
    model = ours(hf_llava(**GROUPED_QUERY), tmp_path / "theirs")
    save_projector(model, tmp_path / "run/export/projector.safetensors")
    assert load_projector(tmp_path / "run").keys() == {"weight", "bias"}
    set_trainable(model, stage("pretrain"))
    rows = torch.randn(2, 128)
    model.image_token_embeddings.data.copy_(rows)
    frozen = model.decoder.embed_tokens.weight.clone()
    export_llava(model, tmp_path / "llava")
    export_llama(model, tmp_path / "llama")
    assert torch.equal(model.decoder.embed_tokens.weight, frozen)  # an export changes nothing
    for name in ("llava", "llama"):
        weight = load_decoder(tmp_path / name).embed_tokens.weight
        assert torch.equal(weight[101:103], rows) and torch.equal(weight[:101], frozen[:101])
    save_projector(model, tmp_path / "run/export/projector.safetensors")
    with safe_open(tmp_path / "run/export/projector.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt"
    other = ours(hf_llava(**GROUPED_QUERY), tmp_path / "theirs")
    other.load_projector(load_projector(tmp_path / "run"))
    assert torch.equal(other.decoder.embed_tokens.weight[101:103], rows)
    assert torch.equal(other.projector.weight, model.projector.weight)


def test_adapters_are_merged_in_the_export_alone(tmp_path):
    hf_llama(**GROUPED_QUERY).save_pretrained(tmp_path / "theirs")
    decoder = load_decoder(tmp_path / "theirs")
    add_lora(decoder, LoraConfig(rank=4))
    for name, parameter in decoder.named_parameters():
        if "lora_b" in name:
            torch.nn.init.normal_(parameter)
    export_llama(decoder, tmp_path / "ours")
    assert isinstance(decoder.layers[0].qkv_proj, LoraLinear)
    merge_lora(decoder)
    assert_same_state(load_decoder(tmp_path / "ours"), decoder)


def test_large_models_are_sharded(tmp_path, monkeypatch):
    monkeypatch.setattr(hf_export, "MAX_SHARD_BYTES", 400_000)
    model = ours(hf_llava(**GROUPED_QUERY), tmp_path / "theirs")
    export_llava(model, tmp_path / "ours")
    index = json.loads((tmp_path / "ours/model.safetensors.index.json").read_text())
    names = set(index["weight_map"].values())
    assert len(names) > 2 and not (tmp_path / "ours/model.safetensors").exists()
    assert names == {path.name for path in (tmp_path / "ours").glob("*.safetensors")}
    loaded = load_exactly(LlavaForConditionalGeneration, tmp_path / "ours")
    total = sum(p.nbytes for p in loaded.parameters())
    assert index["metadata"]["total_size"] == total
    assert_same_state(load_decoder(tmp_path / "ours"), model.decoder)


def test_an_export_is_complete_or_not_there(tmp_path, monkeypatch):
    hf_llama(**GROUPED_QUERY).save_pretrained(tmp_path / "theirs")
    decoder = load_decoder(tmp_path / "theirs")

    def full_disk(*args, **kwargs):
        raise OSError("No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(hf_export, "save_file", full_disk)
        with pytest.raises(OSError, match="No space left"):
            export_llama(decoder, tmp_path / "ours")
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]
    export_llama(decoder, tmp_path / "ours")
    decoder.norm.weight.data.fill_(3.0)
    with monkeypatch.context() as patched:
        patched.setattr(hf_export, "save_file", full_disk)
        with pytest.raises(OSError, match="No space left"):
            export_llama(decoder, tmp_path / "ours")
    assert not (load_decoder(tmp_path / "ours").norm.weight == 3.0).any()  # the old one stays
    export_llama(decoder, tmp_path / "ours")
    assert (load_decoder(tmp_path / "ours").norm.weight == 3.0).all()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours", "theirs"]
