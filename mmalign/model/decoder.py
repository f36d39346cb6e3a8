"""The LLaMA decoder on packed tokens: one row of samples, told apart by cu_seqlens."""

from collections.abc import Sequence

import torch
from mmalign_kernels import rms_norm
from torch import Tensor, nn

from mmalign.model.config import DecoderConfig
from mmalign.model.layers import (
    DecoderLayer,
    Embedding,
    Linear,
    PackedPositions,
    Positions,
    RMSNorm,
    RotaryTables,
)
from mmalign.model.positions import KeyValues, PrefixedPositions
from mmalign.model.projector import Projector


class Decoder(nn.Module):
    """embed_tokens -> layers -> norm; lm_head is applied by the loss, on the rows that need it.

    Parameters start uninitialised: load_decoder or init_weights fills them. With
    tie_word_embeddings lm_head.weight is embed_tokens.weight.
    """

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        self.rotary = RotaryTables(
            config.head_dim, config.rope_theta, config.max_position_embeddings
        )

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        image_features: Tensor | None = None,
        image_positions: Tensor | None = None,
        projector: Projector | None = None,
        token_rows: dict[int, Tensor] | None = None,
        rows: Tensor | None = None,
        prefix: Sequence[KeyValues] = (),
    ) -> Tensor:
        """Final hidden states of a packed row, normed: ready for linear_cross_entropy.

        input_ids (total_tokens,); position_ids and cu_seqlens as in PackedBatch. With a projector,
        rows image_positions of the embeddings are the projected image_features
        (num_images * num_patches, vision_hidden_size). token_rows gives single tokens another
        embedding, (hidden_size,) each. prefix: of each layer, of constant tokens that every sample
        follows, though they are not among its rows. Returns (total_tokens, hidden_size), or of
        these rows only, (num_rows,), which is exact and spares the others most of the last layer.
        """
        residual = self.embed_tokens(input_ids)  # (total_tokens, hidden_size)
        for token_id, row in (token_rows or {}).items():
            residual = torch.where((input_ids == token_id)[:, None], row, residual)
        normed, residual = self._enter(residual, image_features, image_positions, projector)
        prefix_length = len(prefix[0].keys) if prefix else 0
        cos, sin = self.rotary.up_to(prefix_length + max_seqlen)
        own = PackedPositions(cos, sin, position_ids, cu_seqlens, max_seqlen)
        positions = [PrefixedPositions(own, x) for x in prefix] or [own] * len(self.layers)
        return self._run_layers(normed, residual, positions, rows)

    def extend(
        self,
        input_ids: Tensor,
        positions: Sequence[Positions],
        rows: Tensor | None = None,
        image_features: Tensor | None = None,
        image_positions: Tensor | None = None,
        projector: Projector | None = None,
    ) -> Tensor:
        """Final hidden states, normed, of tokens that follow cached ones (kv_cache.py).

        input_ids (total_tokens,); positions: one of each layer; images and rows as in forward ->
        (total_tokens, hidden_size), or of these rows only, (num_rows,).
        """
        residual = self.embed_tokens(input_ids)
        normed, residual = self._enter(residual, image_features, image_positions, projector)
        return self._run_layers(normed, residual, positions, rows)

    def _enter(
        self,
        embedded: Tensor,
        image_features: Tensor | None,
        image_positions: Tensor | None,
        projector: Projector | None,
    ) -> tuple[Tensor, Tensor]:
        """(the stream after the first norm, the stream), images in their rows."""
        norm = self.layers[0].input_layernorm
        if projector is None:
            return rms_norm(embedded, norm.weight, norm.eps), embedded
        residual, normed = projector(image_features, embedded, image_positions, norm)
        return normed, residual

    def _run_layers(
        self,
        normed: Tensor,
        residual: Tensor,
        positions: Sequence[Positions],
        rows: Tensor | None = None,
    ) -> Tensor:
        norms = [layer.input_layernorm for layer in self.layers[1:]] + [self.norm]
        for layer, next_norm, where in zip(self.layers, norms, positions, strict=True):
            wanted = rows if next_norm is self.norm else None
            normed, residual = layer(normed, residual, next_norm, where, wanted)
        return normed
