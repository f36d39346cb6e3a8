"""Small random decoders of every kind that people have, made by transformers."""

import transformers
from transformers import PreTrainedModel

from tests.model.tiny import VOCAB_SIZE, randomize

SIZES = dict(
    vocab_size=VOCAB_SIZE,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=32,  # shorter than the longest sample
    bos_token_id=1,
    eos_token_id=2,
)
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 8,
}


def _rope(kind: str, **values) -> dict:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4} | values}


KINDS = {  # class of transformers without "Config", and settings
    "llama-3": ("Llama", _rope("default", rope_theta=5e5)),
    "llama-3.1": ("Llama", {"rope_parameters": LLAMA3}),
    "llama-3.2": ("Llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "smollm2": (
        "Llama",
        _rope("default", rope_theta=1e5)
        | dict(hidden_size=72, num_attention_heads=9, num_key_value_heads=3)
        | dict(tie_word_embeddings=True, rms_norm_eps=1e-5),
    ),
    "llama-linear": ("Llama", _rope("linear", factor=2.0)),
    "llama-dynamic": ("Llama", _rope("dynamic", factor=2.0) | dict(max_position_embeddings=64)),
    "llama-yarn": ("Llama", {"rope_parameters": YARN}),
    "mistral": ("Mistral", dict(sliding_window=None, head_dim=24)),
    "mistral-window": ("Mistral", dict(sliding_window=64)),
    "qwen2": ("Qwen2", dict(tie_word_embeddings=True)),
    "qwen2.5-yarn": ("Qwen2", {"rope_parameters": YARN | {"rope_theta": 1e6}}),
    "qwen3": ("Qwen3", dict(head_dim=32)),
    "qwen3-tied": ("Qwen3", dict(head_dim=16, tie_word_embeddings=True)),
}


def hf_decoder(kind: str, **changes) -> PreTrainedModel:
    name, settings = KINDS[kind]
    config = getattr(transformers, f"{name}Config")(**(SIZES | settings | changes))
    return randomize(getattr(transformers, f"{name}ForCausalLM")(config))
