"""The operations of the model on packed tokens."""

from .adamw import adamw_step
from .attention import full_attention
from .attention_prefix import prefix_attention
from .linear import linear
from .linear_cross_entropy import linear_cross_entropy
from .packing import pack_rows, unpack_rows
from .projector import project_image_features
from .rms_norm import add_rms_norm, rms_norm
from .rotary import rotary_attention
from .shared_prefix import shared_prefix_attention
from .swiglu import swiglu
from .target_logprobs import target_logprobs
from .vision import layer_norm, quick_gelu

__all__ = [
    "adamw_step",
    "add_rms_norm",
    "full_attention",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "pack_rows",
    "prefix_attention",
    "project_image_features",
    "quick_gelu",
    "rms_norm",
    "rotary_attention",
    "shared_prefix_attention",
    "swiglu",
    "target_logprobs",
    "unpack_rows",
]
