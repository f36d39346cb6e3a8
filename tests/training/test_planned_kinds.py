"""Every kind of decoder, tower and projector in the FLOP model and the memory plan."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mmalign.config import ModelConfig, ProjectorType, TrainConfig
from mmalign.flops import Workload, forward_flops
from mmalign.model.config import DecoderConfig, VisionConfig
from mmalign.training.memory.activations import Activations, MicroBatch
from mmalign.training.memory.plan import MemoryPlan
from tests.model.kinds import KINDS, hf_decoder
from tests.model.test_tower_kinds import TOWER_KINDS, hf_tower

LENGTH, NUM_IMAGES = 9, 5
PROJECTORS: tuple[ProjectorType, ...] = ("linear", "mlp2x_gelu")


def planned_weights(workload: Workload) -> int:
    """Number of weights in the plan of a finetune."""
    model = ModelConfig(projector_type=workload.projector_type)
    config = TrainConfig("finetune", model=model, precision="fp32")
    sizes = MicroBatch(LENGTH, LENGTH, NUM_IMAGES)
    assert sum(Activations.from_config(workload, config, "cpu").saved(sizes, "none").values()) > 0
    return MemoryPlan(config, workload, 0, "cpu").fixed()["weights"] // 4


def products(theirs, *inputs) -> tuple[int, int]:
    """torch's count of products with weights, and of those in attention."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        theirs(*inputs)
    batched = {x: n.get(torch.ops.aten.bmm, 0) for x, n in counter.get_flop_counts().items()}
    # transformers 5.17 makes the table of angles with a product
    angles = sum(n for module, n in batched.items() if module.endswith(".rotary_emb"))
    return counter.get_total_flops() - batched["Global"], batched["Global"] - angles


@pytest.mark.parametrize("kind", KINDS)
def test_decoders(kind, tmp_path):
    theirs = hf_decoder(kind)
    theirs.set_attn_implementation("eager")
    theirs.save_pretrained(tmp_path)
    workload = Workload(DecoderConfig.from_hf(tmp_path))
    ours = forward_flops(workload, [LENGTH], LENGTH, 0)
    with_weights, attention = products(theirs, torch.arange(LENGTH)[None])
    assert ours.total - ours.attention == with_weights
    # eager attention multiplies the whole square, of which the causal part is counted here
    assert ours.attention == attention * (LENGTH + 1) / (2 * LENGTH)
    assert planned_weights(workload) == sum(p.numel() for p in theirs.parameters())


@pytest.mark.parametrize("projector", PROJECTORS)
@pytest.mark.parametrize("kind", TOWER_KINDS)
def test_towers_and_projectors(kind, projector, tmp_path):
    theirs = hf_tower(kind, **({} if kind.startswith("clip") else {"vision_use_head": False}))
    theirs.set_attn_implementation("eager")
    theirs.save_pretrained(tmp_path)
    vision = VisionConfig.from_hf(tmp_path)
    decoder = DecoderConfig(103, 64, 96, 2, 4, 2, 16)
    text, whole = Workload(decoder), Workload(decoder, vision, projector_type=projector)
    hidden = vision.hidden_size
    layers = [torch.nn.Linear(hidden, 64)]
    layers += [torch.nn.GELU(), torch.nn.Linear(64, 64)] if projector == "mlp2x_gelu" else []
    parameters = (*theirs.parameters(), *torch.nn.ModuleList(layers).parameters())
    weights = sum(p.numel() for p in parameters)
    assert planned_weights(whole) - planned_weights(text) == weights
    theirs.encoder.layers.pop(-1)  # the projector reads the output of the layer before
    pixels = torch.randn(NUM_IMAGES, 3, vision.image_size, vision.image_size)
    with_weights, attention = products(theirs, pixels)
    ours = forward_flops(whole, [], 0, NUM_IMAGES)
    assert (ours.tower, ours.tower_attention) == (with_weights, attention)
    rows = torch.randn(NUM_IMAGES * vision.num_patches, hidden)
    assert ours.projector == products(torch.nn.Sequential(*layers), rows)[0]
