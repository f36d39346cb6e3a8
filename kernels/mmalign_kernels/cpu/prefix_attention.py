"""Prefix attention by csrc/cpu/prefix_attention.cpp."""

import numpy as np
import torch
from torch import Tensor

from ..operation import check_offsets
from ..reference import prefix_attention as reference
from .library import operation


def prefix_attention_update(
    qkv: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor, cu_seqlens: Tensor,
    max_seqlen: int, span_begins: Tensor, span_ends: Tensor, cu_spans: Tensor, keys: Tensor,
    values: Tensor, num_attention_heads: int,
) -> Tensor:  # fmt: skip
    spans = span_begins, span_ends, cu_spans
    if qkv.dtype != torch.float32:
        return reference.prefix_attention_update(
            qkv, cos, sin, position_ids, cu_seqlens, max_seqlen, *spans, keys, values,
            num_attention_heads,
        )  # fmt: skip
    _, lengths = check_offsets(cu_seqlens, max_seqlen, len(qkv))
    begins, ends, firsts = (x.numpy() for x in spans)
    reference.check_spans(np.array(lengths), np.diff(firsts), begins, ends, len(keys))
    tables = (x.contiguous() for x in (cos, sin, position_ids.int()))
    return operation("prefix_attention_update")(
        qkv.contiguous(), *tables, cu_seqlens.int(), *(x.int().contiguous() for x in spans),
        keys, values, num_attention_heads,
    )  # fmt: skip
