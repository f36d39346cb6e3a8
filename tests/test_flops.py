"""The FLOP model against torch's counter on Hugging Face's modules, and its figures for 7B."""

from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from mmalign.config import DataConfig, LoraConfig, TrainConfig
from mmalign.flops import (
    Workload,
    batch_flops,
    forward_flops,
    model_flops,
    peak_bf16_flops,
)
from mmalign.model.config import DecoderConfig, VisionConfig
from mmalign.model.projector import ProjectorShape
from tests.model import tiny

DECODER = dict(
    vocab_size=103,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=24,
)
VISION = dict(
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=3,
    image_size=28,
    patch_size=14,
)
LLAMA2_7B = DecoderConfig(32000, 4096, 11008, 32, 32, 32, 128)
CLIP_VIT_L = VisionConfig(1024, 4096, 24, 16, 224, 14)
SAMPLES = [(9, 0, 4), (1, 0, 0), (17, 1, 6), (12, 1, 11)]  # tokens, images, supervised rows


class Adapted(nn.Module):
    """LoRA as its paper writes it."""

    def __init__(self, base: nn.Linear, rank: int):
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, rank, bias=False).requires_grad_(True)
        self.up = nn.Linear(rank, base.out_features, bias=False).requires_grad_(True)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def counted_flops(workload: Workload, samples) -> Counter:
    """torch's count by ATen operation: Hugging Face's modules, one sample after the other."""
    llama = LlamaForCausalLM._from_config(LlamaConfig(**DECODER), attn_implementation="eager")
    llama.requires_grad_(workload.trains_decoder)
    if workload.adapter_rank:
        for layer in llama.model.layers:
            for part in (layer.self_attn, layer.mlp):
                for name, module in list(part.named_children()):
                    if isinstance(module, nn.Linear):
                        setattr(part, name, Adapted(module, workload.adapter_rank))
    for table in (llama.get_input_embeddings(), llama.get_output_embeddings()):
        table.requires_grad_(workload.trains_embeddings)
    clip = CLIPVisionModel(CLIPVisionConfig(**VISION)).requires_grad_(False)
    clip.encoder.layers.pop(-1)  # LLaVA reads the output of the layer before
    projector = nn.Linear(VISION["hidden_size"], DECODER["hidden_size"])
    projector.requires_grad_(workload.vision is not None)
    with FlopCounterMode(display=False) as counter:
        for tokens, images, supervised in samples:
            hidden = llama.model.embed_tokens(torch.arange(tokens))
            if images and workload.vision:
                features = (
                    clip(torch.randn(images, 3, 28, 28)).last_hidden_state[:, 1:].flatten(0, 1)
                )
                hidden = torch.cat([projector(features), hidden[len(features) :]])
            elif workload.vision:  # some other sample of the batch has an image
                hidden = hidden.detach().requires_grad_()
            output = llama.model(inputs_embeds=hidden[None]).last_hidden_state[0]
            if supervised:
                llama.lm_head(output[:supervised]).sum().backward()
            else:  # its rows are in the packed batch and get gradients of zero
                (output * 0).sum().backward()
    counts = counter.get_flop_counts()["Global"]
    return Counter({str(operation).split(".")[-1]: count for operation, count in counts.items()})


WORKLOADS = {
    "pretrain": ("pretrain", 0, False, True),
    "finetune": ("finetune", 0, False, True),
    "finetune text only": ("finetune", 0, False, False),
    "lora": ("finetune", 4, False, True),
    "lora with embeddings": ("finetune", 4, True, True),
    "lora text only": ("finetune", 4, False, False),
    "lora text only with embeddings": ("finetune", 4, True, False),
}


@pytest.mark.parametrize("name", WORKLOADS)
def test_equals_the_count_of_torch(name):
    stage, rank, train_embeddings, images = WORKLOADS[name]
    vision = VisionConfig(**VISION) if images else None
    lora = LoraConfig(rank=rank, train_embeddings=train_embeddings)
    workload = Workload(DecoderConfig(**DECODER), vision, stage, lora)
    samples = SAMPLES if images else [(tokens, 0, rows) for tokens, _, rows in SAMPLES]
    lengths, num_images, num_loss_tokens = (list(column) for column in zip(*samples, strict=True))
    ours = model_flops(workload, lengths, sum(num_loss_tokens), sum(num_images))
    counted = counted_flops(workload, samples)

    products = counted["mm"] + counted["addmm"] + counted["convolution"]
    assert ours.total - ours.attention - ours.tower_attention == products
    # eager attention multiplies whole squares, 2 products forward and 4 backward; ours counts the
    # causal half with its diagonal, 2 forward and 5 backward; the tower's squares are whole
    square = sum(length**2 for length in lengths)
    triangle = sum(length * (length + 1) // 2 for length in lengths)
    decoder_products = counted["bmm"] / 6 / square * 7 * triangle
    assert ours.attention == pytest.approx(decoder_products, rel=1e-12)


def test_tower_attention_equals_the_count_of_torch():
    vision = VisionConfig(**VISION)
    clip = CLIPVisionModel._from_config(CLIPVisionConfig(**VISION), attn_implementation="eager")
    clip.encoder.layers.pop(-1)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        clip(torch.randn(5, 3, 28, 28))
    ours = forward_flops(Workload(DecoderConfig(**DECODER), vision), [], 0, 5)
    assert ours.tower_attention == counter.get_flop_counts()["Global"][torch.ops.aten.bmm]
    assert ours.tower + ours.tower_attention == counter.get_total_flops()


def test_projector_of_two_layers_equals_the_count_of_torch():
    shape = ProjectorShape(48, 64, "mlp2x_gelu")
    layers = torch.nn.Linear(48, 64), torch.nn.GELU(), torch.nn.Linear(64, 64)
    with FlopCounterMode(display=False) as counter:
        projected = torch.nn.Sequential(*layers)(torch.randn(7, 48))
        assert shape.flops(7, backward=False) == counter.get_total_flops()
        projected.sum().backward()
    assert shape.flops(7, backward=True) == counter.get_total_flops()


def test_figures_of_llama2_7b():
    one = forward_flops(Workload(LLAMA2_7B, CLIP_VIT_L), [1], 1, 1)
    assert one.projections / 1e9 == pytest.approx(12.95, abs=0.005)
    assert one.lm_head / 1e9 == pytest.approx(0.262, abs=0.0005)
    assert (one.tower + one.tower_attention) / 1e9 == pytest.approx(155, abs=0.5)
    assert one.projector / 1e9 == pytest.approx(2.1, abs=0.05)
    whole = forward_flops(Workload(LLAMA2_7B), [550], 0, 0)
    assert whole.attention == 550 * 262_144 * 551  # 262,144 a token and key, its own included
    # TFLOP a sample, with one image each
    stage_1 = model_flops(Workload(LLAMA2_7B, CLIP_VIT_L, "pretrain"), [300], 22, 1)
    assert stage_1.total / 1e12 == pytest.approx(8.02, abs=0.01)
    stage_2 = model_flops(Workload(LLAMA2_7B, CLIP_VIT_L, "finetune"), [550], 242, 1)
    assert stage_2.total / 1e12 == pytest.approx(22.00, abs=0.02)
    assert stage_1.projections == 2 * 300 * one.projections
    assert stage_2.projections == 3 * 550 * one.projections


def test_packed_batch_and_trained_model(tmp_path):
    """from_config agrees with set_trainable; batch_flops reads the batch as it is packed."""
    model = tiny.ours(tiny.hf_llava(**tiny.GROUPED_QUERY), tmp_path)
    samples = tiny.mixed_samples()
    config = TrainConfig("finetune", data=DataConfig(), lora=LoraConfig(rank=2))
    model.set_trainable(config.stage, config.lora, train_image_tokens=False)
    shapes = model.decoder.config, model.vision_tower.config
    workload = Workload.from_config(config, *shapes)
    adapters = sum(p.numel() for n, p in model.trainable_parameters().items() if "lora" in n)
    flops = batch_flops(workload, tiny.pack(samples))
    lengths = [len(sample.input_ids) for sample in samples]
    assert flops.adapters == 6 * adapters * sum(lengths)
    targets = sum(int((sample.labels[1:] != -100).sum()) for sample in samples)
    assert flops == model_flops(workload, lengths, targets, 4)


def test_linear_layers_are_four_and_six_operations_a_weight():
    for stage, operations in (("pretrain", 4), ("finetune", 6)):
        workload = Workload(LLAMA2_7B, None, stage)
        weights = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
        assert model_flops(workload, [7], 0, 0).projections == operations * 7 * weights


def test_peaks_by_device_name():
    assert peak_bf16_flops("NVIDIA H100 80GB HBM3") == 989.4e12
    assert peak_bf16_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_bf16_flops("NVIDIA H200") == 989.4e12
    assert peak_bf16_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_bf16_flops("NVIDIA GeForce RTX 4090") == 165.2e12
    assert peak_bf16_flops("NVIDIA B200") == 2250e12
    assert peak_bf16_flops("NVIDIA GH200 480GB") == 989.4e12
    for unknown in ("NVIDIA H20", "Tesla V100-SXM2-16GB", "AMD Instinct MI300X"):
        assert peak_bf16_flops(unknown) is None
