"""The operations of the model on packed tokens."""

from .reference import (
    adamw_step,
    add_rms_norm,
    full_attention,
    layer_norm,
    linear_cross_entropy,
    pack_rows,
    project_image_features,
    quick_gelu,
    rms_norm,
    rotary_attention,
    swiglu,
    target_logprobs,
    unpack_rows,
)

__all__ = [
    "adamw_step",
    "add_rms_norm",
    "full_attention",
    "layer_norm",
    "linear_cross_entropy",
    "pack_rows",
    "project_image_features",
    "quick_gelu",
    "rms_norm",
    "rotary_attention",
    "swiglu",
    "target_logprobs",
    "unpack_rows",
]
