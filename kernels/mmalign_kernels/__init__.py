"""The operations of the model on packed tokens.

One file per operation declares it: schema, fake kernel, gradient, public function. The folders
`reference`, `triton`, `cuda` and `libraries` implement it under the same file name; dispatch.py
chooses one; operation.py is how an operation is declared; costs/ counts bytes and FLOPs.
"""

from .adamw import adamw_step
from .full_attention import full_attention
from .layer_norm import layer_norm
from .linear_cross_entropy import linear_cross_entropy
from .packing import pack_rows, unpack_rows
from .prefix_attention import prefix_attention
from .projector import project_image_features
from .quick_gelu import quick_gelu
from .reference.linear import adding_to_gradients, linear
from .rms_norm import add_rms_norm, rms_norm
from .rotary_attention import rotary_attention
from .shared_prefix_attention import shared_prefix_attention
from .swiglu import swiglu
from .target_logprobs import target_logprobs

__all__ = [
    "adamw_step",
    "add_rms_norm",
    "adding_to_gradients",
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
