"""One optimizer step of the trainer and of Hugging Face's classes, on batches that are ready.

A step is forward, backward, the gradients' global norm, clipping and AdamW. Data preparation is
excluded from all timings; every batch is on the device in the layout that its side takes.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from importlib import import_module
from types import ModuleType
from typing import Any, Literal
from unittest import mock

import torch
from torch import Tensor, nn

from bench.comparison import Calls
from bench.models import Size, hugging_face_llava
from bench.peers import library
from bench.samples import Samples
from bench.shapes import DEVICE, ON_GPU
from mmalign.batch import IGNORE_INDEX, PackedBatch
from mmalign.config import LoraConfig, OptimizerConfig, Stage, TrainConfig
from mmalign.data.loader import Step
from mmalign.data.packing import pack_samples
from mmalign.distributed import DistributedContext
from mmalign.flops import Workload, model_flops
from mmalign.model.llava import Llava
from mmalign.training.trainer import Trainer

Precision = Literal["fp32", "bf16"]
OPTIMIZER = OptimizerConfig(learning_rate=2e-5, warmup_ratio=0.0)
# beside bf16 weights torch's AdamW keeps bf16 moments, so ours does, too: 8 bytes per weight
OPTIMIZER_BF16 = replace(OPTIMIZER, master="stochastic", moments="bf16")
NO_LORA = LoraConfig()
NUM_STEPS = 1000  # of the learning rate's schedule


class MmalignStep:
    """`start` makes the optimizer's state, `stop` frees it."""

    def __init__(self, model: Llava, config: TrainConfig, batches: list[PackedBatch]):
        self.model, self.config = model, config
        loss_tokens = sum(batch.num_loss_tokens for batch in batches)
        tokens = sum(len(batch.input_ids) for batch in batches)
        batches = [batch.to(DEVICE) for batch in batches]
        # past the warm-up, whose first rate may be 0
        self.step = Step(NUM_STEPS // 2, [], batches, loss_tokens, tokens)
        self.trainer: Trainer | None = None

    def start(self) -> None:
        _, policy, num_layers = self.config.micro_batching
        self.model.decoder.set_recompute(policy, num_layers)
        if self.trainer is None:
            self.trainer = Trainer(
                self.config, DistributedContext(0, 1, DEVICE), self.model, NUM_STEPS
            )

    def stop(self) -> None:
        self.trainer = None

    def __call__(self) -> None:
        assert self.trainer is not None, "not started"
        self.trainer.train_step(self.step)

    @torch.no_grad()
    def loss(self) -> float:
        return sum(self.model(x).item() for x in self.step.batches) / self.step.num_loss_tokens


def step_config(stage: Stage, precision: Precision, micro_batch_tokens: int) -> TrainConfig:
    return TrainConfig(
        stage=stage,
        optimizer=OPTIMIZER_BF16 if precision == "bf16" else OPTIMIZER,
        precision=precision,
        micro_batch_tokens=micro_batch_tokens,
    )


def packed_batches(
    samples: Samples, batches: list[list[int]], image_token_id: int, prefix_length: int = 0
) -> list[PackedBatch]:
    return [
        pack_samples(
            [samples.encoded[i] for i in indices],
            [samples.pixels[i] for i in indices],
            image_token_id,
            prefix_length,
        )
        for indices in batches
    ]


def step_flops(size: Size, stage: Stage, samples: Samples, lora: LoraConfig = NO_LORA) -> int:
    """Required FLOPs of a step on these samples: no padding, nothing twice."""
    workload = Workload(size.decoder, size.vision, stage, lora)
    return model_flops(workload, samples.lengths, samples.num_loss_tokens, len(samples)).total


def step_calls(steps: Mapping[str, "MmalignStep | HuggingFaceStep"]) -> Calls:
    """On a GPU the state of one optimizer exists at a time: it is made anew, untimed."""

    def prepare(name: str) -> None:
        if ON_GPU:
            for other in steps.keys() - {name}:
                steps[other].stop()
        steps[name].start()

    return Calls(
        {name: lambda _, step=step: step() for name, step in steps.items()},
        {name: lambda name=name: prepare(name) for name in steps},
    )


# ---- Hugging Face's side ----

Names = dict[ModuleType, dict[str, Any]]  # of Python modules


@dataclass(frozen=True)
class HuggingFaceModel:
    model: nn.Module
    replaced: Names = field(default_factory=dict)  # what Liger puts into transformers' modules


class HuggingFaceStep:
    """What transformers' Trainer does between two batches, with the optimizer that it chooses."""

    def __init__(self, peer: HuggingFaceModel, batches: list[dict[str, Tensor]]):
        self.peer, self.batches = peer, batches
        self.optimizer: torch.optim.AdamW | None = None
        self.parameters = [p for p in peer.model.parameters() if p.requires_grad]
        self.num_loss_tokens = sum((b["labels"][:, 1:] != IGNORE_INDEX).sum() for b in batches)

    def start(self) -> None:
        if self.optimizer is not None:
            return
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=OPTIMIZER.learning_rate,
            betas=(OPTIMIZER.beta1, OPTIMIZER.beta2),
            eps=OPTIMIZER.eps,
            weight_decay=OPTIMIZER.weight_decay,
            fused=True,
        )
        for parameter in self.parameters:  # otherwise the first step makes them
            self.optimizer.state[parameter] = {
                "step": torch.zeros((), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }

    def stop(self) -> None:
        self.optimizer = None

    def __call__(self) -> None:
        with installed(self.peer.replaced):
            for batch in self.batches:
                self._loss(batch).backward()
        assert self.optimizer is not None, "not started"
        nn.utils.clip_grad_norm_(self.parameters, OPTIMIZER.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def loss(self) -> float:
        with installed(self.peer.replaced):
            return sum(self._loss(batch).item() for batch in self.batches)

    def _loss(self, batch: dict[str, Tensor]) -> Tensor:
        count = self.num_loss_tokens  # as Trainer gives it: the mean over all micro-batches
        return self.peer.model(**batch, num_items_in_batch=count, return_dict=True).loss


def hugging_face_model(model: Llava, checkpointing: bool, liger: bool) -> HuggingFaceModel:
    """On the weights of `model`; checkpointing as LLaVA's scripts ask for, Liger's kernels."""
    theirs: Any = hugging_face_llava(model)
    theirs.config.text_config.use_cache = theirs.model.language_model.config.use_cache = False
    if checkpointing:
        theirs.gradient_checkpointing_enable({"use_reentrant": False})
    return HuggingFaceModel(theirs, _apply_liger(theirs) if liger else {})


def _apply_liger(theirs: nn.Module) -> Names:
    """Patches this model alone; functions that Liger replaces for all models are restored."""
    modules = [import_module(f"transformers.models.{n}.modeling_{n}") for n in ("llama", "llava")]
    before = {module: dict(vars(module)) for module in modules}
    library("liger_kernel.transformers").apply_liger_kernel_to_llava(model=theirs)
    replaced = {
        module: {name: new for name, new in vars(module).items() if names.get(name) is not new}
        for module, names in before.items()
    }
    for module, names in before.items():
        vars(module).update(names)
    return replaced


@contextmanager
def installed(replaced: Names) -> Iterator[None]:
    """These names in these modules while the block runs."""
    with ExitStack() as stack:
        for module, names in replaced.items():
            stack.enter_context(mock.patch.multiple(module, **names))
        yield


def padded_batch(samples: Samples, indices: list[int], model: Llava) -> dict[str, Tensor]:
    """Padded on the right, with the pixel values that our vision tower computes with."""
    encoded = [samples.encoded[i] for i in indices]
    shape = len(encoded), max(len(sample.input_ids) for sample in encoded)
    input_ids = torch.zeros(shape, dtype=torch.long)
    labels = torch.full(shape, IGNORE_INDEX)
    attention_mask = torch.zeros(shape, dtype=torch.long)
    for row, sample in enumerate(encoded):
        length = len(sample.input_ids)
        input_ids[row, :length] = torch.from_numpy(sample.input_ids)
        labels[row, :length] = torch.from_numpy(sample.labels)
        attention_mask[row, :length] = 1
    pixels = torch.cat([samples.pixels[i] for i in indices]).to(DEVICE)
    batch = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
    batch = {name: tensor.to(DEVICE) for name, tensor in batch.items()}
    assert model.vision_tower is not None
    return batch | {"pixel_values": model.vision_tower.normalize_pixels(pixels)}
