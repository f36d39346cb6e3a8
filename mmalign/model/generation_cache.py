"""The KV cache of a batch of prompts: prefixes that several share, then the rows of each sequence.

Every call is one packed row of segments, prefixes and prompts or one token of each, whose attention
reads the cache through spans (prefix_attention): nothing is padded.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from mmalign_kernels import linear
from torch import Tensor

from mmalign.model.llava import Llava
from mmalign.model.positions import CachedPositions, KeyValues, PackedPositions
from mmalign.model.projector import ImageInputs
from mmalign.model.tiles import Pixels

_PROMPT_PASS = 8192  # most tokens in one forward pass over prompts, unless one is longer


@dataclass(frozen=True)
class Segment:
    """New tokens of one sequence, or of a prefix that several share."""

    input_ids: np.ndarray
    spans: list[tuple[int, int]]  # cache rows that they see; the last one ends with their own
    pixels: Pixels | None = None  # of these tokens
    is_read: bool = True  # whether the logits after its last token are wanted

    @property
    def first_position(self) -> int:
        return sum(end - begin for begin, end in self.spans) - len(self.input_ids)


class BatchCache:
    """num_rows rows in every layer, which segments fill and read."""

    def __init__(self, llava: Llava, num_rows: int):
        self.llava = llava
        config, weight = llava.decoder.config, llava.decoder.embed_tokens.weight
        self.layers = [KeyValues(config, num_rows, weight) for _ in llava.decoder.layers]

    def read(self, segments: Sequence[Segment]) -> Tensor:
        """Logits after every segment that is read, in order: (num_read, vocab_size).

        A segment sees rows of segments before it and of earlier calls.
        """
        logits = []
        while segments:
            num_tokens = np.cumsum([len(x.input_ids) for x in segments])
            num_chosen = max(1, int((num_tokens <= _PROMPT_PASS).sum()))
            logits.append(self._extend(segments[:num_chosen]))
            segments = segments[num_chosen:]
        return torch.cat(logits)

    def _extend(self, segments: Sequence[Segment]) -> Tensor:
        decoder = self.llava.decoder
        device = decoder.embed_tokens.weight.device
        # the host goes on launching while the device is at work
        to_device = partial(Tensor.to, device=device, non_blocking=True)
        lengths = [len(x.input_ids) for x in segments]
        spans = np.array([span for x in segments for span in x.spans])
        firsts = [x.first_position for x in segments]
        position_ids = [np.arange(n) + at for at, n in zip(firsts, lengths, strict=True)]
        cu_seqlens = np.cumsum([0, *lengths])
        position_ids = to_device(torch.from_numpy(np.concatenate(position_ids)).int())
        cu_spans = np.cumsum([0, *(len(x.spans) for x in segments)])
        numbers = (cu_seqlens, spans[:, 0], spans[:, 1], cu_spans)
        bounds, begins, ends, cu_spans = (torch.from_numpy(x).int() for x in numbers)
        tables = decoder.rotary.up_to(max(map(sum, zip(firsts, lengths, strict=True))))
        tokens = PackedPositions(*tables, position_ids, bounds, max(lengths))
        span = begins, ends, cu_spans
        positions = [CachedPositions(tokens, *span, layer) for layer in self.layers]
        ids = np.concatenate([x.input_ids for x in segments])
        rows = cu_seqlens[1:][[x.is_read for x in segments]] - 1
        hidden_states = decoder(
            to_device(torch.from_numpy(ids)),
            positions,
            self._images(segments, ids),
            to_device(torch.from_numpy(rows)) if len(rows) < len(ids) else None,
        )
        return linear(hidden_states, decoder.lm_head.weight)

    def _images(self, segments: Sequence[Segment], ids: np.ndarray) -> ImageInputs | None:
        pixels = [x.pixels for x in segments if x.pixels is not None]
        if not pixels:
            return None
        image_positions = torch.from_numpy(np.flatnonzero(ids == self.llava.image_token_id))
        return self.llava.image_inputs(pixels, image_positions)
