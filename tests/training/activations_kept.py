"""Small models from their shapes alone, and what their forward pass keeps for the backward pass."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from mmalign.batch import IGNORE_INDEX, PackedBatch
from mmalign.config import DataConfig, LoraConfig, TrainConfig
from mmalign.data.templates import trains_image_tokens
from mmalign.model import recompute
from mmalign.model.config import DecoderConfig, VisionConfig
from mmalign.model.decoder import Decoder
from mmalign.model.layers import init_weights
from mmalign.model.llava import Llava
from mmalign.model.projector import ProjectorShape, make_projector
from mmalign.model.vision_tower import VisionTower

IMAGE_TOKENS = SimpleNamespace(image_token_id=500, im_start_id=501, im_end_id=502)


def decoder_config(**changes) -> DecoderConfig:
    shape = dict(
        vocab_size=503,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
    )
    return DecoderConfig(**(shape | changes))


VISION = VisionConfig(
    hidden_size=48,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=2,
    image_size=56,
    patch_size=14,
    layer_norm_eps=1e-5,
)


def small_model(decoder: DecoderConfig, config: TrainConfig) -> Llava:
    """Random weights, the same for the same shapes; what config.stage trains is marked."""
    if config.data.text_only:
        model = Llava(Decoder(decoder), None, None, IMAGE_TOKENS, config.shortcuts)
    else:
        shape = VISION.hidden_size, decoder.hidden_size, config.model.projector_type
        projector = make_projector(ProjectorShape(*shape))
        tower = VisionTower(VISION)
        model = Llava(Decoder(decoder), tower, projector, IMAGE_TOKENS, config.shortcuts)
    init_weights(model, seed=1)
    torch.manual_seed(0)
    model.set_trainable(config.stage, config.lora, trains_image_tokens(config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_b" in name:
                parameter.normal_(std=0.1)
    model.decoder.set_recompute(config.recompute, config.recompute_layers)
    return model


def train_config(stage: str = "finetune", rank: int = 0, **changes) -> TrainConfig:
    lora = LoraConfig(rank=rank, **changes.pop("lora", {}))
    data = DataConfig(**changes.pop("data", {}))
    return TrainConfig(stage=stage, lora=lora, data=data, precision="fp32", **changes)


def random_batch(lengths: tuple[int, ...], num_images: int, share: float = 0.5) -> PackedBatch:
    """Samples of random tokens, the first ones with an image at their front."""
    generator = torch.Generator().manual_seed(0)
    total, patches = sum(lengths), VISION.num_patches
    starts = torch.tensor([0, *lengths]).cumsum(0)
    input_ids = torch.randint(3, 500, (total,), generator=generator)
    rows = [torch.arange(patches) + starts[i] + 1 for i in range(num_images)]
    positions = torch.cat(rows) if rows else torch.empty(0, dtype=torch.int64)
    input_ids[positions] = IMAGE_TOKENS.image_token_id
    targets = torch.where(torch.rand(total, generator=generator) < share, input_ids, IGNORE_INDEX)
    targets[positions] = IGNORE_INDEX
    size = (num_images, 3, VISION.image_size, VISION.image_size)
    return PackedBatch(
        input_ids=input_ids,
        target_ids=targets,
        position_ids=torch.cat([torch.arange(n, dtype=torch.int32) for n in lengths]),
        cu_seqlens=starts.to(torch.int32),
        max_seqlen=max(lengths),
        num_loss_tokens=int((targets >= 0).sum()),
        pixel_values=torch.randint(0, 256, size, generator=generator, dtype=torch.uint8),
        image_positions=positions,
    )


class Saved:
    """Tensors that the graph keeps, each storage once; parameters and the batch left out."""

    def __init__(self, model: Llava, batch: PackedBatch):
        given = [*model.parameters(), *model.buffers(), *vars(batch).values()]
        self.others = {x.untyped_storage().data_ptr() for x in given if isinstance(x, Tensor)}
        self.tensors: dict[int, Tensor] = {}

    def see(self, x):
        if isinstance(x, Tensor) and x.numel():
            address = x.untyped_storage().data_ptr()
            if address not in self.others:
                self.tensors.setdefault(address, x)
        return x

    @property
    def bytes(self) -> int:
        return sum(x.untyped_storage().nbytes() for x in self.tensors.values())

    def shapes(self) -> list[tuple[int, ...]]:
        return sorted(tuple(x.shape) for x in self.tensors.values())


@contextmanager
def saving(model: Llava, batch: PackedBatch) -> Iterator[Saved]:
    """Inside, records what is kept, also where recompute.py has hooks of its own."""
    saved = Saved(model, batch)

    def inner(pack, unpack):
        return saved_tensors_hooks(lambda x: saved.see(pack(x)), unpack)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recompute, "saved_tensors_hooks", inner)
        with saved_tensors_hooks(saved.see, lambda x: x):
            yield saved
