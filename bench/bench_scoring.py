"""Scoring documents: ours against lm-evaluation-harness's Hugging Face backend.

From texts to log-likelihoods, tokenising included on both sides. The harness runs at its fastest
batch size of several, tried on a part of the documents first. The log-likelihoods of the round that
warms up are compared before anything is timed.

MMALIGN_BENCH_DOCUMENTS=100 pytest bench/bench_scoring.py: so many documents of each task, on a CPU.
"""

import importlib.util
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import nn

from bench.comparison import Calls, Figures, WrongResult, each_row
from bench.examination import documents, is_real, tokenizer_model
from bench.models import CPU_LARGE, LLAMA2_7B, Size, hugging_face_llama, random_decoder
from mmalign.evaluation.scoring import score_requests
from mmalign.evaluation.tasks.task import Document
from mmalign.model.decoder import Decoder
from mmalign.system import DTYPES
from mmalign.tokenizer import Tokenizer

OURS, HARNESS = "mmalign", "lm-evaluation-harness"
BATCH_SIZES = (1, 8, 32)
TRIED = 4  # a batch size is tried on every fourth document
TOLERANCE = {"fp32": (1e-3, 0.0), "bf16": (0.1, 5e-3)}  # absolute, and relative to the score


@dataclass
class Scoring:
    """One model on one set of documents."""

    size: Size
    tasks: tuple[str, ...]
    limit: int  # documents of each task
    precision: str
    batch_tokens: int
    rounds: int = 3
    tokens: dict[str, int] = field(default_factory=dict)  # computed by a variant, padding included
    batch_size: int | None = None  # the harness's fastest

    part, benchmark, direction = "evaluate", "scoring", "score"
    variants = (OURS, HARNESS)

    @property
    def case(self) -> str:
        source = "" if is_real() else "toy world's "
        count = f"about {self.limit} documents of each task"
        return f"{source}{' '.join(self.tasks)}, {count}, {self.size.name}, {self.precision}"

    @cached_property
    def documents(self) -> list[Document]:
        return documents(self.tasks, self.limit)

    @property
    def requests(self) -> list[tuple[str, str]]:
        return [request for document in self.documents for request in document.requests]

    def missing(self, variant: str, device: torch.device) -> str | None:
        if variant == HARNESS and importlib.util.find_spec("lm_eval") is None:
            return "lm_eval is not installed"
        return None

    def limits(self) -> Mapping[str, float | int]:
        rounds = {"min_rounds": self.rounds, "max_rounds": self.rounds}
        return rounds | {"budget_seconds": 0, "warm_up_rounds": 1}

    def calls(self, variants: Sequence[str], device: torch.device) -> Calls:
        decoder = random_decoder(self.size.decoder, device, DTYPES[self.precision]).eval()
        sides = {OURS: self._ours(decoder, device)}
        if HARNESS in variants:
            sides[HARNESS] = self._harness(decoder)
        scores: dict[str, list[float]] = {}
        return Calls({name: self._call(name, sides[name], scores) for name in variants})

    def _call(self, name: str, side: "Side", scores: dict) -> Callable[[], object]:
        """The first call is the warm-up: counted and compared."""

        def call() -> None:
            if name in scores:
                side.score()
                return
            with counted_tokens(side.embedding) as count:
                scores[name] = side.score()
            self.tokens[name] = count.tokens
            if len(scores) == 2:
                self.compare(scores)

        return call

    def compare(self, scores: Mapping[str, list[float]]) -> None:
        """Raises WrongResult where a log-likelihood differs by more than rounding."""
        absolute, relative = TOLERANCE[self.precision]
        for request, ours, theirs in zip(self.requests, scores[OURS], scores[HARNESS], strict=True):
            if not abs(ours - theirs) <= absolute + relative * abs(theirs):
                raise WrongResult(OURS, f"{ours}, the harness {theirs}, for {request}")

    def _ours(self, decoder: Decoder, device: torch.device) -> "Side":
        tokenizer = Tokenizer.from_pretrained(tokenizer_model())

        def score() -> list[float]:
            found = score_requests(
                decoder, tokenizer, self.requests, self.batch_tokens, device, progress=False
            )
            return [one.loglikelihood for one in found]

        return Side(score, decoder.embed_tokens)

    def _harness(self, decoder: Decoder) -> "Side":
        from bench.harness import Harness

        model = hugging_face_llama(decoder)
        harness = Harness(model, tokenizer_model())
        some = [request for document in self.documents[::TRIED] for request in document.requests]
        harness.scores(some[:1], 1)
        seconds = {}
        for batch_size in BATCH_SIZES:
            begin = time.perf_counter()
            harness.scores(some, batch_size)
            seconds[batch_size] = time.perf_counter() - begin
        self.batch_size = min(seconds, key=seconds.get)
        embedding = model.get_input_embeddings()
        return Side(lambda: harness.scores(self.requests, self.batch_size), embedding)

    def figures(self, variant: str, seconds: float, ceilings: Mapping) -> Figures:
        extra = {
            "documents_per_second": len(self.documents) / seconds,
            "requests_per_second": len(self.requests) / seconds,
            "documents": len(self.documents),
            "requests": len(self.requests),
            "tokens_computed": self.tokens[variant],
            "threads": torch.get_num_threads(),
        }
        if variant == HARNESS:
            extra["batch_size"] = self.batch_size
        return Figures(extra=extra)


@dataclass(frozen=True)
class Side:
    score: Callable[[], list[float]]
    embedding: nn.Module  # sees every token that is computed


@dataclass
class Count:
    tokens: int = 0


@contextmanager
def counted_tokens(embedding: nn.Module) -> Iterator[Count]:
    """Counts the ids that an embedding is given, padding included."""
    count = Count()

    def add(module: nn.Module, arguments: tuple) -> None:
        count.tokens += arguments[0].numel()

    hook = embedding.register_forward_pre_hook(add)
    try:
        yield count
    finally:
        hook.remove()


def on_cpu(documents: int | None) -> list[Scoring]:
    """A few documents, thrice; or as many as are asked for, once."""
    if documents is not None:
        return [
            Scoring(CPU_LARGE, (task,), documents, "fp32", 4096, rounds=1)
            for task in ("truthfulqa", "ethics")
        ]
    return [
        Scoring(CPU_LARGE, ("truthfulqa",), 4, "fp32", 4096),
        Scoring(CPU_LARGE, ("ethics",), 5, "fp32", 4096),
    ]


ON_GPU = [
    Scoring(LLAMA2_7B, ("truthfulqa",), 100, "bf16", 16384),
    Scoring(LLAMA2_7B, ("ethics",), 200, "bf16", 16384),
]


ASKED = os.environ.get("MMALIGN_BENCH_DOCUMENTS")  # of each task


@each_row(ON_GPU if torch.cuda.is_available() else on_cpu(ASKED and int(ASKED)))
def test_scoring(row, compare):
    compare(row)
