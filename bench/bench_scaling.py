"""How cost grows: a training step with samples and with their length, scoring with documents.

Each comparison doubles one quantity three times. `cost_per_unit` is the cost of a unit of work over
that of the cheapest row of at most its size: 1 where cost is linear. Work is samples or documents,
and FLOPs where samples grow longer (attention sees pairs of tokens).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from bench.comparison import SCORE, STEP, Calls, Comparison, each
from bench.documents import documents, tokenizer_model
from bench.models import CPU_SMALL, LLAMA2_7B, Size, random_decoder, random_llava
from bench.samples import Samples, samples_of
from bench.shapes import DEVICE, DTYPE, DTYPE_NAME, ON_GPU
from bench.train_step import MmalignStep, packed_batches, step_calls, step_config, step_flops
from mmalign.evaluation.scoring import score_requests
from mmalign.tokenizer import Tokenizer

STAGE = "pretrain"
FACTOR = 4 if ON_GPU else 1
SIZE = LLAMA2_7B if ON_GPU else CPU_SMALL
SHORT_IMAGES = replace(SIZE, vision=replace(SIZE.vision, image_size=56))  # nearly all is text


@dataclass
class Growth(Comparison):
    """Rows are amounts; `seconds` by amount, as far as they are measured."""

    name: str
    unit: str
    size: Size
    amounts: Sequence[int]
    seconds: dict[int, float] = field(default_factory=dict, init=False)

    benchmark, rounds = "scaling", 3

    @property
    def case(self) -> str:
        return f"{self.name}, {self.size.name}"

    @property
    def variants(self) -> list[str]:
        return [f"{amount} {self.unit}" for amount in self.amounts]

    def figures(self, variant: str, seconds: float) -> dict:
        amount = int(variant.split()[0])
        self.seconds[amount] = seconds
        costs = {self.work(n): s for n, s in self.seconds.items() if n <= amount}
        return {"seconds_per_unit": seconds / amount, "cost_per_unit": cost_per_unit(costs)}

    def work(self, amount: int) -> int:
        """What the time should be proportional to."""
        return amount


@dataclass
class Steps(Growth):
    """Training steps on one packed batch."""

    lengths: Callable[[int], list[int]]  # of the samples of an amount, images included

    direction = STEP

    @cached_property
    def samples(self) -> dict[int, Samples]:
        num_patches = self.size.vision.num_patches
        texts = {n: [x - num_patches for x in self.lengths(n)] for n in self.amounts}
        return {n: samples_of(STAGE, lengths, self.size) for n, lengths in texts.items()}

    def work(self, amount: int) -> int:
        return step_flops(self.size, STAGE, self.samples[amount])

    def calls(self, variants: Sequence[str]) -> Calls:
        model = random_llava(self.size, STAGE, DEVICE, DTYPE)
        config, steps = step_config(STAGE, DTYPE_NAME, 1 << 20), {}
        for variant in variants:
            samples = self.samples[int(variant.split()[0])]
            packed = packed_batches(samples, [list(range(len(samples)))], model.image_token_id)
            steps[variant] = MmalignStep(model, config, packed)
        return step_calls(steps)


@dataclass
class Documents(Growth):
    """Documents of about one length, without a prefix that all share."""

    direction = SCORE

    def calls(self, variants: Sequence[str]) -> Calls:
        decoder = random_decoder(self.size.decoder, DEVICE, DTYPE).eval()
        tokenizer = Tokenizer.from_pretrained(tokenizer_model())
        every = documents(("ethics_utilitarianism",), max(self.amounts))

        def score(variant: str) -> Callable[[], object]:
            some = every[: int(variant.split()[0])]
            requests = [request for document in some for request in document.requests]
            return lambda: score_requests(
                decoder, tokenizer, requests, 4096, DEVICE, progress=False
            )

        return Calls({variant: score(variant) for variant in variants})


def cost_per_unit(costs: Mapping[int, float]) -> float:
    """costs by amount of work: cost of a unit at the largest amount over the least of all."""
    largest = max(costs)
    return costs[largest] / largest / min(cost / amount for amount, cost in costs.items())


COMPARISONS = [
    Steps(
        f"{STAGE} step, samples of 512 tokens",
        "samples",
        SIZE,
        [n * FACTOR for n in (1, 2, 4, 8)],
        lambda count: [512] * count,
    ),
    Steps(
        f"{STAGE} step, {2 * FACTOR} samples of growing length",
        "tokens",
        SHORT_IMAGES,
        [n * FACTOR for n in (640, 1280, 2560, 5120)],
        lambda tokens: [tokens // (2 * FACTOR)] * 2 * FACTOR,
    ),
    Documents(
        "scoring, ETHICS utilitarianism", "documents", SIZE, [n * FACTOR for n in (16, 32, 64, 128)]
    ),
]
test_scaling = each(COMPARISONS)
