"""Shapes of the published models that the recipes are made for, for plans without their folders."""

from dataclasses import replace

from mmalign.config import TrainConfig
from mmalign.errors import UserError
from mmalign.model.config import DecoderConfig, VisionConfig
from mmalign.training.build import TOY_WORLD
from mmalign.training.flops import Workload
from mmalign.training.memory_table import workload_of

LLAMA2_7B = DecoderConfig(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
    head_dim=128,
    rms_norm_eps=1e-5,
    max_position_embeddings=4096,
)
OPEN_LLAMA_3B = DecoderConfig(
    vocab_size=32000,
    hidden_size=3200,
    intermediate_size=8640,
    num_hidden_layers=26,
    num_attention_heads=32,
    num_key_value_heads=32,
    head_dim=100,
)
CLIP_VIT_L_14 = VisionConfig(
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    image_size=224,
    patch_size=14,
)


def published_workload(config: TrainConfig, recipe: str) -> Workload:
    """Of the folders that are given, else of the models that the recipe names."""
    model = config.model
    if TOY_WORLD in (model.decoder, model.vision_tower):
        raise UserError(
            f"{recipe}: the toy world is made when it is first used, and fits every device. Give a "
            "recipe of a published model, or --model.decoder and --model.vision-tower"
        )
    if model.decoder and (model.vision_tower or config.data.text_only):
        return workload_of(config)
    if model.decoder or model.vision_tower:
        raise UserError("give both --model.decoder and --model.vision-tower, or none of them")
    decoder = OPEN_LLAMA_3B if "open-llama-3b" in recipe else LLAMA2_7B
    if config.data.text_only:
        return Workload(decoder, None, config.stage, config.lora)
    added = 3 if config.data.use_im_start_end else 1
    decoder = replace(decoder, vocab_size=decoder.vocab_size + added)
    return Workload(decoder, CLIP_VIT_L_14, config.stage, config.lora)
