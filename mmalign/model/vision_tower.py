"""The vision tower, CLIP or SigLIP, up to the layer whose output the projector reads."""

from collections.abc import Sequence
from functools import partial
from typing import cast

import torch
from mmalign_kernels import full_attention, layer_norm, quick_gelu
from torch import Tensor, nn
from torch.nn.functional import gelu

from mmalign.model.config import VisionConfig
from mmalign.model.layers import Constants, Embedding, LayerNorm, Linear

_ACTIVATIONS = {
    "quick_gelu": quick_gelu,
    "gelu": gelu,
    "gelu_pytorch_tanh": partial(gelu, approximate="tanh"),
}


class VisionLayer(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        hidden_size = config.hidden_size
        self.layer_norm1 = LayerNorm(hidden_size, config.layer_norm_eps)
        self.qkv_proj = Linear(hidden_size, 3 * hidden_size, bias=True)
        self.out_proj = Linear(hidden_size, hidden_size, bias=True)
        self.layer_norm2 = LayerNorm(hidden_size, config.layer_norm_eps)
        self.fc1 = Linear(hidden_size, config.intermediate_size, bias=True)
        self.fc2 = Linear(config.intermediate_size, hidden_size, bias=True)
        self.num_attention_heads = config.num_attention_heads
        self.activation = _ACTIVATIONS[config.hidden_act]

    def forward(self, hidden_states: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        qkv = self.qkv_proj(_normed(hidden_states, self.layer_norm1))
        attended = full_attention(qkv, cu_seqlens, max_seqlen, self.num_attention_heads)
        hidden_states = hidden_states + self.out_proj(attended)
        expanded = self.activation(self.fc1(_normed(hidden_states, self.layer_norm2)))
        return hidden_states + self.fc2(expanded)


class VisionTower(nn.Module):
    """CLIPVisionModel's weights; forward gives hidden_states[-2] without the class token.

    SiglipVisionModel has no class token. Layers behind vision_feature_layer and post_layernorm are
    never computed; their weights are kept for the export. SigLIP's pooling head is not read.
    Parameters start uninitialised: load_vision_tower or init_weights fills them.
    """

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        hidden_size, patch_size = config.hidden_size, config.patch_size
        is_clip = config.kind.is_clip
        self.class_embedding = nn.Parameter(torch.empty(hidden_size)) if is_clip else None
        self.patch_embedding = Linear(3 * patch_size**2, hidden_size, bias=not is_clip)
        self.position_embedding = Embedding(config.seqlen, hidden_size)
        self.pre_layrnorm = LayerNorm(hidden_size, config.layer_norm_eps) if is_clip else None
        layers = nn.ModuleList(VisionLayer(config) for _ in range(config.num_hidden_layers))
        self.layers = cast(Sequence[VisionLayer], layers)
        self.post_layernorm = LayerNorm(hidden_size, config.layer_norm_eps)
        preprocessing = config.preprocessing
        self.pixels = Constants(
            mean=_per_channel(preprocessing.image_mean), std=_per_channel(preprocessing.image_std)
        )

    def forward(self, pixel_values: Tensor) -> Tensor:
        """pixel_values (num_images, 3, image_size, image_size) uint8, not normalised.

        Returns (num_images * num_patches, hidden_size). Keeps no graph while it is frozen.
        """
        trains = torch.is_grad_enabled() and self.position_embedding.weight.requires_grad
        with torch.set_grad_enabled(trains):
            num_images, seqlen = len(pixel_values), self.config.seqlen
            hidden_states = self._embed(pixel_values)
            if self.pre_layrnorm is not None:
                hidden_states = _normed(hidden_states, self.pre_layrnorm)
            cu_seqlens = torch.arange(
                0, (num_images + 1) * seqlen, seqlen, dtype=torch.int32, device=pixel_values.device
            )
            for layer in self.layers[: self.config.num_layers_used]:
                hidden_states = layer(hidden_states, cu_seqlens, seqlen)
            per_image = hidden_states.unflatten(0, (num_images, seqlen))
            return per_image[:, self.config.num_class_tokens :].flatten(0, 1)

    def normalize_pixels(self, pixel_values: Tensor) -> Tensor:
        """uint8 levels to zero mean and unit deviation, in the parameters' dtype."""
        mean, std = self.pixels.get_buffer("mean"), self.pixels.get_buffer("std")
        pixels = (pixel_values.float() / 255 - mean) / std
        return pixels.to(self.position_embedding.weight.dtype)

    def _embed(self, pixel_values: Tensor) -> Tensor:
        """Class token, if any, and patches of every image, (num_images * seqlen, hidden_size)."""
        size, num_images = self.config.patch_size, len(pixel_values)
        side = self.config.image_size // size
        pixels = self.normalize_pixels(pixel_values)[:, :, : side * size, : side * size]
        patches = pixels.unflatten(3, (side, size)).unflatten(2, (side, size))
        # (num_images, 3, rows, size, columns, size) -> one row of 3 * size * size values per patch
        patches = patches.permute(0, 2, 4, 1, 3, 5).reshape(num_images, side * side, -1)
        embedded = self.patch_embedding(patches)  # (num_images, num_patches, hidden_size)
        if self.class_embedding is not None:
            class_token = self.class_embedding.expand(num_images, 1, -1)
            embedded = torch.cat((class_token, embedded), 1)
        return (embedded + self.position_embedding.weight).flatten(0, 1)


def _normed(hidden_states: Tensor, norm: LayerNorm) -> Tensor:
    return layer_norm(hidden_states, norm.weight, norm.bias, norm.eps)


def _per_channel(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32).view(1, 3, 1, 1)
