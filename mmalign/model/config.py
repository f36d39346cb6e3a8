"""Shapes of the decoder and of the vision tower, read from and written to Hugging Face configs."""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from mmalign.errors import UserError
from mmalign.files import Settings, read_json
from mmalign.model.preprocessing import Preprocessing

# Least and greatest value, and what transformers leaves out of config.json because it is the
# default of its config class.
_LLAMA_INTEGERS = {
    "vocab_size": (1, 2**24, 32000),
    "hidden_size": (1, 2**20, 4096),
    "intermediate_size": (1, 2**22, 11008),
    "num_hidden_layers": (1, 1024, 32),
    "num_attention_heads": (1, 2**14, 32),
    "max_position_embeddings": (1, 2**27, 2048),
}
_CLIP_VISION_INTEGERS = {
    "hidden_size": (1, 2**20, 768),
    "intermediate_size": (1, 2**22, 3072),
    "num_hidden_layers": (1, 1024, 12),
    "num_attention_heads": (1, 2**14, 12),
    "image_size": (1, 4096, 224),
    "patch_size": (1, 4096, 32),
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
    bos_token_id: int | list[int] | None = 1
    eos_token_id: int | list[int] | None = 2

    def __post_init__(self):
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim % 2 or self.head_dim < 2:
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
        hf = read_hf_config(folder)
        if "text_config" in hf:
            hf.require("model_type", "llava")
            text = hf.section("text_config")
            tied = hf.flag("tie_word_embeddings", False) or text.flag("tie_word_embeddings", False)
            values = {"model_type": "llama"} | text.values | {"tie_word_embeddings": tied}
            hf = Settings(values, text.path, text.within)
        hf.require("model_type", "llama", "llava", "llava_llama")
        hf.require("hidden_act", None, "silu")
        hf.require("attention_bias", None, False)
        hf.require("mlp_bias", None, False)
        sizes = {name: hf.integer(name, *limits) for name, limits in _LLAMA_INTEGERS.items()}
        heads, hidden_size = sizes["num_attention_heads"], sizes["hidden_size"]
        return _built(
            cls,
            hf,
            **sizes,
            num_key_value_heads=hf.integer("num_key_value_heads", 1, heads, heads, null=True),
            head_dim=hf.integer("head_dim", 2, 2**16, hidden_size // heads, null=True),
            rms_norm_eps=hf.number("rms_norm_eps", 0, 1, 1e-6),
            rope_theta=_rope_theta(hf),
            tie_word_embeddings=hf.flag("tie_word_embeddings", False),
            bos_token_id=_token_ids(hf, "bos_token_id", 1),
            eos_token_id=_token_ids(hf, "eos_token_id", 2),
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
class VisionConfig:
    """A CLIP vision tower. Names and meaning are those of transformers' CLIPVisionConfig."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    image_size: int
    patch_size: int
    layer_norm_eps: float = 1e-5
    # stock CLIP's, unless the folder has its own; __post_init__ replaces None
    preprocessing: Preprocessing = None  # pyright: ignore[reportAssignmentType]

    def __post_init__(self):
        if self.preprocessing is None:
            stock = Preprocessing(size=self.image_size, crop_size=self.image_size)
            object.__setattr__(self, "preprocessing", stock)
        if self.patch_size > self.image_size:
            raise UserError(f"patch_size {self.patch_size} exceeds image_size {self.image_size}")
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

    @classmethod
    def from_hf(cls, folder: str | Path) -> "VisionConfig":
        """Of a CLIPVisionModel, CLIPModel or LlavaForConditionalGeneration folder.

        Reads config.json and, where there is one, preprocessor_config.json.
        """
        hf = read_hf_config(folder)
        if hf.require("model_type", "clip_vision_model", "clip", "llava") != "clip_vision_model":
            if "vision_config" not in hf:
                raise UserError(f"{hf.path}: no vision_config. Give a folder with a vision tower")
            # CLIP's first releases repeat the values in vision_config_dict, which has precedence
            first, second = hf.section("vision_config"), hf.section("vision_config_dict")
            hf = Settings(first.values | second.values, first.path, first.within)
            hf.require("model_type", None, "clip_vision_model")
        hf.require("hidden_act", None, "quick_gelu")
        hf.require("num_channels", None, 3)
        sizes = {name: hf.integer(name, *limits) for name, limits in _CLIP_VISION_INTEGERS.items()}
        eps = hf.number("layer_norm_eps", 0, 1, 1e-5)
        preprocessing = Preprocessing.from_hf(folder, sizes["image_size"])
        return _built(cls, hf, **sizes, layer_norm_eps=eps, preprocessing=preprocessing)

    def to_hf(self, dtype: torch.dtype) -> dict:
        """config.json of a CLIPVisionModel."""
        return {
            "architectures": ["CLIPVisionModel"],
            "model_type": "clip_vision_model",
            "torch_dtype": str(dtype).removeprefix("torch."),
            "hidden_act": "quick_gelu",
            "num_channels": 3,
            **{name: value for name, value in asdict(self).items() if name != "preprocessing"},
        }


def read_hf_config(folder: str | Path) -> Settings:
    """config.json of a Hugging Face folder; UserError where it is missing, malformed or quantised.

    A folder that holds something else, such as an adapter, is called by its name.
    """
    hint = "Give the folder of a Hugging Face checkpoint: config.json and the weights"
    path = Path(folder) / "config.json"
    if not path.exists():
        hint = other_folder(Path(folder)) or hint
    hf = Settings(read_json(path, hint), path)
    for part in (hf, hf.section("text_config"), hf.section("vision_config")):
        if part.get("quantization_config") is not None:
            raise UserError(
                f"{path}: {part.within}quantization_config is set, but quantised weights are not "
                "supported. Give the folder of the model before its quantisation"
            )
    return hf


def other_folder(folder: Path) -> str:
    """What a folder without a model holds instead, and what to do; empty: not known."""
    if (folder / "adapter_config.json").exists():
        return "The folder holds an adapter (adapter_config.json). Give the merged model's folder"
    if any(folder.glob("*.gguf")):
        return "The folder holds a GGUF file. Give the Hugging Face folder that it was made from"
    return ""


def _built(config_class: type, hf: Settings, **values):
    """The config; its own complaints get the file's path."""
    try:
        return config_class(**values)
    except UserError as error:
        raise UserError(f"{hf.path}: {error}") from error


def _token_ids(hf: Settings, name: str, default: int) -> int | list[int] | None:
    """One id or several; some old folders have -1 for none."""
    value = hf.values.get(name, default)
    ids = value if isinstance(value, list) else [value]
    if value is not None and not all(type(i) is int and -1 <= i < 2**24 for i in ids):
        raise hf.error(name, "a token id or a list of token ids")
    return value


def _rope_theta(hf: Settings) -> float:
    """The one base that both spellings agree on; UserError for other kinds of rope."""
    thetas = {}
    for key in ("rope_parameters", "rope_scaling"):
        rope = hf.section(key)
        for name in ("rope_type", "type"):
            kind = rope.get(name)
            if kind not in (None, "default"):
                raise UserError(
                    f"{hf.path}: {hf.within}{key} of type {kind!r} is not supported; only plain "
                    "RoPE (default)"
                )
        rope.number("partial_rotary_factor", 1, 1, 1, null=True)
        if rope.get("rope_theta") is not None:
            thetas[f"{key}.rope_theta"] = rope.number("rope_theta", 1, 1e12, 1e4)
    hf.number("partial_rotary_factor", 1, 1, 1, null=True)
    if hf.get("rope_theta") is not None:
        thetas["rope_theta"] = hf.number("rope_theta", 1, 1e12, 1e4)
    if len(set(thetas.values())) > 1:
        found = " and ".join(f"{key} {theta:g}" for key, theta in thetas.items())
        raise UserError(f"{hf.path}: {found} disagree. Remove the wrong one")
    return next(iter(thetas.values()), 10000.0)


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
