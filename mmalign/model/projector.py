"""The linear map from image features to the decoder's embedding space (LLaVA 1.0).

Everything that depends on the projector being one linear layer is here: its parameters, their names
in files, its FLOPs and its activations.
"""

import math
from dataclasses import dataclass, field

import torch
from mmalign_kernels import project_image_features
from torch import Tensor, nn

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

    @property
    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Shape of each parameter."""
        return {"weight": (self.hidden_size, self.vision_hidden_size), "bias": (self.hidden_size,)}

    @property
    def saved_per_row(self) -> int:
        """Numbers that the backward pass reads of each row: the features."""
        return self.vision_hidden_size

    def flops(self, num_rows: int, backward: bool) -> int:
        """Of the forward pass, or of both; the features need no gradient."""
        return (4 if backward else 2) * num_rows * self.vision_hidden_size * self.hidden_size


class Projector(Linear):
    """weight (hidden_size, vision_hidden_size) and bias, initialised as torch.nn.Linear does."""

    bias: nn.Parameter
    # what LlavaForConditionalGeneration's config.json says of it
    HF_CONFIG = {"projector_hidden_act": "linear", "multimodal_projector_bias": True}

    def __init__(self, vision_hidden_size: int, hidden_size: int):
        super().__init__(vision_hidden_size, hidden_size, bias=True)
        bound = 1 / math.sqrt(vision_hidden_size)
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

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

    # ---- names in files ----

    @classmethod
    def from_tensors(
        cls, state: dict[str, Tensor], vision_hidden_size: int, hidden_size: int
    ) -> "Projector":
        """The projector that read_tensors returned. Raises UserError for other sizes."""
        projector = cls(vision_hidden_size, hidden_size)
        projector.load_tensors(state)
        return projector

    @torch.no_grad()
    def load_tensors(self, state: dict[str, Tensor]) -> None:
        """Takes what read_tensors returns. Raises UserError for another shape."""
        parameters = dict(self.named_parameters())
        found = state.keys() - {"image_token_embeddings"}
        if found != parameters.keys():
            raise UserError(
                f"projector: this model's has {', '.join(sorted(parameters))}, found "
                f"{', '.join(sorted(found))}. Give a projector of the same kind"
            )
        for name, parameter in parameters.items():
            if parameter.shape != state[name].shape:
                raise UserError(
                    f"projector {name}: expected shape {tuple(parameter.shape)} for this vision "
                    f"tower and decoder, found {tuple(state[name].shape)}"
                )
            parameter.copy_(state[name])

    @staticmethod
    def read_tensors(
        tensors: dict[str, Tensor], source: object, hf_config: dict | None = None
    ) -> dict[str, Tensor]:
        """Parameters by name from the tensors of a file, in any of the three spellings.

        LLaVA: model.mm_projector.weight. Hugging Face: multi_modal_projector.linear_1.weight, where
        linear_2 has to be the identity with zero bias; hf_config is config.json. Ours: weight.
        Raises UserError naming `source` for anything that is not one linear layer.
        """
        if hf_config is not None:
            _check_hf_config(hf_config, source, Projector.HF_CONFIG)
        state = {_without_prefix(name): tensor for name, tensor in tensors.items()}
        if "linear_1.weight" in state:
            _check_identity(state, source)
            state = {name.removeprefix("linear_1."): state[name] for name in state}
            state = {name: x for name, x in state.items() if not name.startswith("linear_2.")}
        if state.keys() != {"weight", "bias"}:
            raise UserError(
                f"{source}: expected one linear projector (weight and bias), found "
                f"{', '.join(sorted(state)[:_SHOWN])}. Projectors of two layers (LLaVA 1.5) are "
                "not supported."
            )
        weight, bias = state["weight"], state["bias"]
        if weight.ndim != 2 or bias.shape != weight.shape[:1]:
            raise UserError(
                f"{source}: expected a projector weight (hidden_size, vision_hidden_size) and a "
                f"bias (hidden_size,), found {tuple(weight.shape)} and {tuple(bias.shape)}"
            )
        return state

    def to_tensors(self) -> dict[str, Tensor]:
        """What projector.safetensors holds of it."""
        return {name: parameter.detach() for name, parameter in self.named_parameters()}

    def to_hf_tensors(self) -> dict[str, Tensor]:
        """In the two layers of LlavaForConditionalGeneration, the second of them the identity."""
        weight, bias = self.weight.detach(), self.bias.detach()
        return {
            "multi_modal_projector.linear_1.weight": weight,
            "multi_modal_projector.linear_1.bias": bias,
            "multi_modal_projector.linear_2.weight": torch.eye(len(bias), dtype=bias.dtype),
            "multi_modal_projector.linear_2.bias": torch.zeros_like(bias),
        }


# ---- which kind a file holds: names of tensors, or hf_config, tell ----


def read_projector(
    tensors: dict[str, Tensor], source: object, hf_config: dict | None = None
) -> dict[str, Tensor]:
    """read_tensors of the kind of projector that a file or Hugging Face folder holds."""
    return Projector.read_tensors(tensors, source, hf_config)


def projector_of(state: dict[str, Tensor], vision_hidden_size: int, hidden_size: int) -> Projector:
    """The projector whose tensors read_projector returned."""
    return Projector.from_tensors(state, vision_hidden_size, hidden_size)


@dataclass(frozen=True)
class ImageInputs:
    """What the decoder reads from images instead of the image tokens' embeddings."""

    features: Tensor  # (num_images * num_patches, vision_hidden_size)
    positions: Tensor  # (num_images * num_patches,) int64; their rows of the packed sequence
    projector: Projector
    token_embeddings: dict[int, Tensor] = field(default_factory=dict)
    """Other embeddings of single tokens by their id, (hidden_size,) each."""


def _without_prefix(name: str) -> str:
    for prefix in _PREFIXES:
        name = name.rpartition(prefix)[2]
    return name


def _check_hf_config(hf: dict, source: object, expected: dict) -> None:
    hf = {"multimodal_projector_bias": True} | hf  # a later option: older folders do not write it
    found = {name: hf.get(name) for name in expected}
    if found != expected:
        raise UserError(f"{source}/config.json: expected {expected}, found {found}")


def _is_identity(weight: Tensor) -> bool:
    return weight.equal(torch.eye(*weight.shape).to(weight))


def _check_identity(state: dict[str, Tensor], source: object) -> None:
    weight, bias = state.get("linear_2.weight"), state.get("linear_2.bias")
    if weight is None or weight.ndim != 2 or bias is None or not _is_identity(weight):
        raise UserError(f"{source}: multi_modal_projector.linear_2 is not the identity")
    if bias.any():
        raise UserError(f"{source}: multi_modal_projector.linear_2.bias is not zero")
