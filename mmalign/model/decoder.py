"""The decoder on packed tokens: samples of any length in one row, without padding."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from mmalign.model.config import DecoderConfig
from mmalign.model.layers import DecoderLayer, Embedding, Linear, RMSNorm, RotaryTables
from mmalign.model.positions import KeyValues, PackedPositions, Positions, PrefixedPositions
from mmalign.model.projector import ImageInputs
from mmalign.model.recompute import POLICIES, Recompute, policy_by_layer

MAX_TABLE = 2**17  # positions that the rotary tables start with; they grow as needed


class Decoder(nn.Module):
    """embed_tokens -> layers -> norm; lm_head is applied by the loss, on the rows that need it.

    Parameters start uninitialised: load_decoder or init_weights fills them. With
    tie_word_embeddings lm_head.weight is embed_tokens.weight.
    """

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.layers = cast(Sequence[DecoderLayer], layers)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        self.rotary = RotaryTables(config, min(config.max_position_embeddings, MAX_TABLE))

    def set_recompute(self, policy: Recompute, num_layers: int | None = None) -> None:
        """The policy (recompute.py) of the first num_layers layers, None: of all."""
        assert policy in POLICIES, policy  # "auto" is decided by the memory plan
        policies = policy_by_layer(policy, num_layers, len(self.layers))
        for layer, chosen in zip(self.layers, policies, strict=True):
            layer.recompute = chosen

    def packed_positions(
        self,
        position_ids: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        prefix: Sequence[KeyValues] = (),
    ) -> Sequence[Positions]:
        """Positions of each layer, for samples as in PackedBatch.

        prefix: of each layer, keys and values of constant tokens before every sample, which have no
        rows of their own; position_ids count them.
        """
        prefix_length = len(prefix[0].keys) if prefix else 0
        cos, sin = self.rotary.up_to(prefix_length + max_seqlen)
        samples = PackedPositions(cos, sin, position_ids, cu_seqlens, max_seqlen)
        return [PrefixedPositions(samples, x) for x in prefix] or [samples] * len(self.layers)

    def forward(
        self,
        input_ids: Tensor,
        positions: Sequence[Positions],
        images: ImageInputs | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Final hidden states of a packed row, normed: ready for linear_cross_entropy.

        input_ids (total_tokens,); positions: of each layer, from packed_positions or with a cache.
        Returns (total_tokens, hidden_size); with rows (num_rows,) these rows alone, which is exact
        and saves most of the last layer's work for the others.
        """
        norms = [layer.input_layernorm for layer in self.layers] + [self.norm]
        normed, residual = self._embed(input_ids, images, norms[0])
        last = self.layers[-1]
        for layer, next_norm, where in zip(self.layers, norms[1:], positions, strict=True):
            layer_rows = rows if layer is last else None
            normed, residual = layer(normed, residual, next_norm, where, layer_rows)
        return normed

    def _embed(
        self, input_ids: Tensor, images: ImageInputs | None, norm: RMSNorm
    ) -> tuple[Tensor, Tensor]:
        """(norm(embeddings), embeddings), each (total_tokens, hidden_size), images included."""
        embeddings = self.embed_tokens(input_ids)
        if images is None:
            return norm(embeddings), embeddings
        for token_id, embedding in images.token_embeddings.items():
            embeddings = torch.where((input_ids == token_id)[:, None], embedding, embeddings)
        embeddings, normed = images.projector(images.features, embeddings, images.positions, norm)
        return normed, embeddings
