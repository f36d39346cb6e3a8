"""Which Hugging Face tensor is which rows of which parameter here.

The only place that knows about fused weights: q, k, v share qkv_proj and gate, up share
gate_up_proj.
"""

from typing import NamedTuple

from mmalign.model.config import DecoderConfig, VisionConfig


class Part(NamedTuple):
    """The rows of a parameter that one Hugging Face tensor holds."""

    parameter: str
    rows: slice
    shape: tuple[int, ...]  # of the Hugging Face tensor


def decoder_parts(config: DecoderConfig) -> dict[str, Part]:
    """Tensors of a causal language model of transformers; without lm_head where it is tied."""
    hidden, intermediate = config.hidden_size, config.intermediate_size
    vocabulary = (config.vocab_size, hidden)
    parts = {"model.embed_tokens.weight": _whole("embed_tokens.weight", *vocabulary)}
    for i in range(config.num_hidden_layers):
        ours, theirs = f"layers.{i}.", f"model.layers.{i}."
        for norm in ("input_layernorm.weight", "post_attention_layernorm.weight"):
            parts[theirs + norm] = _whole(ours + norm, hidden)
        names = [f"{theirs}self_attn.{name}_proj.weight" for name in "qkv"]
        parts |= _rows(ours + "qkv_proj.weight", names, config.qkv_sizes, hidden)
        if config.kind.qkv_bias:
            names = [f"{theirs}self_attn.{name}_proj.bias" for name in "qkv"]
            parts |= _rows(ours + "qkv_proj.bias", names, config.qkv_sizes)
        for norm in ("q_norm.weight", "k_norm.weight") if config.kind.qk_norm else ():
            parts[f"{theirs}self_attn.{norm}"] = _whole(ours + norm, config.head_dim)
        parts[theirs + "self_attn.o_proj.weight"] = _whole(
            ours + "o_proj.weight", hidden, config.qkv_sizes[0]
        )
        names = [f"{theirs}mlp.{name}_proj.weight" for name in ("gate", "up")]
        parts |= _rows(ours + "gate_up_proj.weight", names, (intermediate, intermediate), hidden)
        parts[theirs + "mlp.down_proj.weight"] = _whole(
            ours + "down_proj.weight", hidden, intermediate
        )
    parts["model.norm.weight"] = _whole("norm.weight", hidden)
    if not config.tie_word_embeddings:
        parts["lm_head.weight"] = _whole("lm_head.weight", *vocabulary)
    return parts


def vision_parts(config: VisionConfig) -> dict[str, Part]:
    """Tensors of a CLIPVisionModel or SiglipVisionModel, as published, without vision_model."""
    hidden, intermediate, size = config.hidden_size, config.intermediate_size, config.patch_size
    patches = "patch_embedding.weight"
    parts = {f"embeddings.{patches}": _whole(patches, hidden, 3, size, size)}
    if config.kind.is_clip:
        parts["embeddings.class_embedding"] = _whole("class_embedding", hidden)
        norms = ("pre_layrnorm", "post_layernorm")  # the first name is CLIP's own spelling
    else:
        parts["embeddings.patch_embedding.bias"] = _whole("patch_embedding.bias", hidden)
        norms = ("post_layernorm",)
    positions = "position_embedding.weight"
    parts[f"embeddings.{positions}"] = _whole(positions, config.seqlen, hidden)
    for norm in norms:
        parts |= {f"{norm}.{x}": _whole(f"{norm}.{x}", hidden) for x in ("weight", "bias")}
    for i in range(config.num_hidden_layers):
        ours, theirs = f"layers.{i}.", f"encoder.layers.{i}."
        for kind, columns in (("weight", (hidden,)), ("bias", ())):
            names = [f"{theirs}self_attn.{name}_proj.{kind}" for name in "qkv"]
            parts |= _rows(f"{ours}qkv_proj.{kind}", names, (hidden,) * 3, *columns)
            parts[f"{theirs}self_attn.out_proj.{kind}"] = _whole(
                f"{ours}out_proj.{kind}", hidden, *columns
            )
            for norm in ("layer_norm1", "layer_norm2"):
                parts[f"{theirs}{norm}.{kind}"] = _whole(f"{ours}{norm}.{kind}", hidden)
        parts |= {
            f"{theirs}mlp.fc1.weight": _whole(f"{ours}fc1.weight", intermediate, hidden),
            f"{theirs}mlp.fc1.bias": _whole(f"{ours}fc1.bias", intermediate),
            f"{theirs}mlp.fc2.weight": _whole(f"{ours}fc2.weight", hidden, intermediate),
            f"{theirs}mlp.fc2.bias": _whole(f"{ours}fc2.bias", hidden),
        }
    return parts


def _whole(parameter: str, *shape: int) -> Part:
    return Part(parameter, slice(0, shape[0]), shape)


def _rows(parameter: str, keys: list[str], sizes: tuple[int, ...], *columns: int) -> dict:
    """Consecutive rows of one parameter, one tensor after another."""
    parts, begin = {}, 0
    for key, size in zip(keys, sizes, strict=True):
        parts[key] = Part(parameter, slice(begin, begin + size), (size, *columns))
        begin += size
    return parts
