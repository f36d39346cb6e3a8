"""LoRA against seven separate adapters on transformers' own linear layers."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mmalign.config import LoraConfig
from mmalign.errors import UserError
from mmalign.model.hf import load_decoder
from mmalign.model.hf.names import decoder_parts
from mmalign.model.layers import Linear
from mmalign.model.lora import LoraLinear, add_lora, merge_lora
from tests.model.tiny import (
    GROUPED_QUERY,
    SHAPES,
    assert_same,
    hf_llama,
    hf_loss_sum,
    hidden_states_of,
    loss_of,
    text_samples,
)

ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CONFIG = LoraConfig(rank=4, alpha=12.0, dropout=0.0)


class PlainAdapter(nn.Module):
    """PEFT's formula, written out: W x + (alpha / r) B A x."""

    def __init__(self, linear: nn.Linear, a: torch.Tensor, b: torch.Tensor):
        super().__init__()
        self.linear, self.scaling = linear, CONFIG.alpha / CONFIG.rank
        self.a, self.b = nn.Parameter(a.detach().clone()), nn.Parameter(b.detach().clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + self.scaling * (x @ self.a.T) @ self.b.T


def adapted_models(folder, theirs):
    """Ours with random adapters, and the model of transformers with the same ones one by one."""
    theirs.save_pretrained(folder)
    decoder = load_decoder(folder)
    torch.manual_seed(3)
    add_lora(decoder, CONFIG)
    for name, parameter in decoder.named_parameters():
        if "lora_b" in name:
            nn.init.normal_(parameter, std=0.3)
    pairs = []  # (ours a, ours b, theirs)
    for layer, hf_layer in zip(decoder.layers, theirs.model.layers, strict=True):
        adapters = [
            pair
            for fused in (layer.qkv_proj, layer.o_proj, layer.gate_up_proj, layer.down_proj)
            for pair in zip(fused.lora_a, fused.lora_b, strict=True)
        ]
        assert len(adapters) == 7
        for name, (a, b) in zip(ADAPTED, adapters, strict=True):
            owner = hf_layer.self_attn if hasattr(hf_layer.self_attn, name) else hf_layer.mlp
            setattr(owner, name, PlainAdapter(getattr(owner, name), a, b))
            pairs.append((a, b, getattr(owner, name)))
    return decoder, theirs, pairs


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_equals_seven_adapters(tmp_path, shape):
    decoder, theirs, pairs = adapted_models(tmp_path, hf_llama(**shape))
    loss = loss_of(decoder, text_samples())
    expected = hf_loss_sum(theirs, text_samples())
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    loss.backward()
    expected.backward()
    for a, b, adapter in pairs:
        assert_same(a.grad, adapter.a.grad)
        assert_same(b.grad, adapter.b.grad)


def test_merge_equals_the_adapted_model(tmp_path):
    decoder, theirs, pairs = adapted_models(tmp_path, hf_llama(**GROUPED_QUERY))
    with torch.no_grad():
        adapted = hidden_states_of(decoder, text_samples())
        merge_lora(decoder)
        merged = hidden_states_of(decoder, text_samples())
    torch.testing.assert_close(merged, adapted, rtol=1e-4, atol=1e-4)
    assert not any(isinstance(m, LoraLinear) for m in decoder.modules())
    assert not any("lora" in name for name, _ in decoder.named_parameters())
    hf_weight = pairs[1][2]  # k_proj of the first layer
    expected = hf_weight.linear.weight + hf_weight.scaling * hf_weight.b @ hf_weight.a
    part = decoder_parts(decoder.config)["model.layers.0.self_attn.k_proj.weight"]
    merged_rows = decoder.get_parameter(part.parameter)[part.rows]
    torch.testing.assert_close(merged_rows, expected, rtol=1e-5, atol=1e-6)


def test_starts_as_the_base_model_with_pefts_distribution(tmp_path):
    hf_llama(**GROUPED_QUERY).save_pretrained(tmp_path)
    decoder = load_decoder(tmp_path)
    with torch.no_grad():
        before = hidden_states_of(decoder, text_samples())
        torch.manual_seed(0)
        add_lora(decoder, LoraConfig(rank=64))
        assert torch.equal(hidden_states_of(decoder.eval(), text_samples()), before)
    for name, parameter in decoder.named_parameters():
        if "lora_a" in name:  # kaiming_uniform(a=sqrt(5)): uniform within 1 / sqrt(in_features)
            bound = parameter.shape[1] ** -0.5
            assert 0.98 * bound < parameter.abs().max() <= bound
            assert abs(parameter.std() - bound / 3**0.5) < 0.03 * bound


def test_number_of_parameters_of_the_released_adapters():
    """r 64 on LLaMA-7B: 159,907,840 parameters, as the published adapter files hold."""
    shapes = [(4096, (4096,) * 3), (4096, (4096,)), (4096, (11008,) * 2), (11008, (4096,))]
    with torch.device("meta"):
        count = 0
        for in_features, parts in shapes:
            linear = Linear(in_features, sum(parts))
            named = {f"{i}_proj": size for i, size in zip("qkv", parts, strict=False)}
            adapted = LoraLinear(linear, named, LoraConfig(rank=64))
            count += sum(p.numel() for p in (*adapted.lora_a, *adapted.lora_b))
    assert count * 32 == 159_907_840


def test_every_part_has_its_own_dropout_mask():
    torch.manual_seed(0)
    linear = Linear(32, 24)
    nn.init.normal_(linear.weight)
    adapted = LoraLinear(
        linear, {"q_proj": 16, "k_proj": 8}, LoraConfig(rank=4, alpha=8.0, dropout=0.5)
    )
    for b in adapted.lora_b:
        nn.init.normal_(b)
    x = torch.randn(10, 32)
    torch.manual_seed(1)
    y = adapted.train()(x)
    torch.manual_seed(1)
    updates = [
        F.dropout(x, 0.5) @ a.T @ b.T for a, b in zip(adapted.lora_a, adapted.lora_b, strict=True)
    ]
    torch.testing.assert_close(y, x @ linear.weight.T + 2.0 * torch.cat(updates, 1))
    expected = x @ adapted.merged_weight().T
    torch.testing.assert_close(adapted.eval()(x), expected, rtol=1e-4, atol=1e-4)


def test_merge_in_bf16_rounds_once():
    torch.manual_seed(0)
    linear = Linear(64, 32)
    nn.init.normal_(linear.weight)
    linear.to(torch.bfloat16)
    adapted = LoraLinear(linear, {"o_proj": 32}, CONFIG)
    nn.init.normal_(adapted.lora_b[0])
    weight, a, b = (
        p.detach().double() for p in (linear.weight, adapted.lora_a[0], adapted.lora_b[0])
    )
    exact = (weight + 3.0 * b @ a).to(torch.bfloat16)
    assert torch.equal(adapted.merged_weight(), exact)


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("k_proj", "up_proj", "down_proj")])
def test_some_targets_are_the_others_without_their_adapters(targets, tmp_path):
    """As all seven with the product of every other one set to zero; nothing else has parameters."""
    hf_llama(**GROUPED_QUERY).save_pretrained(tmp_path)
    every, some = load_decoder(tmp_path), load_decoder(tmp_path)
    add_lora(every, CONFIG)
    add_lora(some, replace(CONFIG, targets=targets))
    for layer, reduced in zip(every.layers, some.layers, strict=True):
        for name, module in layer.named_children():
            if not isinstance(module, LoraLinear):
                continue
            for target, a, b in zip(module.adapted, module.lora_a, module.lora_b, strict=True):
                nn.init.normal_(b, std=0.3 if target in targets else 0.0)
                theirs = getattr(reduced, name)
                if target in targets:
                    place = theirs.adapted.index(target)
                    theirs.lora_a[place].data.copy_(a)
                    theirs.lora_b[place].data.copy_(b)
    num_adapted = sum("lora_a" in name for name, _ in some.named_parameters())
    assert num_adapted == len(targets) * len(some.layers)
    expected, found = (loss_of(x, text_samples()) for x in (every, some))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    rows = torch.tensor([1, 4, 30])
    found, expected = (
        layer.qkv_proj.forward_rows(torch.ones(40, 128), rows, layer.o_proj.weight.shape[1])
        if isinstance(layer.qkv_proj, LoraLinear)
        else None
        for layer in (some.layers[0], every.layers[0])
    )
    assert_same(found, expected)
    with torch.no_grad():
        before = hidden_states_of(some, text_samples())
        merge_lora(some)
        torch.testing.assert_close(
            hidden_states_of(some, text_samples()), before, rtol=1e-4, atol=1e-4
        )


def test_a_rank_needs_a_target(tmp_path):
    hf_llama(**GROUPED_QUERY).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="--lora.targets names no projection"):
        add_lora(load_decoder(tmp_path), LoraConfig(rank=4, targets=()))
