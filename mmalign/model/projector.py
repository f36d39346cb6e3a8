"""From image features to the decoder's embedding space: linear (LLaVA 1.0), mlp2x_gelu (1.5).

Everything that depends on the kind of projector is here: its parameters, their names in files, its
FLOPs and its activations. Both end in the fused operation, a product that writes its rows into the
packed sequence and norms them.
"""

import math
from dataclasses import dataclass, field

import torch
from mmalign_kernels import project_image_features
from torch import Tensor, nn
from torch.nn.functional import gelu

from mmalign.config import ProjectorType
from mmalign.errors import UserError
from mmalign.model.layers import Linear, RMSNorm

# LLaVA's mm_projector.bin; LlavaForConditionalGeneration; our projector.safetensors has no prefix
_PREFIXES = ("mm_projector.", "multi_modal_projector.")
_SHOWN = 10  # names in a message


@dataclass(frozen=True)
class ProjectorShape:
    """What FLOPs and the memory plan need to know, without a model."""

    vision_hidden_size: int
    hidden_size: int
    kind: ProjectorType = "linear"

    @property
    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Shape of each parameter."""
        hidden = self.hidden_size
        if self.kind == "linear":
            return {"weight": (hidden, self.vision_hidden_size), "bias": (hidden,)}
        first, second = (hidden, self.vision_hidden_size), (hidden, hidden)
        return {"0.weight": first, "0.bias": (hidden,), "2.weight": second, "2.bias": (hidden,)}

    @property
    def saved_per_row(self) -> int:
        """Numbers that the backward pass reads of each row: the features, and GELU's two sides."""
        return self.vision_hidden_size + (0 if self.kind == "linear" else 2 * self.hidden_size)

    def flops(self, num_rows: int, backward: bool) -> int:
        """Of the forward pass, or of both; the features need no gradient."""
        first = (4 if backward else 2) * self.vision_hidden_size * self.hidden_size
        second = (6 if backward else 2) * self.hidden_size**2
        return num_rows * (first + (0 if self.kind == "linear" else second))


class Projector(Linear):
    """weight (hidden_size, vision_hidden_size) and bias, initialised as torch.nn.Linear does."""

    bias: nn.Parameter
    # what LlavaForConditionalGeneration's config.json says of it
    HF_CONFIG = {"projector_hidden_act": "linear", "multimodal_projector_bias": True}

    def __init__(self, vision_hidden_size: int, hidden_size: int):
        super().__init__(vision_hidden_size, hidden_size, bias=True)
        _init_as_torch(self)

    def forward(
        self, image_features: Tensor, hidden_states: Tensor, image_positions: Tensor, norm: RMSNorm
    ) -> tuple[Tensor, Tensor]:
        """Writes the projected features into the packed embeddings and applies the first norm.

        Returns (hidden_states, normed). num_rows is num_images * num_patches.
        Without images it still joins the graph, so that its gradient is zero rather than missing.
        """
        return project_image_features(
            image_features.to(self.weight.dtype),  # (num_rows, vision_hidden_size)
            self.weight,
            self.bias,
            hidden_states,  # (total_tokens, hidden_size)
            image_positions,  # (num_rows,)
            norm.weight,
            norm.eps,
        )

    def to_hf_tensors(self) -> dict[str, Tensor]:
        """In the two layers of LlavaForConditionalGeneration, the second of them the identity."""
        weight, bias = self.weight.detach(), self.bias.detach()
        eye, zeros = torch.eye(len(bias), dtype=bias.dtype), torch.zeros_like(bias)
        return _hf_layers(weight, bias, eye, zeros)


class MlpProjector(nn.ModuleDict):
    """linear -> GELU -> linear; the names are those of LLaVA's nn.Sequential."""

    HF_CONFIG = {"projector_hidden_act": "gelu", "multimodal_projector_bias": True}

    def __init__(self, vision_hidden_size: int, hidden_size: int):
        first = Linear(vision_hidden_size, hidden_size, bias=True)
        _init_as_torch(first)
        super().__init__({"0": first, "2": Projector(hidden_size, hidden_size)})

    def forward(
        self, image_features: Tensor, hidden_states: Tensor, image_positions: Tensor, norm: RMSNorm
    ) -> tuple[Tensor, Tensor]:
        """As Projector.forward."""
        first = self["0"]
        assert isinstance(first, Linear)
        expanded = first(image_features.to(first.weight.dtype))  # (num_rows, hidden_size)
        return self["2"](gelu(expanded), hidden_states, image_positions, norm)

    def to_hf_tensors(self) -> dict[str, Tensor]:
        """In the two layers of LlavaForConditionalGeneration."""
        return _hf_layers(*(x.detach() for x in self.parameters()))


AnyProjector = Projector | MlpProjector
_PROJECTORS: dict[ProjectorType, type[AnyProjector]] = {
    "linear": Projector,
    "mlp2x_gelu": MlpProjector,
}


def make_projector(shape: ProjectorShape) -> AnyProjector:
    """Freshly initialised, from torch's generator."""
    return _PROJECTORS[shape.kind](shape.vision_hidden_size, shape.hidden_size)


def _init_as_torch(linear: Linear) -> None:
    bound = 1 / math.sqrt(linear.weight.shape[1])
    for parameter in linear.parameters():
        nn.init.uniform_(parameter, -bound, bound)


# ---- names in files ----


def projector_tensors(projector: AnyProjector) -> dict[str, Tensor]:
    """What projector.safetensors holds of it."""
    return {name: parameter.detach() for name, parameter in projector.named_parameters()}


def _hf_layers(*tensors: Tensor) -> dict[str, Tensor]:
    """Weight and bias of both layers, by name."""
    names = (f"linear_{i}.{name}" for i in (1, 2) for name in ("weight", "bias"))
    return {f"multi_modal_projector.{x}": y for x, y in zip(names, tensors, strict=True)}


@torch.no_grad()
def load_projector_tensors(projector: AnyProjector, state: dict[str, Tensor]) -> None:
    """Takes what read_projector returns. Raises UserError for another kind or shape."""
    parameters = dict(projector.named_parameters())
    found = state.keys() - {"image_token_embeddings"}
    if found != parameters.keys():
        raise UserError(
            f"projector: this model's has {', '.join(sorted(parameters))}, found "
            f"{', '.join(sorted(found))}. Give a projector of the same kind, or "
            "--model.projector-type"
        )
    for name, parameter in parameters.items():
        if parameter.shape != state[name].shape:
            raise UserError(
                f"projector {name}: expected shape {tuple(parameter.shape)} for this vision "
                f"tower and decoder, found {tuple(state[name].shape)}"
            )
        parameter.copy_(state[name])


def projector_of(
    state: dict[str, Tensor], vision_hidden_size: int, hidden_size: int
) -> AnyProjector:
    """The projector whose tensors read_projector returned. Raises UserError for other sizes."""
    projector = make_projector(ProjectorShape(vision_hidden_size, hidden_size, kind_of(state)))
    load_projector_tensors(projector, state)
    return projector


def kind_of(state: dict[str, Tensor]) -> ProjectorType:
    """Of the tensors that read_projector returned."""
    return "linear" if "weight" in state else "mlp2x_gelu"


def read_projector(
    tensors: dict[str, Tensor], source: object, hf_config: dict | None = None
) -> dict[str, Tensor]:
    """Parameters by name from the tensors of a file, in any of the three spellings.

    LLaVA: model.mm_projector.weight, or .0.weight and .2.weight. Hugging Face:
    multi_modal_projector.linear_1.weight and linear_2.weight; hf_config is config.json, whose
    projector_hidden_act tells the kind: with "linear", linear_2 has to be the identity with zero
    bias. Ours: weight, or 0.weight and 2.weight. Raises UserError naming `source` for others.
    """
    state = {_without_prefix(name): tensor for name, tensor in tensors.items()}
    if hf_config is not None:
        kind = kind_in(hf_config, source)
        if kind == "linear":
            _check_identity(state, source)
            state = {name: x for name, x in state.items() if not name.startswith("linear_2.")}
        prefixes = {"linear_1.": "" if kind == "linear" else "0.", "linear_2.": "2."}
        for theirs, ours in prefixes.items():
            state = {name.replace(theirs, ours): x for name, x in state.items()}
    hidden, vision_hidden = _sizes(state)
    expected = ProjectorShape(vision_hidden, hidden, kind_of(state)).parameters
    if state.keys() != expected.keys():
        raise UserError(
            f"{source}: expected a projector of one layer (weight and bias) or two (0.weight, "
            f"0.bias, 2.weight, 2.bias), found {', '.join(sorted(state)[:_SHOWN])}"
        )
    for name, shape in expected.items():
        if state[name].shape != shape:
            raise UserError(
                f"{source}: expected a projector with {name} of shape {shape}, found "
                f"{tuple(state[name].shape)}"
            )
    return state


def _sizes(state: dict[str, Tensor]) -> tuple[int, int]:
    """(hidden_size, vision_hidden_size), of the first weight; zeros where there is none."""
    weight = state.get("weight", state.get("0.weight"))
    if weight is None or weight.ndim != 2:
        return 0, 0
    return weight.shape[0], weight.shape[1]


def kind_in(hf: dict, source: object) -> ProjectorType:
    """The kind that config.json of a LlavaForConditionalGeneration says."""
    # left out where it is the default; the bias is a later option
    hf = {"projector_hidden_act": "gelu", "multimodal_projector_bias": True} | hf
    for kind, projector in _PROJECTORS.items():
        if all(hf[name] == value for name, value in projector.HF_CONFIG.items()):
            return kind
    expected = " or ".join(str(x.HF_CONFIG) for x in _PROJECTORS.values())
    found = {name: hf[name] for name in Projector.HF_CONFIG}
    raise UserError(f"{source}/config.json: expected {expected}, found {found}")


@dataclass(frozen=True)
class ImageInputs:
    """What the decoder reads from images instead of the image tokens' embeddings."""

    features: Tensor  # (num_images * num_patches, vision_hidden_size)
    positions: Tensor  # (num_images * num_patches,) int64; their rows of the packed sequence
    projector: AnyProjector
    token_embeddings: dict[int, Tensor] = field(default_factory=dict)
    """Other embeddings of single tokens by their id, (hidden_size,) each."""


def _without_prefix(name: str) -> str:
    for prefix in _PREFIXES:
        name = name.rpartition(prefix)[2]
    return name


def _is_identity(weight: Tensor) -> bool:
    return weight.equal(torch.eye(*weight.shape).to(weight))


def _check_identity(state: dict[str, Tensor], source: object) -> None:
    weight, bias = state.get("linear_2.weight"), state.get("linear_2.bias")
    if weight is None or weight.ndim != 2 or bias is None or not _is_identity(weight):
        raise UserError(f"{source}: multi_modal_projector.linear_2 is not the identity")
    if bias.any():
        raise UserError(f"{source}: multi_modal_projector.linear_2.bias is not zero")
