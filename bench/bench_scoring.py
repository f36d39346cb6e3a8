"""Scoring documents: ours against lm-evaluation-harness's Hugging Face backend.

From texts to log-likelihoods, tokenising included on both sides. The harness runs at its fastest
batch size of several, tried on a part of the documents first. The log-likelihoods of all requests
are compared before anything is timed. On a GPU also the whole sets at 7B, ours alone.

MMALIGN_BENCH_DOCUMENTS=100 pytest bench/bench_scoring.py: so many documents of each task, on a CPU.
"""

import importlib.util
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from torch import nn
from transformers import LlamaForCausalLM, PreTrainedTokenizer

from bench import documents
from bench.comparison import MATMUL, SCORE, Calls, Comparison, WrongResult, each
from bench.documents import Request
from bench.models import CPU_LARGE, LLAMA2_7B, Size, hugging_face_llama, random_decoder
from bench.shapes import DEVICE, ON_GPU
from mmalign.evaluation.scoring import ScoringPlan, plan_scoring, run_plan
from mmalign.flops import Workload, forward_flops
from mmalign.model.decoder import Decoder
from mmalign.system import DTYPES

OURS, HARNESS = "mmalign", "lm-evaluation-harness"
BATCH_SIZES = (1, 8, 32)
SOME = 12  # requests, where the harness does not run
TRIED = 4  # a batch size is tried on every fourth eight requests
TOLERANCE = {"fp32": (1e-3, 0.0), "bf16": (0.1, 5e-3)}  # absolute, and relative to the score


@dataclass
class Scoring(Comparison):
    """One model on about `limit` documents of each task; without a limit on all of them."""

    size: Size
    task: str  # or group of tasks: truthfulqa, ethics
    limit: int | None
    precision: str
    batch_tokens: int
    rounds: int = 3
    variants: tuple[str, ...] = (OURS, HARNESS)
    tokens: dict[str, int] = field(default_factory=dict, init=False)  # computed, with padding
    batch_size: int = field(init=False, repr=False)  # the harness's fastest
    plan: ScoringPlan = field(init=False, repr=False)

    benchmark, direction = "scoring", SCORE

    @property
    def case(self) -> str:
        count = f"about {self.limit} documents of each task" if self.limit else "all documents"
        kind = documents.source(self.limit)
        return f"{kind}{self.task}, {count}, {self.size.name}, {self.precision}"

    @cached_property
    def requests(self) -> list[Request]:
        return documents.requests(self.task, self.limit, self.size.decoder.vocab_size)

    def missing(self, variant: str) -> str | None:
        if variant == HARNESS and importlib.util.find_spec("lm_eval") is None:
            return "lm_eval is not installed"
        return None

    def calls(self, variants: Sequence[str]) -> Calls:
        decoder = random_decoder(self.size.decoder, DEVICE, DTYPES[self.precision]).eval()
        sides: dict[str, tuple[Callable[[], list[float]], nn.Module]] = {}
        sides[OURS] = self._ours(decoder), decoder.embed_tokens
        if HARNESS in variants:
            sides[HARNESS] = self._harness(decoder)
        scores = {}
        for name in variants:
            score, embedding = sides[name]
            hook = embedding.register_forward_pre_hook(self._counter(name))
            scores[name] = score()
            hook.remove()
        if HARNESS in variants:
            self.compare(scores)
        else:
            self._compare_some(scores[OURS], decoder)
        return Calls({name: sides[name][0] for name in variants})

    def _counter(self, variant: str) -> Callable[[nn.Module, tuple], None]:
        """Counts the ids that an embedding is given, padding included."""
        self.tokens[variant] = 0

        def count(module: nn.Module, arguments: tuple) -> None:
            self.tokens[variant] += arguments[0].numel()

        return count

    def compare(self, scores: Mapping[str, list[float]]) -> None:
        """Raises WrongResult where a log-likelihood differs by more than rounding."""
        absolute, relative = TOLERANCE[self.precision]
        for request, ours, theirs in zip(self.requests, scores[OURS], scores[HARNESS], strict=True):
            if not abs(ours - theirs) <= absolute + relative * abs(theirs):
                raise WrongResult(OURS, f"{ours}, {HARNESS} {theirs}, for {request}")

    def _compare_some(self, scores: Sequence[float], decoder: Decoder) -> None:
        """Beside transformers, one request at a time. Raises WrongResult."""
        model, (absolute, relative) = hugging_face_llama(decoder), TOLERANCE[self.precision]
        for i in range(0, len(scores), math.ceil(len(scores) / SOME)):
            request = self.plan.encoded[self.plan.unique_of[i]]
            ids = torch.from_numpy(request.input_ids).long().to(DEVICE)
            target_ids = torch.from_numpy(request.target_ids).long().to(DEVICE)
            with torch.no_grad():
                logits = model(ids[None]).logits[0, -len(target_ids) :].float()
            theirs = logits.log_softmax(1).gather(1, target_ids[:, None]).sum().item()
            if not abs(scores[i] - theirs) <= absolute + relative * abs(theirs):
                message = f"{scores[i]}, transformers {theirs}, for {self.requests[i]}"
                raise WrongResult(OURS, message)

    def _ours(self, decoder: Decoder) -> Callable[[], list[float]]:
        tokenizer, config = documents.tokenizer(self.limit), self.size.decoder
        limits = (config.max_position_embeddings, config.vocab_size, self.batch_tokens)

        def score() -> list[float]:
            self.plan = plan_scoring(tokenizer, self.requests, *limits, progress=False)
            found = run_plan(decoder, self.plan, DEVICE, progress=False)
            return [one.loglikelihood for one in found]

        return score

    def _harness(self, decoder: Decoder) -> tuple[Callable[[], list[float]], nn.Module]:
        model = hugging_face_llama(decoder)
        harness = Harness(model, documents.tokenizer_model())
        some = [x for i, x in enumerate(self.requests) if i // 8 % TRIED == 0]
        harness.scores(some[:1], 1)
        seconds = {}
        for batch_size in BATCH_SIZES:
            begin = time.perf_counter()
            harness.scores(some, batch_size)
            seconds[batch_size] = time.perf_counter() - begin
        self.batch_size = min(seconds, key=seconds.__getitem__)
        return partial(harness.scores, self.requests, self.batch_size), model.get_input_embeddings()

    def figures(self, variant: str, seconds: float) -> dict:
        """FLOPs are those of the projections and lm_head; attention, which is little, is not."""
        info = {
            "requests": len(self.requests),
            "requests_per_second": len(self.requests) / seconds,
            "tokens_computed": self.tokens[variant],
            "tokens_per_second": self.tokens[variant] / seconds,
            "threads": torch.get_num_threads(),
        }
        if variant == HARNESS:
            return info | {"batch_size": self.batch_size}
        rows = len(set(self.plan.targets.tokens.tolist()))
        work = forward_flops(Workload(self.size.decoder), [self.plan.num_tokens], rows, 0)
        return info | {"flops": work.projections + work.lm_head, "bound": MATMUL}


class SentencePieceTokenizer(PreTrainedTokenizer):
    """sentencepiece's own ids, without BOS, as the harness of 2023 scored LLaMA."""

    def __init__(self, model_file: Path):
        self.pieces = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
        super().__init__(bos_token="<s>", eos_token="</s>", unk_token="<unk>")

    @property
    def vocab_size(self) -> int:
        return self.pieces.vocab_size()

    def get_vocab(self) -> dict[str, int]:
        return {self.pieces.id_to_piece(i): i for i in range(self.vocab_size)}

    def _convert_token_to_id(self, token: str) -> int:
        return self.pieces.piece_to_id(token)

    def _convert_id_to_token(self, index: int) -> str:
        return self.pieces.id_to_piece(index)

    def encode(self, text: str, **options) -> list[int]:
        return self.pieces.encode(text)


class Harness:
    """lm-evaluation-harness's Hugging Face backend on a given model and tokenizer."""

    def __init__(self, model: LlamaForCausalLM, tokenizer_model: Path):
        from lm_eval.models.huggingface import HFLM

        harness: Any = HFLM  # the decorator that registers it hides its arguments
        self.lm = harness(
            pretrained=model,
            tokenizer=SentencePieceTokenizer(tokenizer_model),
            add_bos_token=False,
            prefix_token_id=2,  # </s> stands in for an empty context
            device=str(model.device),
        )

    def scores(self, requests: Sequence[Request], batch_size: int) -> list[float]:
        """Log-likelihood of every continuation."""
        from lm_eval.api.instance import Instance

        self.lm.batch_size_per_gpu = batch_size
        instances = [
            Instance("loglikelihood", doc={}, arguments=request, idx=i)
            for i, request in enumerate(requests)
        ]
        return [score for score, _ in self.lm.loglikelihood(instances, disable_tqdm=True)]


NUM_DOCUMENTS = os.environ.get("MMALIGN_BENCH_DOCUMENTS")  # of each task, timed once
if ON_GPU:
    COMPARISONS = [
        Scoring(LLAMA2_7B, "truthfulqa", None, "bf16", 16384, variants=(OURS,)),
        Scoring(LLAMA2_7B, "ethics", None, "bf16", 16384, rounds=1, variants=(OURS,)),
        Scoring(LLAMA2_7B, "truthfulqa", 100, "bf16", 16384),
        Scoring(LLAMA2_7B, "ethics", 200, "bf16", 16384),
    ]
elif NUM_DOCUMENTS:
    COMPARISONS = [
        Scoring(CPU_LARGE, task, int(NUM_DOCUMENTS), "fp32", 4096, rounds=1)
        for task in ("truthfulqa", "ethics")
    ]
else:
    COMPARISONS = [
        Scoring(CPU_LARGE, "truthfulqa", 4, "fp32", 4096),
        Scoring(CPU_LARGE, "ethics", 5, "fp32", 4096),
    ]
test_scoring = each(COMPARISONS)
