"""Attention after prefixes: of a scoring batch to its tree, and of samples to one constant prefix.

The peer gives PyTorch's attention a dense mask, which is made untimed.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from mmalign_kernels import costs, prefix_attention, shared_prefix_attention
from torch import Tensor

from bench.bench_attention import rotate
from bench.comparison import BACKWARD, FORWARD, MATMUL, each
from bench.documents import NumberTokenizer, synthetic_truthfulqa
from bench.operation import Case, Operation, costs_of
from bench.peers import Inputs, Layout, Variant, ours
from bench.shapes import (
    DECODER_SHAPES,
    DEVICE,
    DTYPE,
    DTYPE_NAME,
    NAMES,
    activations,
    cu_seqlens_of,
    position_ids_of,
    sample_lengths,
)
from mmalign.evaluation.scoring import plan_scoring
from mmalign.model.config import DecoderConfig

PREFIX = 40  # tokens of the header that samples of stage 1 share: v0 has 37


def rotated(i: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v (tokens, heads, head_dim)."""
    q, k, v = i.qkv.view(len(i.qkv), 3, i.num_heads, -1).unbind(1)
    cos, sin = i.cos[i.position_ids][:, None], i.sin[i.position_ids][:, None]
    return rotate(q, cos, sin), rotate(k, cos, sin), v


def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out[0].transpose(0, 1).flatten(1)


def drawn(config: DecoderConfig, tokens: int, prefix_rows: int) -> Inputs:
    """Random qkv, and keys and values of `prefix_rows` earlier tokens."""
    heads, head_dim = config.num_attention_heads, config.head_dim
    places = torch.arange(config.max_position_embeddings, device=DEVICE).float()
    columns = torch.arange(0, head_dim, 2, device=DEVICE).float()
    angles = torch.outer(places, config.rope_theta ** -(columns / head_dim))
    keys, values = (
        activations(prefix_rows, heads * head_dim, spread=0.2).view(-1, heads, head_dim)
        for _ in "kv"
    )
    qkv = activations(tokens, 3 * heads * head_dim, spread=0.2)
    rotary = dict(cos=angles.cos(), sin=angles.sin())
    return Inputs(qkv=qkv, keys=keys, values=values, num_heads=heads, **rotary)


def cost(config: DecoderConfig, tokens: int, prefix_rows: int, pairs: int) -> costs.Cost:
    """Of a forward pass, as a roofline counts it."""
    size = config.num_attention_heads * config.head_dim
    num_bytes = (4 * tokens + 2 * prefix_rows) * size * DTYPE.itemsize
    return costs.Cost(num_bytes, 4 * size * pairs, num_bytes, 4 * size * pairs)


# ---- a batch of the prefix tree ----


def our_prefix(i: Inputs) -> Tensor:
    samples = i.cu_seqlens, i.max_seqlen, i.span_begins, i.span_ends, i.cu_spans
    return prefix_attention(
        i.qkv, i.cos, i.sin, i.position_ids, *samples, i.keys, i.values, i.num_heads
    )


def dense_prefix(i: Inputs) -> Tensor:
    q, k, v = rotated(i)
    return dense(q, torch.cat((i.keys[: -len(k)], k)), torch.cat((i.values[: -len(v)], v)), i.mask)


def _own_cache(i: Inputs) -> Inputs:
    own = Inputs(**vars(i))  # the operation writes the batch's rows
    own.keys, own.values = i.keys.clone(), i.values.clone()
    return own


DENSE_PREFIX = Variant("torch sdpa, dense mask", dense_prefix)
PREFIX_ATTENTION = Operation(
    "prefix_attention",
    [*ours("prefix_attention", our_prefix, Layout(enter=_own_cache)), DENSE_PREFIX],
    DENSE_PREFIX,
    MATMUL,
    (FORWARD,),
)


def spans_mask(batch, capacity: int) -> Tensor:
    """(tokens, capacity): the spans of each token's segment, itself causal."""
    tokens = batch.end - batch.begin
    mask = torch.zeros(tokens, capacity, dtype=torch.bool, device=DEVICE)
    segments = pairwise(batch.cu_seqlens.tolist())
    for (begin, end), spans in zip(segments, pairwise(batch.cu_spans.tolist()), strict=True):
        for span in range(*spans):
            mask[begin:end, batch.span_begins[span] : batch.span_ends[span]] = True
    rows = torch.arange(tokens, device=DEVICE)[:, None]
    places = torch.arange(capacity, device=DEVICE) - (capacity - tokens)
    return mask & (places <= rows)


def prefix_case(config: DecoderConfig, tokens: int) -> Case:
    """A batch from the middle of a tree as TruthfulQA's."""
    requests = synthetic_truthfulqa(config.vocab_size)
    limits = config.max_position_embeddings, config.vocab_size, tokens
    plan = plan_scoring(NumberTokenizer(), requests[: tokens // 2], *limits, progress=False)
    batch = plan.batches[len(plan.batches) // 2]
    rows, capacity = batch.end - batch.begin, batch.num_kept + batch.end - batch.begin
    segments, spans = batch.cu_seqlens.tolist(), batch.cu_spans.tolist()
    seen = (batch.span_ends - batch.span_begins).tolist()
    pairs = sum(
        (end - begin) * sum(seen[first:last]) - (end - begin) * (end - begin - 1) // 2
        for (begin, end), (first, last) in zip(pairwise(segments), pairwise(spans), strict=True)
    )

    def make() -> Inputs:
        inputs = drawn(config, rows, capacity)
        depths = plan.tree.depths[batch.begin : batch.end]
        inputs.position_ids = torch.from_numpy(depths).int().to(DEVICE)
        for name in ("cu_seqlens", "span_begins", "span_ends", "cu_spans"):
            setattr(inputs, name, torch.from_numpy(getattr(batch, name)).int())
        inputs.max_seqlen = max(end - begin for begin, end in pairwise(segments))
        inputs.mask = spans_mask(batch, capacity)
        return inputs

    title = f"{NAMES[config]}, {rows} tokens in {len(segments) - 1} segments, {DTYPE_NAME}"
    return Case(title, make, (), {FORWARD: cost(config, rows, capacity - rows, pairs)})


# ---- samples after one constant prefix ----


def our_shared(i: Inputs) -> Tensor:
    samples = i.cos, i.sin, i.position_ids, i.cu_seqlens, i.max_seqlen
    return shared_prefix_attention(i.qkv, *samples, i.keys, i.values, i.num_heads)


def dense_shared(i: Inputs) -> Tensor:
    q, k, v = rotated(i)
    return dense(q, torch.cat((i.keys, k)), torch.cat((i.values, v)), i.mask)


DENSE_SHARED = Variant("torch sdpa, dense mask", dense_shared)
SHARED_PREFIX_ATTENTION = Operation(
    "shared_prefix_attention",
    [*ours("shared_prefix_attention", our_shared), DENSE_SHARED],
    DENSE_SHARED,
    MATMUL,
    (FORWARD, BACKWARD),
)


def samples_mask(lengths: Sequence[int]) -> Tensor:
    """(tokens, PREFIX + tokens): the prefix, and the sample's earlier tokens."""
    sample = torch.repeat_interleave(torch.tensor(lengths, device=DEVICE))
    own = (sample[:, None] == sample).tril()
    return torch.cat((own.new_ones(len(own), PREFIX), own), 1)


def shared_case(config: DecoderConfig, tokens: int) -> Case:
    lengths = sample_lengths("finetune", tokens)

    def make() -> Inputs:
        inputs = drawn(config, tokens, PREFIX)
        inputs.cu_seqlens, inputs.max_seqlen = cu_seqlens_of(lengths, DEVICE), max(lengths)
        inputs.position_ids = position_ids_of(lengths, DEVICE) + PREFIX
        inputs.mask = samples_mask(lengths)
        return inputs

    pairs = tokens * PREFIX + sum(n * (n + 1) // 2 for n in lengths)
    forward = cost(config, tokens, PREFIX, pairs)
    backward = costs.Cost(*(5 * x // 2 for x in vars(forward).values()))
    title = f"{NAMES[config]}, {tokens} tokens in {len(lengths)} samples, {DTYPE_NAME}"
    return Case(title, make, ("qkv",), costs_of(costs.Passes(forward, backward)))


FIRST = DECODER_SHAPES[0]
COMPARISONS = [
    *PREFIX_ATTENTION.comparisons([prefix_case(*FIRST)]),
    *SHARED_PREFIX_ATTENTION.comparisons([shared_case(*FIRST)]),
]
test_prefix_attention = each(COMPARISONS)
