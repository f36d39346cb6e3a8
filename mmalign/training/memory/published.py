"""What a recipe trains where no folders of models are given: the published ones."""

from dataclasses import replace

from mmalign.config import TrainConfig
from mmalign.errors import UserError
from mmalign.flops import Workload
from mmalign.model.config import CLIP_VIT_L_14, LLAMA2_7B, OPENLLAMA_3B
from mmalign.training.build import TOY_WORLD
from mmalign.training.memory.table import workload_of


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
    decoder = OPENLLAMA_3B if "open-llama-3b" in recipe else LLAMA2_7B
    if config.data.text_only:
        return Workload(decoder, None, config.stage, config.lora)
    added = 3 if config.data.use_im_start_end else 1
    decoder = replace(decoder, vocab_size=decoder.vocab_size + added)
    return Workload(decoder, CLIP_VIT_L_14, config.stage, config.lora)
