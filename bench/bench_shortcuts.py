"""A training step with and without the exact shortcuts (mmalign/model/shortcuts.py).

Stage 1 with the header that template v0 writes before the image; both stages with many rows that
have no target. The losses with and without are compared first.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from bench.bench_train_step import LOSS_TOLERANCE, rates
from bench.comparison import STEP, Calls, Comparison, WrongResult, each
from bench.models import CPU_LARGE, LLAMA2_7B, OPENLLAMA_3B, Size, random_llava, with_shortcuts
from bench.samples import Samples, samples_of, typical_step
from bench.shapes import DEVICE, ON_GPU
from bench.train_step import MmalignStep, Precision, packed_batches, step_calls, step_config
from mmalign.batch import IGNORE_INDEX
from mmalign.config import ShortcutConfig, Stage
from mmalign.data.packing import micro_batches
from mmalign.flops import Workload, required_flops
from mmalign.model.llava import Llava
from mmalign.system import DTYPES

HEADER = np.arange(1, 38, dtype=np.int32)  # as long as template v0's, with LLaMA's tokenizer
NONE = ShortcutConfig(last_layer_rows=False, frozen_prefix=False)
ROWS = replace(NONE, last_layer_rows=True)
VARIANTS = {
    "pretrain": {
        "mmalign, both shortcuts": ShortcutConfig(),
        "last-layer rows alone": ROWS,
        "frozen prefix alone": replace(NONE, frozen_prefix=True),
        "without shortcuts": NONE,
    },
    "finetune": {"mmalign, last-layer rows": ROWS, "without shortcuts": NONE},
}


@dataclass
class Shortcuts(Comparison):
    size: Size
    stage: Stage
    batch_size: int
    micro_batch_tokens: int
    precision: Precision

    benchmark, direction, rounds = "shortcuts", STEP, 5

    @property
    def case(self) -> str:
        return f"{self.stage}, {self.size.name}, {self.batch_size} samples, {self.precision}"

    @property
    def variants(self) -> list[str]:
        return list(VARIANTS[self.stage])

    @cached_property
    def samples(self) -> Samples:
        count, num_patches = self.batch_size, self.size.vision.num_patches
        [lengths] = typical_step(self.stage, count, count, num_patches, grouped=False)
        drawn = samples_of(self.stage, lengths, self.size)
        no_target = np.full(len(HEADER), IGNORE_INDEX, np.int32)
        encoded = [
            replace(
                sample,
                input_ids=np.concatenate([HEADER, sample.input_ids[1:]]),
                labels=np.concatenate([no_target, sample.labels[1:]]),
            )
            for sample in drawn.encoded
        ]
        return Samples(encoded, drawn.pixels)

    def _prefix_length(self, shortcuts: ShortcutConfig) -> int:
        """Stage 2 trains the layers that the header runs through, so it has rows there."""
        return len(HEADER) if shortcuts.frozen_prefix and self.stage == "pretrain" else 0

    def calls(self, variants: Sequence[str]) -> Calls:
        model = random_llava(self.size, self.stage, DEVICE, DTYPES[self.precision])
        steps = {name: self._step(name, model) for name in variants}
        losses = {name: step.loss() for name, step in steps.items()}
        for name, loss in losses.items():
            if abs(loss / losses[variants[0]] - 1) > LOSS_TOLERANCE[self.precision]:
                raise WrongResult(name, f"loss {loss}, {losses[variants[0]]} otherwise")
        return step_calls(steps)

    def _step(self, variant: str, model: Llava) -> MmalignStep:
        shortcuts = VARIANTS[self.stage][variant]
        prefix_length = self._prefix_length(shortcuts)
        model = with_shortcuts(model, self.stage, shortcuts, HEADER[:prefix_length].tolist())
        lengths = [length - prefix_length for length in self.samples.lengths]
        batches = micro_batches(lengths, self.micro_batch_tokens, 1)[0]
        packed = packed_batches(self.samples, batches, model.image_token_id, prefix_length)
        config = step_config(self.stage, self.precision, self.micro_batch_tokens)
        return MmalignStep(model, config, packed)

    def figures(self, variant: str, seconds: float) -> dict:
        required = self._flops(VARIANTS[self.stage][variant])
        info = rates(self.size, self.stage, self.samples, seconds)
        return info | {"flops": required, "flops_required": required / self._flops(NONE)}

    def _flops(self, shortcuts: ShortcutConfig) -> int:
        return required_flops(
            Workload(self.size.decoder, self.size.vision, self.stage),
            shortcuts,
            self.samples.lengths,
            self.samples.num_loss_tokens,
            len(self.samples),
            self._prefix_length(shortcuts),
        ).total


COMPARISONS = [
    Shortcuts(CPU_LARGE, "pretrain", 4, 8192, "fp32"),
    Shortcuts(CPU_LARGE, "finetune", 2, 8192, "fp32"),
]
if ON_GPU:
    COMPARISONS = [
        Shortcuts(LLAMA2_7B, "pretrain", 64, 16384, "bf16"),
        Shortcuts(OPENLLAMA_3B, "finetune", 16, 8192, "bf16"),
    ]
test_shortcuts = each(COMPARISONS)
