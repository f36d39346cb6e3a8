"""Log-likelihoods of continuations under a decoder: each distinct prefix is computed once.

requests -> tokens -> tree of shared prefixes -> packed batches -> scores

A score is the plain sum of the log-probabilities of the continuation's tokens.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NoReturn

import numpy as np
import torch
from mmalign_kernels import linear, target_logprobs
from torch import Tensor

from mmalign.command import progress_bar
from mmalign.errors import UserError
from mmalign.evaluation.prefix_tree import PrefixTree, TreeBatch, build_tree, cut_batches
from mmalign.evaluation.requests import EncodedRequest, Request, RequestEncoder, TextEncoder
from mmalign.model.config import DecoderConfig
from mmalign.model.decoder import Decoder
from mmalign.model.positions import (
    CachedPositions,
    PackedPositions,
    PathCache,
    PathPositions,
    cache_bytes,
)
from mmalign.tokenizer import Tokenizer

_TOKENISED_AT_ONCE = 2048  # requests, between two updates of the progress bar
_ROWS_OF_LOGITS = 1024  # at most in memory at once for the argmax


@dataclass(frozen=True)
class Score:
    loglikelihood: float  # natural logarithm, summed over the continuation's tokens
    num_tokens: int  # of the continuation
    num_truncated: int  # tokens removed from the left of the context
    is_greedy: bool | None = None  # whether greedy decoding gives it; None: not requested


@dataclass(frozen=True)
class ScoringPlan:
    encoded: list[EncodedRequest]  # of the unique requests
    unique_of: list[int]  # request -> unique request
    names: list[str]  # of the unique requests, for messages
    tree: PrefixTree  # of the unique requests' inputs
    batches: list[TreeBatch]

    @property
    def num_tokens(self) -> int:
        """Tokens that go through the model."""
        return len(self.tree.tokens)

    @property
    def num_tokens_harness(self) -> int:
        """The same in lm-evaluation-harness's Hugging Face backend, which merges only requests
        that differ in nothing but their last token."""
        inputs = {request.input_ids.tobytes() for request in self.encoded}
        return sum(map(len, inputs)) // np.dtype(np.int32).itemsize

    @property
    def path_rows(self) -> int:
        """Maximum number of tokens whose keys and values stay between batches, in every layer."""
        return max((batch.num_kept for batch in self.batches), default=0)

    @property
    def workspace_rows(self) -> int:
        """Maximum number of tokens whose keys and values a layer needs for one batch."""
        return max((x.num_kept + x.end - x.begin for x in self.batches), default=0)

    def cache_bytes(self, config: DecoderConfig, dtype: torch.dtype) -> int:
        """Memory of keys and values: a path in every layer, and a batch in one."""
        paths = config.num_hidden_layers * cache_bytes(config, self.path_rows, dtype)
        return paths + cache_bytes(config, self.workspace_rows, dtype)

    @cached_property
    def targets(self) -> "Targets":
        return Targets.of(self.encoded, self.tree)


@dataclass(frozen=True)
class Targets:
    """Every token whose log-probability is needed, in the order of the rows that predict it."""

    target_ids: np.ndarray  # (num_targets,)
    tokens: np.ndarray  # (num_targets,) the tree's token whose row predicts it, rising
    order: np.ndarray  # (num_targets,) its index among the unique requests' targets
    bounds: np.ndarray  # (num_requests + 1,) range of indices of each request

    @classmethod
    def of(cls, encoded: list[EncodedRequest], tree: PrefixTree) -> "Targets":
        nothing = np.empty(0, np.int64)
        pairs = zip(encoded, tree.paths, strict=True)
        tokens = [path[len(path) - len(request.target_ids) :] for request, path in pairs]
        tokens = np.concatenate((nothing, *tokens))
        target_ids = np.concatenate((nothing, *(request.target_ids for request in encoded)))
        order = np.argsort(tokens, kind="stable")
        lengths = [len(request.target_ids) for request in encoded]
        bounds = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))
        return cls(target_ids[order], tokens[order], order, bounds)

    def within(self, batch: TreeBatch) -> slice:
        return slice(*np.searchsorted(self.tokens, (batch.begin, batch.end)))


def score_requests(
    decoder: Decoder,
    tokenizer: Tokenizer,
    requests: Sequence[Request],
    batch_tokens: int,
    device: str | torch.device = "cpu",
    progress: bool = True,
    names: Sequence[str] | None = None,
) -> list[Score]:
    """Scores (context, continuation) pairs; equal pairs get bitwise equal scores.

    batch_tokens: input tokens per forward pass; it and the other requests change a score by
    rounding only, the order of the requests not at all. names: what messages call each request. A
    context too long for the model is truncated on the left, counted in the Score. Raises UserError
    for an empty continuation, one longer than the model's context, and log-probabilities that are
    not finite.
    """
    max_length, vocab_size = decoder.config.context_length, decoder.config.vocab_size
    plan = plan_scoring(
        tokenizer, requests, max_length, vocab_size, batch_tokens, progress=progress, names=names
    )
    return run_plan(decoder, plan, device, progress)


def plan_scoring(
    tokenizer: TextEncoder,
    requests: Sequence[Request],
    max_length: int,
    vocab_size: int,
    batch_tokens: int,
    progress: bool = True,
    names: Sequence[str] | None = None,
) -> ScoringPlan:
    """Tokenises the requests and decides which batches score them."""
    names = names or [f"request {i}" for i in range(len(requests))]
    first_of: dict[Request, int] = {}
    for i, request in enumerate(requests):
        first_of.setdefault(request, i)
    rank = {request: unique for unique, request in enumerate(first_of)}
    encoder = RequestEncoder(tokenizer, max_length, vocab_size)
    unique, unique_names = list(first_of), [names[i] for i in first_of.values()]
    options = {"desc": "tokenise", "unit": " requests", "disable": not progress, "leave": False}
    encoded = []
    with progress_bar(total=len(unique), **options) as bar:
        for begin in range(0, len(unique), _TOKENISED_AT_ONCE):
            some = slice(begin, begin + _TOKENISED_AT_ONCE)
            encoded += encoder.encode(unique[some], unique_names[some])
            bar.update(len(unique[some]))
    return make_plan(encoded, [rank[request] for request in requests], unique_names, batch_tokens)


def make_plan(
    encoded: list[EncodedRequest], unique_of: list[int], names: list[str], batch_tokens: int
) -> ScoringPlan:
    """The plan for requests that are already tokens; unique_of as in ScoringPlan."""
    tree = build_tree([request.input_ids for request in encoded])
    return ScoringPlan(encoded, unique_of, names, tree, cut_batches(tree, batch_tokens))


def run_plan(
    decoder: Decoder,
    plan: ScoringPlan,
    device: str | torch.device,
    progress: bool = True,
    greedy: bool = False,
    after_batch: Callable[[], None] | None = None,
) -> list[Score]:
    """Runs every batch of the plan; one Score per request, with is_greedy if `greedy`.

    greedy computes the logits of all rows that are read a second time. after_batch may raise, to
    end it.
    """
    logprobs = torch.empty(len(plan.targets.order))
    is_argmax = torch.empty(len(logprobs), dtype=torch.bool) if greedy else None
    options = {"desc": "score", "unit": " tokens", "unit_scale": True, "disable": not progress}
    bar = progress_bar(total=plan.num_tokens, **options)
    device, training = torch.device(device), decoder.training
    decoder.eval()
    with bar, torch.no_grad():
        for batch, targets, values in run_batches(decoder, plan, device):
            places = torch.from_numpy(plan.targets.order[plan.targets.within(batch)])
            logprobs[places] = values.cpu()
            if not values.isfinite().all():
                _raise_broken(decoder, plan, batch, device)
            if is_argmax is not None:
                is_argmax[places] = _are_argmax(decoder, *targets).cpu()
            bar.update(batch.end - batch.begin)
            if after_batch is not None:
                after_batch()
    decoder.train(training)
    return _scores(plan, logprobs, is_argmax)


def run_batches(
    decoder: Decoder, plan: ScoringPlan, device: torch.device
) -> Iterator[tuple[TreeBatch, tuple[Tensor, Tensor, Tensor], Tensor]]:
    """Every batch, what _read_targets gives for it, and the log-probabilities of its targets."""
    weight = decoder.embed_tokens.weight
    cache = PathCache(decoder.config, plan.path_rows, plan.workspace_rows, weight)
    for batch in plan.batches:
        wanted = plan.targets.within(batch)
        targets = _read_targets(decoder, plan, batch, wanted, cache, device)
        yield batch, targets, target_logprobs(targets[0], decoder.lm_head.weight, *targets[1:])


def _scores(plan: ScoringPlan, logprobs: Tensor, is_argmax: Tensor | None) -> list[Score]:
    """One per request; logprobs and is_argmax are those of all targets, (num_targets,)."""
    scores = []
    for request, bounds in zip(plan.encoded, pairwise(plan.targets.bounds.tolist()), strict=True):
        own = slice(*bounds)
        is_greedy = None if is_argmax is None else bool(is_argmax[own].all())
        total = math.fsum(logprobs[own].tolist())
        scores.append(Score(total, own.stop - own.start, request.num_truncated, is_greedy))
    return [scores[unique] for unique in plan.unique_of]


def _read_targets(
    decoder: Decoder,
    plan: ScoringPlan,
    batch: TreeBatch,
    wanted: slice,
    cache: PathCache,
    device: torch.device,
) -> tuple[Tensor, Tensor, Tensor]:
    """The arguments of target_logprobs, except lm_head's weight, for the batch's targets."""
    # each row goes through lm_head once, for all of its targets
    read, row_of_target = np.unique(plan.targets.tokens[wanted] - batch.begin, return_inverse=True)
    hidden_states = decoder(
        torch.from_numpy(plan.tree.tokens[batch.begin : batch.end]).long().to(device),
        _positions(decoder, plan.tree, batch, cache, device),
        rows=torch.from_numpy(read).to(device),
    )  # (num_read, hidden_size)
    target_ids = torch.from_numpy(plan.targets.target_ids[wanted]).to(device)
    return hidden_states, target_ids, torch.from_numpy(row_of_target).to(device)


def _are_argmax(
    decoder: Decoder, hidden_states: Tensor, target_ids: Tensor, row_of_target: Tensor
) -> Tensor:
    """Whether greedy decoding would pick each target: (num_targets,) bool."""
    argmax = [
        linear(rows, decoder.lm_head.weight).argmax(1)
        for rows in hidden_states.split(_ROWS_OF_LOGITS)
    ]
    return torch.cat(argmax)[row_of_target] == target_ids


def _positions(
    decoder: Decoder, tree: PrefixTree, batch: TreeBatch, cache: PathCache, device: torch.device
) -> list[PathPositions]:
    """What every layer's attention reads."""
    position_ids = torch.from_numpy(tree.depths[batch.begin : batch.end]).int().to(device)
    numbers = (batch.cu_seqlens, batch.span_begins, batch.span_ends, batch.cu_spans)
    cu_seqlens, begins, ends, cu_spans = (torch.from_numpy(x).int() for x in numbers)
    tokens = PackedPositions(
        *decoder.rotary.up_to(int(tree.depths[batch.begin : batch.end].max()) + 1),
        position_ids,
        cu_seqlens,
        int(np.diff(batch.cu_seqlens).max()),
    )
    positions = CachedPositions(tokens, begins, ends, cu_spans, cache.workspace)
    next_rows = torch.from_numpy(batch.next_rows).to(device)
    return [
        PathPositions(positions, path, batch.num_kept, next_rows, batch.next_depth)
        for path in cache.paths
    ]


def _raise_broken(
    decoder: Decoder, plan: ScoringPlan, batch: TreeBatch, device: torch.device
) -> NoReturn:
    """Names the request whose log-likelihood is not finite when it is scored alone.

    Other requests' keys and values have weight 0, but 0 times NaN is NaN: one spoils its batch.
    """
    for name, request, path in zip(plan.names, plan.encoded, plan.tree.paths, strict=True):
        if path[-1] < batch.begin or path[0] >= batch.end:
            continue
        alone = make_plan([request], [0], [name], len(path))
        cache = PathCache(decoder.config, 0, len(path), decoder.embed_tokens.weight)
        everything = slice(0, len(request.target_ids))
        targets = _read_targets(decoder, alone, alone.batches[0], everything, cache, device)
        values = target_logprobs(targets[0], decoder.lm_head.weight, *targets[1:])
        if not values.isfinite().all():
            raise UserError(
                f"{name}: the model gives a log-likelihood of {values.sum().item()}; its weights "
                "or its precision are broken (try --precision fp32, or look for NaN in the weights)"
            )
    raise AssertionError("log-probabilities are not finite in a batch, but each alone")
