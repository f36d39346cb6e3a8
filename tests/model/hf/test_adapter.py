"""Adapter folders: PEFT computes with them what the decoder computes."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaForCausalLM

from mmalign.config import LoraConfig
from mmalign.model.hf import export_adapter, load_decoder
from mmalign.model.lora import add_lora
from tests.model.tiny import SHAPES, assert_same, hf_llama, hidden_states_of, random_sample

LORA = LoraConfig(rank=4, alpha=12.0, dropout=0.1)
CASES = {
    "all": LORA,
    "queries-values": LoraConfig(rank=2, alpha=16.0, targets=("q_proj", "v_proj")),
    "embeddings": LoraConfig(rank=4, alpha=12.0, train_embeddings=True),
}


def adapted(folder, lora: LoraConfig, **shape):
    """A saved base, and a decoder on it whose adapters (and embeddings) have moved."""
    hf_llama(**shape).save_pretrained(folder / "base")
    decoder = load_decoder(folder / "base")
    torch.manual_seed(3)
    add_lora(decoder, lora)
    for name, parameter in decoder.named_parameters():
        if "lora_b" in name:
            nn.init.normal_(parameter, std=0.3)
        elif lora.train_embeddings and name.startswith(("embed_tokens", "lm_head")):
            parameter.data.mul_(1.1)
    export_adapter(decoder, folder / "adapter", lora, str(folder / "base"))
    return decoder.eval()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("case", CASES)
def test_peft_computes_the_same(tmp_path, case, shape):
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    decoder = adapted(tmp_path, CASES[case], **SHAPES[shape])
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    sample = random_sample(30, seed=1)
    with torch.no_grad():
        expected = theirs(input_ids=sample.input_ids[None]).logits[0]
        found = hidden_states_of(decoder, [sample]) @ decoder.lm_head.weight.T
        plain = LlamaForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
        unadapted = plain(input_ids=sample.input_ids[None]).logits[0]
    assert_same(found, expected)
    assert (expected - unadapted).abs().max() > 0.1  # PEFT has taken them


def test_names_and_settings(tmp_path):
    """As PEFT's own save_pretrained writes them, without needing PEFT."""
    adapted(tmp_path, LORA, **SHAPES["grouped-query"])
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(tensors) == 2 * 7 * 2
    prefix = "base_model.model.model.layers.1"
    assert tensors[f"{prefix}.self_attn.k_proj.lora_A.weight"].shape == (4, 128)
    assert tensors[f"{prefix}.self_attn.k_proj.lora_B.weight"].shape == (128, 4)
    assert tensors[f"{prefix}.mlp.down_proj.lora_A.weight"].shape == (4, 160)
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert settings["r"] == 4 and settings["lora_alpha"] == 12.0
    assert settings["lora_dropout"] == 0.1 and settings["peft_type"] == "LORA"
    assert len(settings["target_modules"]) == 7
    assert settings["modules_to_save"] is None
