"""Shapes of the decoder and of the vision tower, read from and written to Hugging Face configs."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from mmalign.errors import UserError
from mmalign.files import Settings
from mmalign.model.hf_config import language_model, read_hf_config
from mmalign.model.kinds import DECODERS, TOWERS, DecoderKind, TowerKind
from mmalign.model.preprocessing import Preprocessing
from mmalign.model.rope import RopeScaling, read_rope
from mmalign.model.tiles import Grid

# greatest values; what config.json leaves out is in kinds.py
_LIMITS = {
    "vocab_size": 2**24,
    "hidden_size": 2**20,
    "intermediate_size": 2**22,
    "num_hidden_layers": 1024,
    "num_attention_heads": 2**14,
    "max_position_embeddings": 2**27,
}
_GRIDS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))  # LLaVA 1.6's
MOST_TILES = 16  # in one direction
_TOWER_LIMITS = {
    "hidden_size": 2**20,
    "intermediate_size": 2**22,
    "num_hidden_layers": 1024,
    "num_attention_heads": 2**14,
    "image_size": 4096,
    "patch_size": 4096,
}


@dataclass(frozen=True)
class DecoderConfig:
    """A decoder of the LLaMA family. Names and meaning are those of transformers' configs."""

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
    model_type: str = "llama"  # a key of DECODERS
    rope_scaling: RopeScaling | None = None
    sliding_window: int | None = None  # tokens that a token sees in Mistral; None: all before it

    def __post_init__(self):
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim % 2 or self.head_dim < 2:
            raise UserError(f"head_dim is {self.head_dim}; rotary positions need an even one")

    @property
    def kind(self) -> DecoderKind:
        return DECODERS[self.model_type]

    @property
    def qkv_sizes(self) -> tuple[int, int, int]:
        """Rows of q, k and v in the fused qkv_proj."""
        key_value_size = self.num_key_value_heads * self.head_dim
        return self.num_attention_heads * self.head_dim, key_value_size, key_value_size

    @property
    def length_limit(self) -> int | None:
        """The longest sequence that is computed; None: any, since rotary positions extrapolate.

        Within a sliding window every token sees all before it. Dynamic RoPE is plain up to
        max_position_embeddings; beyond, a token's rotation would depend on its sequence's length.
        """
        if self.rope_scaling is not None and self.rope_scaling.rope_type == "dynamic":
            return min(self.max_position_embeddings, self.sliding_window or 2**27)
        return self.sliding_window

    @property
    def context_length(self) -> int:
        """Tokens of the longest sequence that the model is made for and that is computed."""
        return min(self.max_position_embeddings, self.length_limit or 2**27)

    @classmethod
    def from_hf(cls, folder: str | Path) -> "DecoderConfig":
        """Reads config.json of a causal language model, or of a VLM that contains one.

        Raises UserError for anything that the decoder does not compute.
        """
        hf = language_model(read_hf_config(folder))
        model_type = hf.require("model_type", *DECODERS)
        defaults = DECODERS[model_type].defaults
        for key, value in (("hidden_act", "silu"), ("attention_bias", False), ("mlp_bias", False)):
            hf.require(key, None, value)
        sizes = {x: hf.integer(x, 1, most, defaults[x]) for x, most in _LIMITS.items()}
        heads, max_positions = sizes["num_attention_heads"], sizes["max_position_embeddings"]
        head_dim = defaults["head_dim"] or sizes["hidden_size"] // heads
        theta, scaling = read_rope(hf, max_positions)
        return _built(
            cls,
            hf,
            **sizes,
            num_key_value_heads=hf.integer(
                "num_key_value_heads", 1, heads, defaults["num_key_value_heads"] or heads, null=True
            ),
            head_dim=hf.integer("head_dim", 2, 2**16, head_dim, null=True),
            rms_norm_eps=hf.number("rms_norm_eps", 0, 1, 1e-6),
            rope_theta=theta,
            tie_word_embeddings=hf.flag("tie_word_embeddings", False),
            bos_token_id=_token_ids(hf, "bos_token_id", defaults["bos_token_id"]),
            eos_token_id=_token_ids(hf, "eos_token_id", defaults["eos_token_id"]),
            model_type=model_type,
            rope_scaling=scaling,
            sliding_window=_sliding_window(hf, defaults.get("sliding_window")),
        )

    def to_hf(self, dtype: torch.dtype) -> dict:
        """config.json of a causal language model, in the spelling that all versions read."""
        values = asdict(self) | {"rope_scaling": None}
        if self.rope_scaling is not None:
            values["rope_scaling"] = self.rope_scaling.to_hf()
        if "sliding_window" not in self.kind.defaults:
            del values["sliding_window"]
        return {
            "architectures": [self.kind.architecture],
            "torch_dtype": str(dtype).removeprefix("torch."),
            "hidden_act": "silu",
            **self.kind.to_hf,
            **values,
        }


@dataclass(frozen=True)
class VisionConfig:
    """A CLIP or SigLIP tower. Names and meaning are those of transformers' configs."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    image_size: int
    patch_size: int
    layer_norm_eps: float = 1e-5
    # the tower's stock one, unless the folder has its own; __post_init__ replaces None
    preprocessing: Preprocessing = None  # pyright: ignore[reportAssignmentType]
    model_type: str = "clip_vision_model"  # a key of TOWERS
    hidden_act: str = "quick_gelu"
    vision_feature_layer: int = -2  # of hidden_states, which the projector reads
    grids: tuple[Grid, ...] = ()  # of tiles, in LLaVA 1.6; empty: one square is all of an image

    def __post_init__(self):
        if self.preprocessing is None:
            stock = Preprocessing.stock(self.image_size, self.kind.is_clip)
            object.__setattr__(self, "preprocessing", stock)
        if self.patch_size > self.image_size:
            raise UserError(f"patch_size {self.patch_size} exceeds image_size {self.image_size}")
        if self.hidden_size % self.num_attention_heads:
            raise UserError(
                f"hidden_size {self.hidden_size} of the vision tower is not a multiple of "
                f"num_attention_heads {self.num_attention_heads}"
            )

    @property
    def kind(self) -> TowerKind:
        return TOWERS[self.model_type]

    @property
    def num_patches(self) -> int:
        """Tokens that one image, or one tile of it, takes in the decoder's sequence."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_class_tokens(self) -> int:
        """Rows before an image's patches, which the projector does not read."""
        return int(self.kind.is_clip)

    @property
    def seqlen(self) -> int:
        """Rows of one image inside the tower: the class token, if any, and its patches."""
        return self.num_class_tokens + self.num_patches

    @property
    def num_layers_used(self) -> int:
        """Layers that compute what the projector reads."""
        return self.num_hidden_layers + 1 + self.vision_feature_layer

    def padding(self) -> "VisionConfig":
        """The same tower behind images that are padded to squares."""
        return replace(self, preprocessing=replace(self.preprocessing, do_pad=True))

    @property
    def llava_fields(self) -> dict:
        """What LlavaForConditionalGeneration's config.json says of the features it reads."""
        strategy = "default" if self.num_class_tokens else "full"  # default: drops the first row
        return {
            "vision_feature_layer": self.vision_feature_layer,
            "vision_feature_select_strategy": strategy,
        }

    @classmethod
    def from_hf(cls, folder: str | Path) -> "VisionConfig":
        """Of a CLIP or SigLIP folder (tower, or whole), or a LlavaForConditionalGeneration's.

        Reads config.json and, where there is one, preprocessor_config.json.
        """
        whole = read_hf_config(folder)
        hf, model_type = _tower_settings(whole)
        kind = TOWERS[model_type]
        hidden_act = hf.require("hidden_act", None, *kind.hidden_acts) or kind.hidden_act
        hf.require("num_channels", None, 3)
        sizes = {
            name: hf.integer(name, 1, most, kind.defaults[name])
            for name, most in _TOWER_LIMITS.items()
        }
        layer = whole.integer("vision_feature_layer", -sizes["num_hidden_layers"], -1, -2)
        config = _built(
            cls,
            hf,
            **sizes,
            layer_norm_eps=hf.number("layer_norm_eps", 0, 1, kind.layer_norm_eps),
            preprocessing=Preprocessing.from_hf(folder, sizes["image_size"], kind.is_clip),
            model_type=model_type,
            hidden_act=hidden_act,
            vision_feature_layer=layer,
        )
        if whole.get("model_type") in ("llava", "llava_next"):
            expected = ("default", None) if kind.is_clip else ("full",)
            whole.require("vision_feature_select_strategy", *expected)
        if whole.get("model_type") == "llava_next":
            config = _with_grids(config, whole)
        return config

    def to_hf(self, dtype: torch.dtype) -> dict:
        """config.json of a CLIPVisionModel or SiglipVisionModel."""
        other = ("preprocessing", "vision_feature_layer", "grids")
        return {
            "architectures": [self.kind.architecture],
            "torch_dtype": str(dtype).removeprefix("torch."),
            "num_channels": 3,
            **({} if self.kind.is_clip else {"vision_use_head": False}),
            **{name: value for name, value in asdict(self).items() if name not in other},
        }


def _tower_settings(hf: Settings) -> tuple[Settings, str]:
    """The tower's settings and its model_type: hf itself, or the vision part of a whole model."""
    wholes = {kind.of_model: name for name, kind in TOWERS.items()}
    found = hf.require("model_type", *TOWERS, *wholes, "llava", "llava_next")
    if found in TOWERS:
        return hf, found
    if "vision_config" not in hf:
        raise UserError(f"{hf.path}: no vision_config. Give a folder with a vision tower")
    # CLIP's first releases repeat the values in vision_config_dict, which has precedence
    first, second = hf.section("vision_config"), hf.section("vision_config_dict")
    hf = Settings(first.values | second.values, first.path, first.within)
    expected = [wholes[found]] if found in wholes else TOWERS
    return hf, hf.require("model_type", None, *expected) or wholes.get(found, "clip_vision_model")


def _with_grids(config: VisionConfig, hf: Settings) -> VisionConfig:
    """Of LLaVA 1.6. Its processor pads batches, never images, so do_pad means nothing here."""
    size, given = config.image_size, hf.values.get("image_grid_pinpoints") or _GRIDS
    pairs = [tuple(x) if isinstance(x, list | tuple) else () for x in given]
    sides = [side for pair in pairs for side in pair]
    whole = all(type(x) is int and 0 < x <= MOST_TILES * size and x % size == 0 for x in sides)
    if not whole or not all(len(pair) == 2 for pair in pairs) or len(pairs) > MOST_TILES**2:
        raise hf.error(
            "image_grid_pinpoints", f"pairs of height and width, multiples of image_size {size}"
        )
    preprocessing = config.preprocessing
    if preprocessing.size != size or not preprocessing.do_center_crop:
        raise UserError(f"{hf.path}: LLaVA 1.6 resizes images to {size}, the size of their tiles")
    preprocessing = replace(preprocessing, do_pad=False)
    return replace(config, preprocessing=preprocessing, grids=tuple(pairs))


def _built(config_class: type, hf: Settings, **values):
    """The config; its own complaints get the file's path."""
    try:
        return config_class(**values)
    except UserError as error:
        raise UserError(f"{hf.path}: {error}") from error


def _sliding_window(hf: Settings, default: int | None) -> int | None:
    """Of all layers, in a kind whose default it is; UserError for one of some layers alone.

    Those have it that layer_types names, or with use_sliding_window those from max_window_layers
    on.
    """
    kinds = hf.get("layer_types")
    if kinds is not None and any(kind != "full_attention" for kind in kinds):
        raise hf.error("layer_types", "'full_attention' for every layer")
    if default is not None:
        given = hf.values.get("sliding_window", default) is not None
        return hf.integer("sliding_window", 1, 2**27, default) if given else None
    first, layers = hf.get("max_window_layers"), hf.get("num_hidden_layers")
    some = not (isinstance(first, int) and isinstance(layers, int) and first >= layers)
    if hf.flag("use_sliding_window", False) and some:
        raise hf.error("use_sliding_window", "False", "supported:")
    return None


def _token_ids(hf: Settings, name: str, default: int | None) -> int | list[int] | None:
    """One id or several; some old folders have -1 for none."""
    value = hf.values.get(name, default)
    ids = value if isinstance(value, list) else [value]
    if value is not None and not all(type(i) is int and -1 <= i < 2**24 for i in ids):
        raise hf.error(name, "a token id or a list of token ids")
    return value


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
CLIP_VIT_L_14_336 = replace(CLIP_VIT_L_14, image_size=336, preprocessing=None)
