"""Shapes of the decoder and of the vision tower, read from and written to Hugging Face configs."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch

from mmalign.errors import UserError
from mmalign.files import read_json

# What transformers leaves out of config.json because it is the default of its config class.
_LLAMA_DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_CLIP_VISION_DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
    "layer_norm_eps": 1e-5,
}


@dataclass(frozen=True)
class DecoderConfig:
    """A LLaMA decoder. Names and meaning are those of transformers' LlamaConfig."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2

    def __post_init__(self):
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise UserError(f"head_dim is {self.head_dim}; rotary positions need an even one")

    @property
    def qkv_sizes(self) -> tuple[int, int, int]:
        """Rows of q, k and v in the fused qkv_proj."""
        key_value_size = self.num_key_value_heads * self.head_dim
        return self.num_attention_heads * self.head_dim, key_value_size, key_value_size

    @classmethod
    def from_hf(cls, folder: str | Path) -> "DecoderConfig":
        """Reads config.json of a LlamaForCausalLM folder, or the text part of a LLaVA folder.

        Takes the spelling of published checkpoints (rope_theta, rope_scaling) and of transformers
        5 (rope_parameters). Raises UserError for anything that the decoder does not compute.
        """
        path, hf = Path(folder) / "config.json", read_hf_config(folder)
        if "text_config" in hf:
            _require(path, hf, "model_type", "llava")
            tied = hf.get("tie_word_embeddings") or hf["text_config"].get("tie_word_embeddings")
            hf = {"model_type": "llama"} | hf["text_config"] | {"tie_word_embeddings": bool(tied)}
        _require(path, hf, "model_type", "llama", "llava", "llava_llama")
        _require(path, hf, "hidden_act", None, "silu")
        _require(path, hf, "attention_bias", None, False)
        _require(path, hf, "mlp_bias", None, False)
        hf = _LLAMA_DEFAULTS | hf
        heads = hf["num_attention_heads"]
        return cls(
            **{name: hf[name] for name in _LLAMA_DEFAULTS},
            num_key_value_heads=hf.get("num_key_value_heads") or heads,
            head_dim=hf.get("head_dim") or hf["hidden_size"] // heads,
            rope_theta=_rope_theta(path, hf),
        )

    def to_hf(self, dtype: torch.dtype) -> dict:
        """config.json of a LlamaForCausalLM, in the spelling that all versions read."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "torch_dtype": str(dtype).removeprefix("torch."),
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "rope_scaling": None,
            **asdict(self),
        }


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes pixels; names and meaning are those of preprocessor_config.json.

    The defaults are those of every OpenAI CLIP, whatever its size.
    """

    size: int  # of the short side after resizing
    crop_size: int  # side of the square cut out of the centre
    resample: Literal["bicubic"] = "bicubic"
    image_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)

    def to_hf(self) -> dict:
        """preprocessor_config.json, as CLIPImageProcessor reads it."""
        return {
            "image_processor_type": "CLIPImageProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": {"shortest_edge": self.size},
            "resample": {"bicubic": 3}[self.resample],  # PIL.Image.Resampling
            "do_center_crop": True,
            "crop_size": {"height": self.crop_size, "width": self.crop_size},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": self.image_mean,
            "image_std": self.image_std,
        }


@dataclass(frozen=True)
class VisionConfig:
    """A CLIP vision tower. Names and meaning are those of transformers' CLIPVisionConfig."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    image_size: int
    patch_size: int
    layer_norm_eps: float = 1e-5

    def __post_init__(self):
        if self.hidden_size % self.num_attention_heads:
            raise UserError(
                f"hidden_size {self.hidden_size} of the vision tower is not a multiple of "
                f"num_attention_heads {self.num_attention_heads}"
            )

    @property
    def num_patches(self) -> int:
        """Tokens that one image takes in the decoder's sequence."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_class_tokens(self) -> int:
        """Rows before an image's patches, which the projector does not read."""
        return 1

    @property
    def seqlen(self) -> int:
        """Rows of one image inside the tower: the class token and its patches."""
        return self.num_class_tokens + self.num_patches

    @property
    def num_layers_used(self) -> int:
        """Layers that compute what the projector reads: hidden_states[-2]."""
        return self.num_hidden_layers - 1

    @property
    def llava_fields(self) -> dict:
        """What LlavaForConditionalGeneration's config.json says of the features it reads."""
        return {"vision_feature_layer": -2, "vision_feature_select_strategy": "default"}

    @property
    def preprocessing(self) -> Preprocessing:
        return Preprocessing(size=self.image_size, crop_size=self.image_size)

    @classmethod
    def from_hf(cls, folder: str | Path) -> "VisionConfig":
        """Reads config.json of a CLIPVisionModel, CLIPModel or LlavaForConditionalGeneration."""
        path, hf = Path(folder) / "config.json", read_hf_config(folder)
        _require(path, hf, "model_type", "clip_vision_model", "clip", "llava")
        if hf["model_type"] != "clip_vision_model":
            if "vision_config" not in hf:
                raise UserError(f"{path}: no vision_config. Give a folder with a vision tower")
            # CLIP's first releases repeat the values in vision_config_dict, which has precedence
            hf = hf["vision_config"] | (hf.get("vision_config_dict") or {})
            _require(path, hf, "model_type", None, "clip_vision_model")
        _require(path, hf, "hidden_act", None, "quick_gelu")
        _require(path, hf, "num_channels", None, 3)
        hf = _CLIP_VISION_DEFAULTS | hf
        return cls(**{name: hf[name] for name in _CLIP_VISION_DEFAULTS})

    def to_hf(self, dtype: torch.dtype) -> dict:
        """config.json of a CLIPVisionModel."""
        return {
            "architectures": ["CLIPVisionModel"],
            "model_type": "clip_vision_model",
            "torch_dtype": str(dtype).removeprefix("torch."),
            "hidden_act": "quick_gelu",
            "num_channels": 3,
            **asdict(self),
        }


def read_hf_config(folder: str | Path) -> dict:
    """config.json of a Hugging Face folder; UserError where it is missing or malformed."""
    hint = "Give the folder of a Hugging Face checkpoint: config.json and the weights"
    return read_json(Path(folder) / "config.json", hint)


def _require(path: Path, hf: dict, name: str, *allowed) -> None:
    """allowed: None among them where the key may be absent."""
    if hf.get(name) not in allowed:
        expected = " or ".join(repr(value) for value in allowed if value is not None)
        raise UserError(f"{path}: {name} is {hf.get(name)!r}; supported: {expected}")


def _rope_theta(path: Path, hf: dict) -> float:
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind != "default":
        raise UserError(f"{path}: rope scaling of type {kind!r} is not supported; only plain RoPE")
    return float(rope.get("rope_theta") or hf.get("rope_theta") or 10000.0)


# ---- shapes of the published models that the recipes are made for ----

LLAMA2_7B = DecoderConfig(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
    head_dim=128,
    rms_norm_eps=1e-5,
    max_position_embeddings=4096,
)
OPENLLAMA_3B = DecoderConfig(
    vocab_size=32000,
    hidden_size=3200,
    intermediate_size=8640,
    num_hidden_layers=26,
    num_attention_heads=32,
    num_key_value_heads=32,
    head_dim=100,
    rms_norm_eps=1e-6,
    max_position_embeddings=2048,
)
CLIP_VIT_L_14 = VisionConfig(
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    image_size=224,
    patch_size=14,
)
