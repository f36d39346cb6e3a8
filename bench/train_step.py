"""One optimizer step of our program and of Hugging Face's classes, on batches that are ready.

A step is forward, backward, the gradients' global norm, clipping and AdamW. Reading, tokenising and
collating samples is in neither side's time; each batch lies on the device as its side wants it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from bench.models import Size, hugging_face_llava
from bench.samples import Samples
from mmalign.batch import IGNORE_INDEX, PackedBatch
from mmalign.config import OptimizerConfig
from mmalign.data.packing import pack_samples
from mmalign.flops import Workload, model_flops
from mmalign.model.llava import Llava
from mmalign.training.optimizer import AdamW

OPTIMIZER = OptimizerConfig(learning_rate=2e-5)


# beside bf16 weights torch's AdamW keeps bf16 moments, so ours does, too: 8 bytes a weight
IN_BF16 = replace(OPTIMIZER, master="stochastic", moments="bf16")


class MmalignStep:
    def __init__(self, model: Llava, batches: list[PackedBatch], device: torch.device):
        self.model, self.optimizer = model, None
        self.config = optimizer_config(model.decoder.embed_tokens.weight.dtype)
        self.batches = [batch.to(device) for batch in batches]
        self.num_loss_tokens = sum(batch.num_loss_tokens for batch in batches)

    def start(self) -> None:
        """A fresh optimizer; its state is what a step needs beside the weights."""
        self.optimizer = AdamW(self.model.trainable_parameters(), self.config)

    def stop(self) -> None:
        self.optimizer = None

    def __call__(self) -> Tensor:
        """The loss of the step."""
        total = 0.0
        for batch in self.batches:
            loss = self.model(batch) / self.num_loss_tokens
            loss.backward()
            total += loss.detach()
        self.optimizer.step(OPTIMIZER.learning_rate, self.optimizer.gradient_norm())
        self.optimizer.zero_grad()
        return total

    @torch.no_grad()
    def loss(self) -> float:
        return sum(self.model(batch).item() for batch in self.batches) / self.num_loss_tokens


def optimizer_config(dtype: torch.dtype) -> OptimizerConfig:
    return IN_BF16 if dtype == torch.bfloat16 else OPTIMIZER


class HuggingFaceStep:
    """What transformers' Trainer does between two batches, with the optimizer that it chooses."""

    def __init__(self, peer: "HuggingFaceModel", batches: list[dict[str, Tensor]]):
        self.peer, self.batches, self.optimizer = peer, batches, None
        self.parameters = [p for p in peer.model.parameters() if p.requires_grad]
        self.num_loss_tokens = sum((b["labels"][:, 1:] != IGNORE_INDEX).sum() for b in batches)

    def start(self) -> None:
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

    def __call__(self) -> Tensor:
        """The loss of the step."""
        total = 0.0
        with installed(self.peer.replaced):
            for batch in self.batches:
                loss = self._loss(batch)
                loss.backward()
                total += loss.detach()
        nn.utils.clip_grad_norm_(self.parameters, OPTIMIZER.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total

    @torch.no_grad()
    def loss(self) -> float:
        with installed(self.peer.replaced):
            return sum(self._loss(batch).item() for batch in self.batches)

    def _loss(self, batch: dict[str, Tensor]) -> Tensor:
        count = self.num_loss_tokens  # as Trainer gives it: the mean over all micro-batches
        return self.peer.model(**batch, num_items_in_batch=count, return_dict=True).loss


Names = dict[ModuleType, dict[str, object]]  # of Python modules


@dataclass(frozen=True)
class HuggingFaceModel:
    model: nn.Module
    replaced: Names = field(default_factory=dict)  # what Liger puts into transformers' modules


def hugging_face_model(model: Llava, checkpointing: bool, liger: bool) -> HuggingFaceModel:
    """On the weights of `model`; checkpointing as LLaVA's scripts ask for, Liger's kernels."""
    theirs = hugging_face_llava(model)
    theirs.config.text_config.use_cache = theirs.model.language_model.config.use_cache = False
    if checkpointing:
        theirs.gradient_checkpointing_enable({"use_reentrant": False})
    return HuggingFaceModel(theirs, _apply_liger(theirs) if liger else {})


def _apply_liger(theirs: nn.Module) -> Names:
    """Patches this model alone; functions that Liger replaces for all models are given back."""
    from liger_kernel.transformers import apply_liger_kernel_to_llava

    modules = [import_module(f"transformers.models.{n}.modeling_{n}") for n in ("llama", "llava")]
    before = {module: dict(vars(module)) for module in modules}
    apply_liger_kernel_to_llava(model=theirs)
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
    before = {
        module: {name: vars(module)[name] for name in names} for module, names in replaced.items()
    }
    try:
        for module, names in replaced.items():
            vars(module).update(names)
        yield
    finally:
        for module, names in before.items():
            vars(module).update(names)


def packed_batches(
    samples: Samples, batches: list[list[int]], image_token_id: int
) -> list[PackedBatch]:
    return [
        pack_samples(
            [samples.encoded[i] for i in indices],
            [samples.pixels[i] for i in indices],
            image_token_id,
        )
        for indices in batches
    ]


def padded_batch(samples: Samples, indices: list[int], model: Llava) -> dict[str, Tensor]:
    """Padded on the right; the very pixel values that our vision tower computes with."""
    device = model.projector.weight.device
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
    pixels = torch.stack([samples.pixels[i] for i in indices]).to(device)
    batch = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    return batch | {"pixel_values": model.vision_tower.normalize_pixels(pixels)}


def peak_bytes(call: Callable[[], object]) -> int:
    """What PyTorch's CPU allocator held at most during a call, above its start."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        call()
    held = highest = 0
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()  # negative where memory is given back
            highest = max(highest, held)
    return highest


def step_flops(size: Size, stage: str, samples: Samples) -> int:
    """What a step on these samples must compute: no padding, nothing twice."""
    workload = Workload(size.decoder, size.vision, stage)
    loss_tokens = sum(int((one.labels[1:] != IGNORE_INDEX).sum()) for one in samples.encoded)
    return model_flops(workload, samples.lengths, loss_tokens, len(samples)).total
