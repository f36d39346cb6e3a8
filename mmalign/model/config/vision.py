"""Shape of a vision tower, read from and written to Hugging Face configs."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from mmalign.errors import UserError
from mmalign.files import Settings
from mmalign.model.hf_config import VISION_LANGUAGE, built, read_hf_config
from mmalign.model.kinds import TOWERS, TowerKind
from mmalign.model.preprocessing import Preprocessing
from mmalign.model.tiles import Grid

_LIMITS = {  # greatest values; what config.json leaves out is in kinds.py
    "hidden_size": 2**20,
    "intermediate_size": 2**22,
    "num_hidden_layers": 1024,
    "num_attention_heads": 2**14,
    "image_size": 4096,
    "patch_size": 4096,
}
_GRIDS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))  # LLaVA 1.6's
MOST_TILES = 16  # in one direction


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
            name: hf.integer(name, 1, most, kind.defaults[name]) for name, most in _LIMITS.items()
        }
        layer = whole.integer("vision_feature_layer", -sizes["num_hidden_layers"], -1, -2)
        config = built(
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
    supported = (*TOWERS, *wholes, "llava", "llava_next")
    found = hf.get("model_type")
    if found in list(VISION_LANGUAGE) and found not in supported:  # it may be anything
        raise UserError(
            f"{hf.path}: of the model_type {found!r} the language model alone is read. Vision "
            f"towers are those of {', '.join(supported)}"
        )
    found = hf.require("model_type", *supported)
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


# ---- shapes of the published models that the recipes are made for ----

CLIP_VIT_L_14 = VisionConfig(
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    image_size=224,
    patch_size=14,
)
CLIP_VIT_L_14_336 = replace(CLIP_VIT_L_14, image_size=336, preprocessing=None)
