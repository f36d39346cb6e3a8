"""Attention after a shared prefix: the own keys by csrc/cpu, the prefix in plain PyTorch."""

from functools import partial

from ..reference import shared_prefix_attention as reference
from . import rotary_attention

shared_prefix_attention_fwd = partial(
    reference.shared_prefix_attention_fwd, backend=rotary_attention
)
shared_prefix_attention_bwd = partial(
    reference.shared_prefix_attention_bwd, backend=rotary_attention
)
