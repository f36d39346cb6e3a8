"""From a configuration to what the loop needs: paths filled in, dataset, model."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from mmalign.config import TrainConfig
from mmalign.data.dataset import ConversationDataset
from mmalign.data.samples import read_samples
from mmalign.errors import UserError
from mmalign.flops import Workload
from mmalign.model.config import DecoderConfig, VisionConfig
from mmalign.model.hf import load_decoder, load_projector, load_vision_tower
from mmalign.model.llava import Llava
from mmalign.model.projector import Projector
from mmalign.system import DTYPES
from mmalign.tokenizer import Tokenizer
from mmalign.toy_world import toy_world
from mmalign.training.shortcuts import needed_flops

log = logging.getLogger("mmalign")
TOY_WORLD = "toy-world"  # as a path in a recipe: the built-in toy world's


def resolve(config: TrainConfig) -> TrainConfig:
    """Fills in what a recipe leaves open; raises UserError for what the user has to give."""
    model, data, evaluation = config.model, config.data, config.evaluation
    if data.text_only:
        if config.stage == "pretrain":
            raise UserError("stage pretrain trains the projector; data.text_only leaves no image")
        model = replace(model, vision_tower="", projector="")
        data = replace(data, image_root="")
    paths = (model.decoder, model.vision_tower, data.path, data.image_root, evaluation.data_root)
    if TOY_WORLD in paths:
        world = toy_world()
        toy_json = world.pretrain_json if config.stage == "pretrain" else world.finetune_json
        model = replace(
            model,
            decoder=_fill(model.decoder, world.decoder),
            vision_tower=_fill(model.vision_tower, world.vision_tower),
        )
        data = replace(
            data,
            path=_fill(data.path, toy_json),
            image_root=_fill(data.image_root, world.image_root),
        )
        data_root = _fill(evaluation.data_root, world.evaluation)
        evaluation = replace(evaluation, data_root=data_root)
    required = {"--model.decoder": model.decoder, "--data.path": data.path}
    if not data.text_only:
        required["--model.vision-tower"] = model.vision_tower
        required["--data.image-root"] = data.image_root
    missing = [flag for flag, value in required.items() if not value]
    if missing:
        raise UserError(
            f"this recipe needs {', '.join(missing)}. The README says where to get them."
        )
    model = replace(model, tokenizer=model.tokenizer or model.decoder)
    return replace(config, model=model, data=data, evaluation=evaluation)


def _fill(value: str, toy_path: Path) -> str:
    return str(toy_path) if value == TOY_WORLD else value


def build_dataset(config: TrainConfig, tokenizer: Tokenizer) -> ConversationDataset:
    samples, text_only = read_samples(config.data.path, config.data), config.data.text_only
    vision = None if text_only else VisionConfig.from_hf(config.model.vision_tower)
    return ConversationDataset(samples, tokenizer, config.data, vision)


def sample_cost(config: TrainConfig, prefix_length: int) -> Callable[[int, int, int], int]:
    """(tokens, targets, images) of a sample -> FLOPs that its training takes with the shortcuts.

    From configurations alone. prefix_length: as in PackedBatch; it counts among the tokens.
    """
    vision = None if config.data.text_only else VisionConfig.from_hf(config.model.vision_tower)
    decoder = DecoderConfig.from_hf(config.model.decoder)
    workload = Workload(decoder, vision, config.stage, config.lora)

    def cost(num_tokens: int, num_loss_tokens: int, num_images: int) -> int:
        sample = [num_tokens], num_loss_tokens, num_images
        return needed_flops(workload, config.shortcuts, *sample, prefix_length).total

    return cost


def build_model(config: TrainConfig, tokenizer: Tokenizer, prefix_ids: Sequence[int] = ()) -> Llava:
    """The model with its pre-trained weights and with what the stage trains marked."""
    dtype, options = DTYPES[config.precision], (tokenizer, config.shortcuts, prefix_ids)
    if config.data.text_only:
        decoder = load_decoder(config.model.decoder, dtype)
        model = Llava(decoder, None, None, *options)
    else:
        decoder = load_decoder(
            config.model.decoder, dtype, num_added_tokens=_num_missing_rows(config, tokenizer)
        )
        tower = load_vision_tower(config.model.vision_tower, dtype)
        projector = Projector(tower.config.hidden_size, decoder.config.hidden_size).to(dtype)
        model = Llava(decoder, tower, projector, *options)
        if config.model.projector:
            model.load_projector(load_projector(config.model.projector))
        elif config.stage == "finetune":
            log.warning("no --model.projector: stage 2 starts with an untrained projector")
    model.set_trainable(config.stage, config.lora, config.trains_image_tokens)
    model.decoder.set_recompute(config.recompute, config.recompute_layers)
    return model


def _num_missing_rows(config: TrainConfig, tokenizer: Tokenizer) -> int:
    """Rows of image tokens that the decoder's vocabulary lacks; an export of ours has them."""
    added = tokenizer.num_image_tokens_added(config.data.use_im_start_end)
    vocab_size = DecoderConfig.from_hf(config.model.decoder).vocab_size
    return max(0, tokenizer.vocab_size + added - vocab_size)
