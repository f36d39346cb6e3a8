"""Shape of a decoder, read from and written to Hugging Face configs."""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from mmalign.errors import UserError
from mmalign.files import Settings, read_json
from mmalign.model.hf_config import VISION_LANGUAGE, built, language_model, read_hf_config
from mmalign.model.kinds import DECODERS, DecoderKind
from mmalign.model.rope import RopeScaling, read_rope

# greatest values; what config.json leaves out is in kinds.py
_LIMITS = {
    "vocab_size": 2**24,
    "hidden_size": 2**20,
    "intermediate_size": 2**22,
    "num_hidden_layers": 1024,
    "num_attention_heads": 2**14,
    "max_position_embeddings": 2**27,
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
        model_type = _model_type(hf)
        defaults = DECODERS[model_type].defaults
        for key, value in (("hidden_act", "silu"), ("attention_bias", False), ("mlp_bias", False)):
            hf.require(key, None, value)
        sizes = {x: hf.integer(x, 1, most, defaults[x]) for x, most in _LIMITS.items()}
        heads, max_positions = sizes["num_attention_heads"], sizes["max_position_embeddings"]
        head_dim = defaults["head_dim"] or sizes["hidden_size"] // heads
        theta, scaling = read_rope(hf, max_positions)
        return built(
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
            eos_token_id=_end_ids(Path(folder), hf, defaults["eos_token_id"]),
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


def _model_type(hf: Settings) -> str:
    if (found := hf.get("model_type")) in list(DECODERS):  # it may be anything
        return found
    supported = " or ".join(repr(name) for name in DECODERS)
    if not hf.within:  # else the language model inside of one that is known
        supported += f"; or a model that contains one of them: {', '.join(VISION_LANGUAGE)}"
    raise hf.error("model_type", supported, "supported:")


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


def _end_ids(folder: Path, hf: Settings, default: int | None) -> int | list[int] | None:
    """What ends an answer: of generation_config.json, as in transformers, else of config.json."""
    path = folder / "generation_config.json"
    if path.exists():
        found = _token_ids(Settings(read_json(path), path), "eos_token_id", None)
        if found is not None:
            return found
    return _token_ids(hf, "eos_token_id", default)


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
