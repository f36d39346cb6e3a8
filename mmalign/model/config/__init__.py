"""Shapes of the decoder (decoder.py) and of the vision tower (vision.py)."""

from mmalign.model.config.decoder import LLAMA2_7B, OPENLLAMA_3B, DecoderConfig
from mmalign.model.config.vision import CLIP_VIT_L_14, CLIP_VIT_L_14_336, VisionConfig

__all__ = [
    "CLIP_VIT_L_14",
    "CLIP_VIT_L_14_336",
    "LLAMA2_7B",
    "OPENLLAMA_3B",
    "DecoderConfig",
    "VisionConfig",
]
