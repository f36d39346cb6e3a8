"""Rotary frequencies: plain RoPE, and the ways of stretching it over a longer context.

    linear   every frequency divided by the factor
    dynamic  plain up to max_position_embeddings; beyond, the base depends on the sequence's length
    yarn     arXiv 2309.00071: low frequencies divided, cos and sin scaled by attention_factor
    llama3   Llama 3.1: low frequencies divided, with a smooth transition

Formulas and order of operations are those of transformers' modeling_rope_utils.py, in fp32.
"""

import math
from dataclasses import asdict, dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from mmalign.errors import UserError
from mmalign.files import Settings

RopeType = Literal["linear", "dynamic", "yarn", "llama3"]
# mrope rotates by three positions of an image; those of text are equal, which is plain RoPE
_PLAIN = (None, "default", "mrope")


@dataclass(frozen=True)
class RopeScaling:
    """Names and meaning are those of rope_scaling in config.json; None: not used by the type."""

    rope_type: RopeType
    factor: float
    original_max_position_embeddings: int | None = None  # yarn, llama3
    low_freq_factor: float | None = None  # llama3
    high_freq_factor: float | None = None
    attention_factor: float | None = None  # yarn
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool | None = None

    def to_hf(self) -> dict:
        return {name: value for name, value in asdict(self).items() if value is not None}


def inverse_frequencies(
    head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> tuple[Tensor, float]:
    """(head_dim // 2,) fp32 on the CPU, and the factor of cos and sin."""
    exponents = torch.arange(0, head_dim, 2, device="cpu").float() / head_dim
    plain = 1.0 / theta**exponents
    if scaling is None or scaling.rope_type == "dynamic":
        return plain, 1.0
    if scaling.rope_type == "linear":
        return plain / scaling.factor, 1.0
    if scaling.rope_type == "llama3":
        return _llama3(plain, scaling), 1.0
    return _yarn(head_dim, theta, theta**exponents, scaling), _attention_factor(scaling)


def _llama3(plain: Tensor, scaling: RopeScaling) -> Tensor:
    length, factor = scaling.original_max_position_embeddings, scaling.factor
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    assert length is not None and low is not None and high is not None
    wavelengths = 2 * math.pi / plain
    divided = torch.where(wavelengths > length / low, plain / factor, plain)
    smooth = (length / wavelengths - low) / (high - low)
    between = ~(wavelengths < length / high) & ~(wavelengths > length / low)
    return torch.where(between, (1 - smooth) * divided / factor + smooth * divided, divided)


def _yarn(head_dim: int, theta: float, powers: Tensor, scaling: RopeScaling) -> Tensor:
    def dimension(num_rotations: float) -> float:
        """Column whose pair rotates so many times within the original context."""
        assert scaling.original_max_position_embeddings is not None
        ratio = scaling.original_max_position_embeddings / (num_rotations * 2 * math.pi)
        return head_dim * math.log(ratio) / (2 * math.log(theta))

    low, high = dimension(scaling.beta_fast or 32), dimension(scaling.beta_slow or 1)
    if scaling.truncate is not False:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    columns = torch.arange(head_dim // 2, dtype=torch.float32, device="cpu")
    kept = 1 - ((columns - low) / (high - low)).clamp(0, 1)
    return 1.0 / (scaling.factor * powers) * (1 - kept) + 1.0 / powers * kept


def _attention_factor(scaling: RopeScaling) -> float:
    def mscale(weight: float = 1) -> float:
        return 1.0 if scaling.factor <= 1 else 0.1 * weight * math.log(scaling.factor) + 1.0

    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return mscale(scaling.mscale) / mscale(scaling.mscale_all_dim)
    return mscale()


# ---- config.json, in the spelling of published checkpoints and of transformers 5 ----


def read_rope(hf: Settings, max_positions: int) -> tuple[float, RopeScaling | None]:
    """(rope_theta, scaling) of rope_parameters, or of rope_scaling and rope_theta.

    Raises UserError for other kinds of RoPE, and where the two spellings disagree.
    """
    thetas, scalings = {}, {}
    for key in ("rope_parameters", "rope_scaling"):
        rope = hf.section(key)
        rope.require("partial_rotary_factor", None, 1)
        kinds = set()
        for name in ("rope_type", "type"):
            kind = rope.get(name)
            if kind is not None and not isinstance(kind, str):
                raise rope.error(name, "a name")
            kinds |= {kind} - set(_PLAIN)
        if (
            not kinds
            and rope.get("factor") is not None
            and not (rope.get("rope_type") or rope.get("type"))
        ):
            raise rope.error("rope_type", "the kind of scaling that factor belongs to")
        if nested := [name for name, value in rope.values.items() if isinstance(value, dict)]:
            raise UserError(
                f"{hf.path}: {rope.within}{nested[0]}: RoPE that differs among layers is not "
                "supported"
            )
        if kinds:
            scalings[key] = _read_scaling(hf, rope, key, kinds, max_positions)
        if rope.get("rope_theta") is not None:
            thetas[f"{key}.rope_theta"] = rope.number("rope_theta", 1, 1e12, 1e4)
    hf.require("partial_rotary_factor", None, 1)
    if hf.get("rope_theta") is not None:
        thetas["rope_theta"] = hf.number("rope_theta", 1, 1e12, 1e4)
    if len(set(thetas.values())) > 1:
        found = " and ".join(f"{key} {theta:g}" for key, theta in thetas.items())
        raise UserError(f"{hf.path}: {found} disagree. Remove the wrong one")
    if len(set(scalings.values())) > 1:
        raise UserError(f"{hf.path}: {' and '.join(scalings)} disagree. Remove the wrong one")
    return next(iter(thetas.values()), 10000.0), next(iter(scalings.values()), None)


def _read_scaling(
    hf: Settings, rope: Settings, key: str, kinds: set, max_positions: int
) -> RopeScaling:
    kind, *others = sorted(kinds)
    if others:
        raise UserError(f"{hf.path}: {hf.within}{key} has the types {kind} and {others[0]}")
    if kind not in get_args(RopeType):
        raise UserError(
            f"{hf.path}: {hf.within}{key} of type {kind!r} is not supported; only plain RoPE "
            f"(default), {', '.join(get_args(RopeType))}"
        )
    # where it stands beside rope_scaling, transformers prefers that one
    of_model = hf.integer("original_max_position_embeddings", 1, 2**27, max_positions, null=True)
    original = rope.integer("original_max_position_embeddings", 1, 2**27, of_model, null=True)
    if hf.get("original_max_position_embeddings") is not None:
        original = of_model
    implied = max_positions / original if kind == "yarn" else 0
    factor = rope.number("factor", 1, 1e6, implied, null=kind == "yarn")
    if kind in ("linear", "dynamic"):
        return RopeScaling(kind, factor)
    if kind == "llama3":
        low = rope.number("low_freq_factor", 1e-6, 1e6, 0)
        high = rope.number("high_freq_factor", 1e-6, 1e6, 0)
        if high <= low:
            raise rope.error("high_freq_factor", f"a number above low_freq_factor, {low:g}")
        return RopeScaling(kind, factor, original, low, high)
    names = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
    numbers = {x: rope.number(x, 0, 1e6, 0) for x in names if rope.get(x) is not None}
    truncate = None if rope.get("truncate") is None else rope.flag("truncate", True)
    return RopeScaling(kind, factor, original, **numbers, truncate=truncate)
