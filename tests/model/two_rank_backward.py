"""One of two processes of a data-parallel backward pass. Imports no oracle, so it starts fast."""

import torch
from torch.nn.parallel import DistributedDataParallel

from mmalign.batch import PackedBatch
from mmalign.config import TrainConfig
from mmalign.data.templates import trains_image_tokens
from mmalign.model.config import DecoderConfig, VisionConfig
from mmalign.model.decoder import Decoder
from mmalign.model.layers import init_weights
from mmalign.model.llava import ImageTokens, Llava
from mmalign.model.projector import Projector
from mmalign.model.vision_tower import VisionTower


def tiny_llava(tokenizer: ImageTokens, config: TrainConfig) -> Llava:
    decoder = Decoder(DecoderConfig(103, 64, 96, 2, 4, 2, 16))
    tower = VisionTower(VisionConfig(48, 80, 2, 3, 28, 14))
    model = Llava(decoder, tower, Projector(48, 64), tokenizer)
    init_weights(model, seed=0)
    torch.manual_seed(0)  # the adapters' draw
    model.set_trainable(config.stage, config.lora, trains_image_tokens(config))
    return model


def backward(
    rank: int,
    folder: str,
    tokenizer: ImageTokens,
    config: TrainConfig,
    batches: list[PackedBatch],
) -> None:
    """Rank `rank` takes its batch; rank 0 writes the averaged gradients to folder."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    model = tiny_llava(tokenizer, config)
    replica = DistributedDataParallel(model)
    replica(batches[rank]).backward()
    if rank == 0:
        gradients = {name: p.grad for name, p in model.trainable_parameters().items()}
        torch.save(gradients, f"{folder}/gradients.pt")
    torch.distributed.destroy_process_group()
