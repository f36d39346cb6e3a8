"""How cost grows: a training step with samples and with their length, scoring with documents.

Each comparison doubles one quantity three times. `per_unit_over_least` compares a row's seconds a
unit of work with the cheapest row of at most its size; above LINEAR the row says "not linear". Work
is samples or documents, and FLOPs where samples grow longer (attention sees pairs of tokens).
Memory of a step is held to the same bound, by the amount itself.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch

from bench.comparison import Calls, Figures, each_row
from bench.examination import documents, tokenizer_model
from bench.models import CPU_SMALL, LLAMA2_7B, Size, random_decoder, random_llava
from bench.samples import Samples, samples_of
from bench.train_sides import MmalignStep, packed_batches, peak_bytes, step_flops
from mmalign.evaluation.scoring import score_requests
from mmalign.model.llava import Llava
from mmalign.tokenizer import Tokenizer

LINEAR = 1.2  # largest growth of the cost of a unit that counts as linear
ON_GPU = torch.cuda.is_available()
SIZE, DTYPE = (LLAMA2_7B, torch.bfloat16) if ON_GPU else (CPU_SMALL, torch.float32)
STAGE = "pretrain"


class Work(Protocol):
    """What grows."""

    name: str
    unit: str
    size: Size
    amounts: Sequence[int]

    def calls(self, device: torch.device) -> dict[int, Callable[[], object]]:
        """By amount."""

    def work(self, amount: int) -> int:
        """What the time should be proportional to."""


@dataclass(frozen=True)
class Steps:
    """Training steps on one packed batch."""

    name: str
    unit: str
    size: Size
    amounts: Sequence[int]
    lengths: Callable[[int], list[int]]  # of the samples of an amount, images included

    def calls(self, device: torch.device) -> dict[int, Callable[[], object]]:
        model = random_llava(self.size, STAGE, device, DTYPE)
        return {amount: self._step(amount, model, device) for amount in self.amounts}

    def _step(self, amount: int, model: Llava, device: torch.device) -> MmalignStep:
        samples = self._samples(amount)
        everything = [list(range(len(samples)))]
        packed = packed_batches(samples, everything, model.image_token_id)
        step = MmalignStep(model, packed, device)
        step.start()
        return step

    def _samples(self, amount: int) -> Samples:
        vision, token_id = self.size.vision, self.size.image_token_id
        texts = [length - vision.num_patches for length in self.lengths(amount)]
        return samples_of(STAGE, texts, vision.num_patches, vision.image_size, token_id)

    def work(self, amount: int) -> int:
        return step_flops(self.size, STAGE, self._samples(amount))


@dataclass(frozen=True)
class Documents:
    """Documents of about one length, without a prefix that all share."""

    size: Size
    amounts: Sequence[int]

    name, unit = "scoring, ETHICS utilitarianism", "documents"

    def work(self, amount: int) -> int:
        return amount

    def calls(self, device: torch.device) -> dict[int, Callable[[], object]]:
        decoder = random_decoder(self.size.decoder, device, DTYPE).eval()
        tokenizer = Tokenizer.from_pretrained(tokenizer_model())
        every = documents(("ethics_utilitarianism",), max(self.amounts))

        def score(amount: int) -> Callable[[], object]:
            requests = [request for document in every[:amount] for request in document.requests]
            return lambda: score_requests(
                decoder, tokenizer, requests, 4096, device, progress=False
            )

        return {amount: score(amount) for amount in self.amounts}


@dataclass
class Growth:
    of: Work
    seconds: dict[int, float] = field(default_factory=dict)
    peaks: dict[int, int] = field(default_factory=dict)

    part, benchmark, direction = "train", "scaling", "step"

    @property
    def case(self) -> str:
        return f"{self.of.name}, {self.of.size.name}"

    @property
    def variants(self) -> list[str]:
        return [f"{amount} {self.of.unit}" for amount in self.of.amounts]

    def missing(self, variant: str, device: torch.device) -> str | None:
        return None

    def limits(self) -> Mapping[str, float | int]:
        return {"budget_seconds": 0, "min_rounds": 3, "max_rounds": 3, "warm_up_rounds": 1}

    def calls(self, variants: Sequence[str], device: torch.device) -> Calls:
        made = self.of.calls(device)
        return Calls(
            {f"{n} {self.of.unit}": self._call(n, call, device) for n, call in made.items()}
        )

    def _call(
        self, amount: int, call: Callable[[], object], device: torch.device
    ) -> Callable[[], object]:
        def measured() -> None:
            if device.type == "cpu" and amount not in self.peaks:  # the warm-up round
                self.peaks[amount] = peak_bytes(call)
            else:
                call()

        return measured

    def figures(self, variant: str, seconds: float, ceilings: Mapping) -> Figures:
        amount = int(variant.split()[0])
        self.seconds[amount] = seconds
        growth = growth_of_unit({self.of.work(n): s for n, s in self.seconds.items()})
        extra = {
            "amount": amount,
            "unit": self.of.unit,
            "seconds_per_unit": seconds / amount,
            "per_unit_over_least": growth,
            "time": verdict(growth),
        }
        if amount in self.peaks:
            extra["step_memory_bytes"] = self.peaks[amount]
            peaks = {n: peak for n, peak in self.peaks.items() if n <= amount}
            extra["memory"] = verdict(growth_of_unit(peaks))
        return Figures(extra=extra)


def growth_of_unit(costs: Mapping[int, float]) -> float:
    """costs by amount of work: cost of a unit at the largest amount over the least of all."""
    largest = max(costs)
    return costs[largest] / largest / min(cost / amount for amount, cost in costs.items())


def verdict(growth: float) -> str:
    return "linear" if growth <= LINEAR else "not linear"


FACTOR = 4 if ON_GPU else 1
GROWTHS = [
    Growth(
        Steps(
            f"{STAGE} step, samples of 512 tokens",
            "samples",
            SIZE,
            [n * FACTOR for n in (1, 2, 4, 8)],
            lambda count: [512] * count,
        )
    ),
    Growth(
        Steps(
            f"{STAGE} step, {2 * FACTOR} samples of growing length",
            "tokens",
            replace(SIZE, vision=replace(SIZE.vision, image_size=56)),  # nearly all of it is text
            [n * FACTOR for n in (640, 1280, 2560, 5120)],
            lambda tokens: [tokens // (2 * FACTOR)] * 2 * FACTOR,
        )
    ),
    Growth(Documents(SIZE, [n * FACTOR for n in (16, 32, 64, 128)])),
]


@each_row(GROWTHS)
def test_scaling(row, compare):
    compare(row)
