"""Log-likelihoods of continuations under a decoder, in packed batches.

requests -> tokens -> forwards (one for all requests that it can answer) -> batches -> scores

A request is tokenised as lm-evaluation-harness did in September 2023 (lm_eval/base.py at
00209e10f): context and continuation together, cut at the length of the context's own ids, no BOS;
its score is the plain sum of the continuation's log-probabilities.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from mmalign_kernels import pack_rows, target_logprobs
from tqdm import tqdm

from mmalign.errors import UserError
from mmalign.model.decoder import Decoder
from mmalign.tokenizer import Tokenizer

Request = tuple[str, str]  # (context, continuation)


@dataclass(frozen=True)
class Score:
    loglikelihood: float  # natural logarithm, summed over the continuation's tokens
    num_tokens: int  # of the continuation
    num_truncated: int  # tokens cut from the left of the context


@dataclass(frozen=True)
class EncodedRequest:
    input_ids: np.ndarray  # (num_inputs,) int32: all tokens but the last
    target_ids: np.ndarray  # (num_tokens,) int32: the continuation
    num_truncated: int


@dataclass
class Forward:
    """One sequence through the model and the requests that are read off its rows."""

    input_ids: np.ndarray  # (num_inputs,) int32
    requests: list[int] = field(default_factory=list)  # indices of unique requests


@dataclass(frozen=True)
class ScoringPlan:
    encoded: list[EncodedRequest]  # of the unique requests
    unique_of: list[int]  # request -> unique request
    names: list[str]  # of the unique requests, for messages
    batches: list[list[Forward]]

    @property
    def num_forwards(self) -> int:
        return sum(len(batch) for batch in self.batches)

    @property
    def num_tokens(self) -> int:
        """Tokens that go through the model."""
        return sum(len(forward.input_ids) for batch in self.batches for forward in batch)


def score_requests(
    decoder: Decoder,
    tokenizer: Tokenizer,
    requests: Sequence[Request],
    batch_tokens: int,
    device: str | torch.device = "cpu",
    progress: bool = True,
    names: Sequence[str] | None = None,
) -> list[Score]:
    """Scores (context, continuation) pairs; the same pair always gets the very same score.

    batch_tokens: most input tokens in one forward pass (a longer request goes alone); it and the
    order of the requests change scores by no more than rounding. names: what messages call each
    request. A context too long for the model loses tokens on its left, counted in the Score.
    UserError for an empty continuation, one longer than the model's context, and for log-
    probabilities that are not finite.
    """
    max_length, vocab_size = decoder.config.max_position_embeddings, decoder.config.vocab_size
    plan = plan_scoring(
        tokenizer, requests, max_length, vocab_size, batch_tokens, progress=progress, names=names
    )
    return run_plan(decoder, plan, device, progress)


def plan_scoring(
    tokenizer: Tokenizer,
    requests: Sequence[Request],
    max_length: int,
    vocab_size: int,
    batch_tokens: int,
    progress: bool = True,
    names: Sequence[str] | None = None,
) -> ScoringPlan:
    """Tokenises the requests and decides which forwards score them."""
    if batch_tokens < 1:
        raise UserError(f"batch_tokens is {batch_tokens}; expected at least 1")
    names = names or [f"request {i}" for i in range(len(requests))]
    first_of: dict[Request, int] = {}
    for i, request in enumerate(requests):
        first_of.setdefault(request, i)
    rank = {request: unique for unique, request in enumerate(first_of)}
    encoder = RequestEncoder(tokenizer, max_length, vocab_size)
    bar = tqdm(first_of, desc="tokenise", unit=" requests", disable=not progress, leave=False)
    encoded = [encoder.encode(*request, names[first_of[request]]) for request in bar]
    return ScoringPlan(
        encoded=encoded,
        unique_of=[rank[request] for request in requests],
        names=[names[i] for i in first_of.values()],
        batches=_batches(_share_forwards(encoded), batch_tokens),
    )


class RequestEncoder:
    def __init__(self, tokenizer: Tokenizer, max_length: int, vocab_size: int):
        self.tokenizer, self.max_length, self.vocab_size = tokenizer, max_length, vocab_size
        self._last_context: tuple[str, list[int]] = ("", [])  # requests of a document follow

    def encode(self, context: str, continuation: str, name: str) -> EncodedRequest:
        """The model's input and targets; at most max_length inputs, cut on the left."""
        if not continuation:
            raise UserError(f"{name}: the continuation is empty; there is nothing to score")
        context_ids, target_ids = self._split(context, continuation)
        if not context_ids:
            raise UserError(f"{name}: the tokenizer gives no token for the context {context!r}")
        if not 0 < len(target_ids) <= self.max_length:
            raise UserError(
                f"{name}: the continuation {continuation[:60]!r} is {len(target_ids)} tokens "
                f"after its context; expected 1 to {self.max_length} (the model's context)"
            )
        ids = np.array(context_ids + target_ids, dtype=np.int32)
        if ids.max() >= self.vocab_size:
            raise UserError(
                f"{name}: the tokenizer gives id {ids.max()}, but the model's vocabulary has "
                f"{self.vocab_size} entries; tokenizer and model do not belong together"
            )
        num_truncated = max(0, len(ids) - (self.max_length + 1))
        return EncodedRequest(ids[num_truncated:-1], ids[-len(target_ids) :], num_truncated)

    def _split(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        stripped = context.rstrip()
        # blanks at the seam go to the continuation, whose first token includes them
        continuation = context[len(stripped) :] + continuation
        if not stripped:  # the harness lets an empty context be one end-of-text token
            return [self.tokenizer.eos_token_id], self.tokenizer.encode(continuation)
        if self._last_context[0] != stripped:
            self._last_context = (stripped, self.tokenizer.encode(stripped))
        context_ids = self._last_context[1]
        return context_ids, self.tokenizer.encode(stripped + continuation)[len(context_ids) :]


def _share_forwards(encoded: list[EncodedRequest]) -> list[Forward]:
    """The fewest sequences of which every request's input is a prefix.

    A causal model's rows do not depend on what follows, so " yes" and " no" share one forward, and
    the 1 token of " reasonable" is read off the forward of the 3 tokens of " unreasonable".
    """
    by_input: dict[bytes, list[int]] = {}
    for i, request in enumerate(encoded):
        by_input.setdefault(request.input_ids.astype(">i4").tobytes(), []).append(i)
    forwards: list[Forward] = []
    host = b""
    # big-endian ids sort as numbers do, so right after a prefix come the inputs that begin with it
    for key in sorted(by_input, reverse=True):
        if not host.startswith(key):
            host = key
            forwards.append(Forward(encoded[by_input[key][0]].input_ids))
        forwards[-1].requests += by_input[key]
    return forwards


def _batches(forwards: list[Forward], batch_tokens: int) -> list[list[Forward]]:
    """Longest first: memory peaks at once, and the remaining time is never underestimated."""
    batches: list[list[Forward]] = []
    room = 0
    # the tokens break ties, so that batches do not depend on the order of the requests
    for forward in sorted(forwards, key=lambda f: (-len(f.input_ids), f.input_ids.tobytes())):
        if len(forward.input_ids) > room or not batches:
            batches.append([])
            room = batch_tokens
        batches[-1].append(forward)
        room -= len(forward.input_ids)
    return batches


def run_plan(
    decoder: Decoder, plan: ScoringPlan, device: str | torch.device, progress: bool = True
) -> list[Score]:
    """Runs every batch of the plan; one Score a request."""
    scores: list[Score | None] = [None] * len(plan.encoded)
    bar = tqdm(
        total=plan.num_tokens,
        desc="score",
        unit=" tokens",
        unit_scale=True,
        disable=not progress,
        dynamic_ncols=True,
    )
    training = decoder.training
    decoder.eval()
    with bar, torch.no_grad():
        for batch in plan.batches:
            requests = [i for forward in batch for i in forward.requests]
            logprobs = _batch_logprobs(decoder, plan, batch, torch.device(device))
            lengths = [len(plan.encoded[i].target_ids) for i in requests]
            for i, values in zip(requests, logprobs.split(lengths), strict=True):
                scores[i] = _score(plan, i, values)
            bar.update(sum(len(forward.input_ids) for forward in batch))
    decoder.train(training)
    return [scores[unique] for unique in plan.unique_of]


def _batch_logprobs(
    decoder: Decoder, plan: ScoringPlan, batch: list[Forward], device: torch.device
) -> torch.Tensor:
    """Log-probability of every target token of the batch's requests, in order: (num_targets,)."""
    lengths = np.array([len(forward.input_ids) for forward in batch])
    starts = np.concatenate([[0], np.cumsum(lengths)])
    rows, targets = [], []
    for start, forward in zip(starts, batch, strict=False):
        for i in forward.requests:
            request = plan.encoded[i]
            end = start + len(request.input_ids)  # the last row predicts the last target
            rows.append(np.arange(end - len(request.target_ids), end))
            targets.append(request.target_ids)
    input_ids = np.concatenate([forward.input_ids for forward in batch])  # (total_tokens,)
    position_ids = np.concatenate([np.arange(length) for length in lengths])
    hidden_states = decoder(
        torch.from_numpy(input_ids).long().to(device),
        torch.from_numpy(position_ids).int().to(device),
        torch.from_numpy(starts).int().to(device),
        int(lengths.max()),
    )  # (total_tokens, hidden_size)
    # lm_head sees each row that is read once: few of the rows, and some with several targets
    read, row_of_target = np.unique(np.concatenate(rows), return_inverse=True)
    return target_logprobs(
        pack_rows(hidden_states, torch.from_numpy(read).to(device)),
        decoder.lm_head.weight,
        torch.from_numpy(np.concatenate(targets)).long().to(device),
        torch.from_numpy(row_of_target).to(device),
    ).cpu()


def _score(plan: ScoringPlan, i: int, logprobs: torch.Tensor) -> Score:
    loglikelihood = math.fsum(logprobs.tolist())
    if not math.isfinite(loglikelihood):
        raise UserError(
            f"{plan.names[i]}: the model gives a log-likelihood of {loglikelihood}; its weights or "
            "its precision are broken (try --precision fp32, or look for NaN in the weights)"
        )
    return Score(loglikelihood, len(logprobs), plan.encoded[i].num_truncated)
