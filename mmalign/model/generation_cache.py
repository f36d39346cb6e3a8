"""The KV cache of a batch of prompts: a shared prefix, then the rows of each sequence.

Every call is one packed row of segments, the prompts or one token of each, whose attention reads
the cache through spans (prefix_attention): nothing is padded.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from mmalign_kernels import linear
from torch import Tensor

from mmalign.model.llava import Llava
from mmalign.model.positions import CachedPositions, KeyValues, PackedPositions
from mmalign.model.projector import ImageInputs

_PROMPT_PASS = 8192  # most tokens in one forward pass over prompts, unless one is longer


class RowsOfPrompt(Protocol):
    """A prompt and where its own cache rows begin."""

    prompt: np.ndarray  # (num_tokens,)
    pixels: Tensor | None  # (num_images, 3, image_size, image_size) uint8
    first_row: int


@dataclass(frozen=True)
class Segment:
    """New tokens of one sequence, or of the shared prefix."""

    input_ids: np.ndarray
    first_position: int
    spans: list[tuple[int, int]]  # cache rows that they see; the last one ends with their own


class BatchCache:
    """num_rows rows in every layer: first the prefix that all prompts share, num_shared tokens."""

    def __init__(self, llava: Llava, num_shared: int, num_rows: int):
        self.llava, self.num_shared = llava, num_shared
        config, weight = llava.decoder.config, llava.decoder.embed_tokens.weight
        self.layers = [KeyValues(config, num_rows, weight) for _ in llava.decoder.layers]

    def read_prompts(self, prompts: Sequence[RowsOfPrompt]) -> Tensor:
        """Logits of every prompt's last token, (num_prompts, vocab_size)."""
        logits, shared, device = [], [], self.llava.decoder.embed_tokens.weight.device
        if self.num_shared:
            ids = prompts[0].prompt[: self.num_shared]
            shared = [Segment(ids, 0, [(0, self.num_shared)])]
        while prompts:
            own = [self._segment(x, x.prompt[self.num_shared :], self.num_shared) for x in prompts]
            num_tokens = np.cumsum([len(x.input_ids) for x in own]) + self.num_shared * len(shared)
            num_chosen = max(1, int((num_tokens <= _PROMPT_PASS).sum()))
            segments, chosen = shared + own[:num_chosen], prompts[:num_chosen]
            lasts = np.cumsum([len(x.input_ids) for x in segments])[-num_chosen:] - 1
            rows = torch.from_numpy(lasts).to(device)
            logits.append(self._extend(segments, rows, self._images(segments, chosen)))
            shared, prompts = [], prompts[num_chosen:]
        return torch.cat(logits)

    def step(
        self, prompts: Sequence[RowsOfPrompt], token_ids: list[int], positions: list[int]
    ) -> Tensor:
        """Logits after one more token of each, at this position: (num_prompts, vocab_size)."""
        triples = zip(prompts, token_ids, positions, strict=True)
        return self._extend([self._segment(x, np.array([i]), at) for x, i, at in triples])

    def _extend(
        self,
        segments: list[Segment],
        rows: Tensor | None = None,
        images: ImageInputs | None = None,
    ) -> Tensor:
        """Logits of these rows of the packed segments, None: of all: (num_rows, vocab_size)."""
        decoder = self.llava.decoder
        device = decoder.embed_tokens.weight.device
        lengths = [len(x.input_ids) for x in segments]
        spans = np.array([span for x in segments for span in x.spans])
        last = max(x.first_position + n for x, n in zip(segments, lengths, strict=True))
        tables = decoder.rotary.up_to(last)
        position_ids = [
            np.arange(n) + x.first_position for x, n in zip(segments, lengths, strict=True)
        ]
        numbers = (
            np.concatenate(position_ids),
            np.cumsum([0, *lengths]),
            spans[:, 0],
            spans[:, 1],
            np.cumsum([0, *(len(x.spans) for x in segments)]),
        )
        position_ids, cu_seqlens, begins, ends, cu_spans = (
            torch.from_numpy(x).int().to(device) for x in numbers
        )
        tokens = PackedPositions(*tables, position_ids, cu_seqlens, max(lengths))
        span = begins, ends, cu_spans
        positions = [CachedPositions(tokens, *span, layer) for layer in self.layers]
        ids = torch.from_numpy(np.concatenate([x.input_ids for x in segments])).to(device)
        hidden_states = decoder(ids, positions, images, rows)
        return linear(hidden_states, decoder.lm_head.weight)

    def _segment(self, prompt: RowsOfPrompt, input_ids: np.ndarray, position: int) -> Segment:
        shared = [(0, self.num_shared)] if self.num_shared else []
        end = prompt.first_row + position - self.num_shared + len(input_ids)
        return Segment(input_ids, position, [*shared, (prompt.first_row, end)])

    def _images(
        self, segments: list[Segment], prompts: Sequence[RowsOfPrompt]
    ) -> ImageInputs | None:
        pixels = [x.pixels for x in prompts if x.pixels is not None]
        if not pixels:
            return None
        tower, projector = self.llava.vision_tower, self.llava.projector
        assert tower is not None and projector is not None
        device = self.llava.decoder.embed_tokens.weight.device
        ids = np.concatenate([x.input_ids for x in segments])
        image_positions = torch.from_numpy(np.flatnonzero(ids == self.llava.image_token_id))
        features = tower(torch.cat(pixels).to(device))
        return ImageInputs(features, image_positions.to(device), projector)
