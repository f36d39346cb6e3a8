"""The decoders of the LLaMA family: what config.json's model_type says of one.

To add a decoder, enter it here; tests/model/test_decoder_kinds.py compares every entry with
transformers.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class DecoderKind:
    """What distinguishes the decoders of one model_type."""

    architecture: str  # of transformers
    defaults: dict[str, int | None]  # of its config class
    to_hf: dict  # what config.json has besides the fields of DecoderConfig
    qkv_bias: bool = False
    qk_norm: bool = False  # RMSNorm of every head's queries and keys, before their rotation


_LLAMA = dict(
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
