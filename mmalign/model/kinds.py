"""Decoders of the LLaMA family and vision towers: what config.json's model_type says of one.

To add one, enter it here; tests/model/test_decoder_kinds.py and test_tower_kinds.py compare every
entry with its class in transformers.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class DecoderKind:
    """What distinguishes the decoders of one model_type."""

    architecture: str  # of transformers
    defaults: dict[str, Any]  # of its config class
    to_hf: dict  # what config.json has besides the fields of DecoderConfig
    qkv_bias: bool = False
    qk_norm: bool = False  # RMSNorm of every head's queries and keys, before their rotation


_LLAMA: dict[str, Any] = dict(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=None,
    head_dim=None,
    max_position_embeddings=2048,
    bos_token_id=1,
    eos_token_id=2,
)
_MISTRAL = _LLAMA | dict(
    intermediate_size=14336,
    num_key_value_heads=8,
    max_position_embeddings=2**17,
    sliding_window=4096,
)
_QWEN = _LLAMA | dict(
    vocab_size=151936,
    intermediate_size=22016,
    num_key_value_heads=32,
    max_position_embeddings=32768,
    bos_token_id=None,
    eos_token_id=None,
)
_NO_BIAS = {"attention_bias": False}
DECODERS = {
    "llama": DecoderKind("LlamaForCausalLM", _LLAMA, _NO_BIAS | {"mlp_bias": False}),
    "mistral": DecoderKind("MistralForCausalLM", _MISTRAL, {}),
    "qwen2": DecoderKind("Qwen2ForCausalLM", _QWEN, {"use_sliding_window": False}, qkv_bias=True),
    "qwen3": DecoderKind(
        "Qwen3ForCausalLM",
        _QWEN | {"head_dim": 128},
        _NO_BIAS | {"use_sliding_window": False},
        qk_norm=True,
    ),
}


@dataclass(frozen=True)
class TowerKind:
    """What distinguishes the vision towers of one model_type."""

    architecture: str  # of transformers
    of_model: str  # model_type of the folder with image and text tower
    defaults: dict[str, int]  # of its config class
    layer_norm_eps: float
    hidden_act: str
    hidden_acts: tuple[str, ...]  # that published ones have
    is_clip: bool  # class token and pre_layrnorm, and no bias of the patch embedding


_VIT_B = dict(
    hidden_size=768,
    intermediate_size=3072,
    num_hidden_layers=12,
    num_attention_heads=12,
    image_size=224,
)
TOWERS = {
    "clip_vision_model": TowerKind(
        "CLIPVisionModel",
        "clip",
        _VIT_B | {"patch_size": 32},
        layer_norm_eps=1e-5,
        hidden_act="quick_gelu",
        hidden_acts=("quick_gelu", "gelu"),  # OpenAI's, LAION's
        is_clip=True,
    ),
    "siglip_vision_model": TowerKind(
        "SiglipVisionModel",
        "siglip",
        _VIT_B | {"patch_size": 16},
        layer_norm_eps=1e-6,
        hidden_act="gelu_pytorch_tanh",
        hidden_acts=("gelu_pytorch_tanh",),
        is_clip=False,
    ),
}
