"""A training step with and without the exact shortcuts (mmalign/model/llava.py).

Stage 1 with the header that template v0 writes before the image; both stages with many rows that
have no target. The losses with and without are compared first.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch

from bench.bench_train_step import LOSS_TOLERANCE
from bench.comparison import Calls, Figures, WrongResult, each_row
from bench.models import CPU_LARGE, LLAMA2_7B, OPENLLAMA_3B, Size, random_llava
from bench.samples import Samples, samples_of, typical_step
from bench.train_sides import MmalignStep
from mmalign.batch import IGNORE_INDEX
from mmalign.config import ShortcutConfig
from mmalign.data.loader import micro_batches
from mmalign.data.packing import pack_samples
from mmalign.flops import Workload, required_flops
from mmalign.model.llava import Llava
from mmalign.system import DTYPES

HEADER_TOKENS = 37  # of template v0, with LLaMA's tokenizer
NONE = ShortcutConfig(last_layer_rows=False, frozen_prefix=False)
ROWS = replace(NONE, last_layer_rows=True)
PREFIX = replace(NONE, frozen_prefix=True)
BOTH = ShortcutConfig()
VARIANTS = {
    "pretrain": {
        "mmalign, both shortcuts": BOTH,
        "last-layer rows alone": ROWS,
        "frozen prefix alone": PREFIX,
        "without shortcuts": NONE,
    },
    "finetune": {"mmalign, last-layer rows": ROWS, "without shortcuts": NONE},
}


@dataclass
class Shortcuts:
    size: Size
    stage: str
    batch_size: int
    micro_batch_tokens: int
    precision: str

    part, benchmark, direction = "train", "shortcuts", "step"

    @property
    def case(self) -> str:
        return f"{self.stage}, {self.size.name}, {self.batch_size} samples, {self.precision}"

    @property
    def variants(self) -> list[str]:
        return list(VARIANTS[self.stage])

    def missing(self, variant: str, device: torch.device) -> str | None:
        return None

    def limits(self) -> Mapping[str, float | int]:
        return {"budget_seconds": 0, "min_rounds": 5, "max_rounds": 5, "warm_up_rounds": 1}

    @cached_property
    def header(self) -> np.ndarray:
        """What every sample starts with; stage 2 never leaves it out."""
        return np.arange(1, 1 + HEADER_TOKENS, dtype=np.int32)

    @cached_property
    def samples(self) -> Samples:
        vision, size = self.size.vision, self.batch_size
        texts = typical_step(self.stage, size, size, vision.num_patches, grouped=False)
        drawn = samples_of(
            self.stage, texts[0], vision.num_patches, vision.image_size, self.size.image_token_id
        )
        unsupervised = np.full(HEADER_TOKENS, IGNORE_INDEX, np.int32)
        encoded = [
            replace(
                sample,
                input_ids=np.concatenate([self.header, sample.input_ids[1:]]),
                labels=np.concatenate([unsupervised, sample.labels[1:]]),
            )
            for sample in drawn.encoded
        ]
        return Samples(encoded, drawn.pixels)

    def _prefix_length(self, shortcuts: ShortcutConfig) -> int:
        return HEADER_TOKENS if shortcuts.frozen_prefix and self.stage == "pretrain" else 0

    def calls(self, variants: Sequence[str], device: torch.device) -> Calls:
        dtype, header = DTYPES[self.precision], self.header.tolist()
        model = random_llava(self.size, self.stage, device, dtype, header)
        steps = {name: self._step(name, model, device) for name in variants}
        losses = {}
        for name, step in steps.items():
            model.shortcuts = VARIANTS[self.stage][name]
            losses[name] = step.loss()
            if abs(losses[name] / losses[variants[0]] - 1) > LOSS_TOLERANCE[self.precision]:
                raise WrongResult(name, f"loss {losses[name]}, {losses[variants[0]]} otherwise")
            step.start()
        return Calls({name: self._call(name, step, model) for name, step in steps.items()})

    def _step(self, variant: str, model: Llava, device: torch.device) -> MmalignStep:
        samples = self.samples
        prefix_length = self._prefix_length(VARIANTS[self.stage][variant])
        lengths = [length - prefix_length for length in samples.lengths]
        batches = [
            pack_samples(
                [samples.encoded[i] for i in indices],
                [samples.pixels[i] for i in indices],
                model.image_token_id,
                prefix_length,
            )
            for indices in micro_batches(lengths, self.micro_batch_tokens, 1)[0]
        ]
        return MmalignStep(model, batches, device)

    def _call(self, variant: str, step: MmalignStep, model: Llava) -> Callable[[], object]:
        def call() -> None:
            model.shortcuts = VARIANTS[self.stage][variant]
            step()

        return call

    def figures(self, variant: str, seconds: float, ceilings: Mapping) -> Figures:
        plain, needed = (self._flops(s) for s in (NONE, VARIANTS[self.stage][variant]))
        extra = {
            "samples_per_second": len(self.samples) / seconds,
            "flops_needed": needed / plain,
            "threads": torch.get_num_threads(),
        }
        return Figures(flops=needed, ceiling=ceilings["matrix_reference"], extra=extra)

    def _flops(self, shortcuts: ShortcutConfig) -> int:
        workload = Workload(self.size.decoder, self.size.vision, self.stage)
        labels = [sample.labels[1:] for sample in self.samples.encoded]
        return required_flops(
            workload,
            shortcuts,
            self.samples.lengths,
            sum(int((row != IGNORE_INDEX).sum()) for row in labels),
            len(labels),
            self._prefix_length(shortcuts),
        ).total


ON_CPU = [
    Shortcuts(CPU_LARGE, "pretrain", 4, 8192, "fp32"),
    Shortcuts(CPU_LARGE, "finetune", 2, 8192, "fp32"),
]
ON_GPU = [
    Shortcuts(LLAMA2_7B, "pretrain", 64, 16384, "bf16"),
    Shortcuts(OPENLLAMA_3B, "finetune", 16, 8192, "bf16"),
]


@each_row(ON_GPU if torch.cuda.is_available() else ON_CPU)
def test_shortcuts(row, compare):
    compare(row)
