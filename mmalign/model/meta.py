"""The whole model on the meta device: shapes without weights, for launches without data."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from mmalign.config import ProjectorType, ShortcutConfig
from mmalign.model.config import DecoderConfig, VisionConfig
from mmalign.model.decoder import Decoder
from mmalign.model.llava import ALL_SHORTCUTS, Llava
from mmalign.model.projector import ProjectorShape, make_projector
from mmalign.model.vision_tower import VisionTower

IMAGE_TOKEN, IM_START, IM_END = range(3)  # any rows of the vocabulary


def llava_on_meta(
    decoder_config: DecoderConfig,
    vision: VisionConfig | None,
    projector_type: ProjectorType,
    dtype: torch.dtype,
    shortcuts: ShortcutConfig = ALL_SHORTCUTS,
    prefix_ids: Sequence[int] = (),
) -> Llava:
    """vision: None is the decoder alone."""
    tokens: Any = SimpleNamespace(
        image_token_id=IMAGE_TOKEN, im_start_id=IM_START, im_end_id=IM_END
    )
    with torch.device("meta"):
        tower, projector, newline = None, None, None
        if vision:
            tower = VisionTower(vision)
            shape = ProjectorShape(vision.hidden_size, decoder_config.hidden_size, projector_type)
            projector = make_projector(shape)
            if vision.grids:
                newline = nn.Parameter(torch.empty(decoder_config.hidden_size))
        llava = Llava(Decoder(decoder_config), tower, projector, tokens, shortcuts, prefix_ids)
        llava.image_newline = newline
    return llava.to("meta", dtype)
