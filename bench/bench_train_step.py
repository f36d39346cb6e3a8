"""A training step of both stages: ours on packed samples, Hugging Face's on padded batches.

Same weights, precision, threads, optimizer and bytes of its state; the losses on the same samples
are compared first. Every side steps over one typical batch (samples.typical_step): random batches
for us and for Hugging Face, and for "grouped by length" one as transformers' LengthGroupedSampler
forms them, of the same mean length. On a GPU also with Liger's kernels, and with the activation
checkpointing that LLaVA's scripts switch on; and the recipes' steps by size of the micro-batch.
"""

import importlib.util
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch

from bench.comparison import MATMUL, STEP, Calls, CannotRun, Comparison, WrongResult, each
from bench.models import (
    CPU_LARGE,
    CPU_SMALL,
    LLAMA2_7B,
    NUM_IMAGE_TOKENS,
    OPENLLAMA_3B,
    SPREAD,
    Size,
    random_llava,
)
from bench.samples import Samples, draw_samples, padding_share, samples_of, typical_step
from bench.shapes import DEVICE, ON_GPU
from bench.train_step import (
    NO_LORA,
    HuggingFaceStep,
    MmalignStep,
    Precision,
    hugging_face_model,
    packed_batches,
    padded_batch,
    step_calls,
    step_config,
    step_flops,
)
from mmalign.config import LoraConfig, Stage, TrainConfig
from mmalign.data.packing import micro_batches
from mmalign.data.templates import trains_image_tokens
from mmalign.errors import UserError
from mmalign.flops import Workload, peak_bf16_flops
from mmalign.model.llava import Llava
from mmalign.recipes import RECIPES
from mmalign.system import DTYPES
from mmalign.training.memory.plan import MemoryPlan
from mmalign.training.memory.table import check, flags_of

RANDOM_LOSS = 0.03  # relative, of the loss of random weights
LOSS_TOLERANCE = {"fp32": 1e-5, "bf16": 5e-3}  # relative


def rates(
    size: Size, stage: Stage, samples: Samples, seconds: float, lora: LoraConfig = NO_LORA
) -> dict:
    """extra_info of a step on these samples."""
    flops, tokens = step_flops(size, stage, samples, lora), sum(samples.lengths)
    peak = peak_bf16_flops(torch.cuda.get_device_name()) if ON_GPU else None
    return {
        "flops": flops,
        "bound": MATMUL,
        "samples_per_second": len(samples) / seconds,
        "tokens_per_second": tokens / seconds,
        "mean_length": tokens / len(samples),
        "threads": torch.get_num_threads(),
        "mfu": flops / seconds / peak if peak else None,
    }


def planned(
    config: TrainConfig, size: Size, variant: str, recompute: str | None = None
) -> tuple[TrainConfig, int]:
    """With the least recomputation that fits this GPU, or the given one; and the plan's bytes."""
    vocab_size = size.decoder.vocab_size + NUM_IMAGE_TOKENS
    decoder = replace(size.decoder, vocab_size=vocab_size)
    workload = Workload(decoder, size.vision, config.stage, config.lora)
    config, capacity = replace(config, recompute=recompute or "auto"), 1 << 50  # on a CPU
    if ON_GPU:
        capacity = torch.cuda.get_device_properties(DEVICE).total_memory
    plan = MemoryPlan(config, workload, capacity, DEVICE.type)
    try:
        config = check(plan)
    except UserError as error:
        raise CannotRun(variant, str(error).partition("\n")[0]) from None
    return config, plan.total(*config.micro_batching)


# ---- beside transformers and Liger ----


@dataclass(frozen=True)
class Peer:
    library: str = "transformers"
    grouped: bool = False
    checkpointing: bool = False

    @property
    def name(self) -> str:
        parts = [self.library, "padded"]
        parts += ["grouped by length"] if self.grouped else []
        return ", ".join(parts + (["checkpointing"] if self.checkpointing else []))


@dataclass
class TrainStep(Comparison):
    size: Size
    stage: Stage
    batch_size: int  # samples per optimizer step
    micro_batch_size: int  # samples of one of Hugging Face's padded batches
    micro_batch_tokens: int  # most tokens of one of our packed batches
    precision: Precision
    peers: Sequence[Peer]
    recompute: str = field(default="", init=False)  # of ours, on a GPU

    benchmark, direction, rounds = "train_step", STEP, 3

    @property
    def case(self) -> str:
        return f"{self.stage}, {self.size.name}, {self.batch_size} samples, {self.precision}"

    @property
    def variants(self) -> list[str]:
        return ["mmalign", *(peer.name for peer in self.peers)]

    def missing(self, variant: str) -> str | None:
        if variant.startswith("liger") and importlib.util.find_spec("liger_kernel") is None:
            return "liger-kernel is not installed"
        return None

    @cached_property
    def samples(self) -> dict[bool, Samples]:
        """Of one typical step, by whether its batches are grouped by length."""
        tower, found = self.size.vision, {}
        for grouped in (False, True):
            step = (self.stage, self.batch_size, self.micro_batch_size, tower.num_patches, grouped)
            lengths = [length for batch in typical_step(*step) for length in batch]
            found[grouped] = samples_of(self.stage, lengths, self.size)
        return found

    def _peer(self, variant: str) -> Peer | None:
        return next((peer for peer in self.peers if peer.name == variant), None)

    def _padded(self) -> list[list[int]]:
        size = self.micro_batch_size
        return [list(range(i, i + size)) for i in range(0, self.batch_size, size)]

    def calls(self, variants: Sequence[str]) -> Calls:
        model = random_llava(self.size, self.stage, DEVICE, DTYPES[self.precision])
        peers = [peer for name in variants if (peer := self._peer(name))]
        theirs = {
            (library, checkpointing): hugging_face_model(
                model, checkpointing, library == "liger-kernel"
            )
            for library, checkpointing in {(p.library, p.checkpointing) for p in peers}
        }
        config = step_config(self.stage, self.precision, self.micro_batch_tokens)
        if ON_GPU and "mmalign" in variants:
            config, _ = planned(config, self.size, "mmalign")
            self.recompute = flags_of(config)
        self._compare_losses(model, config, theirs, peers)
        steps = {name: self._step(name, model, config, theirs) for name in variants}
        return step_calls(steps)

    def _step(
        self, variant: str, model: Llava, config: TrainConfig, theirs: Mapping
    ) -> MmalignStep | HuggingFaceStep:
        peer = self._peer(variant)
        samples = self.samples[peer is not None and peer.grouped]
        if peer is None:
            batches = micro_batches(samples.lengths, self.micro_batch_tokens, 1)[0]
            packed = packed_batches(samples, batches, model.image_token_id)
            return MmalignStep(model, config, packed)
        batches = [padded_batch(samples, indices, model) for indices in self._padded()]
        return HuggingFaceStep(theirs[peer.library, peer.checkpointing], batches)

    def _compare_losses(
        self, model: Llava, config: TrainConfig, theirs: Mapping, peers: Sequence[Peer]
    ) -> None:
        """On the two shortest samples, of different length: one is padded."""
        samples = self.samples[False]
        two = sorted(range(len(samples)), key=lambda i: samples.lengths[i])[:2]
        ours = MmalignStep(model, config, packed_batches(samples, [two], model.image_token_id))
        expected, padded = ours.loss(), [padded_batch(samples, two, model)]
        for peer in peers:
            found = HuggingFaceStep(theirs[peer.library, peer.checkpointing], padded).loss()
            if abs(found / expected - 1) > LOSS_TOLERANCE[self.precision]:
                message = f"loss {found}, ours {expected}, on the same samples"
                raise WrongResult(peer.name, message)

    def figures(self, variant: str, seconds: float) -> dict:
        peer = self._peer(variant)
        samples = self.samples[peer is not None and peer.grouped]
        info = rates(self.size, self.stage, samples, seconds)
        info["padding"] = padding_share(samples.lengths, self._padded()) if peer else 0.0
        return info | ({"recompute": self.recompute} if peer is None and self.recompute else {})


# ---- recipes, by size of the micro-batch ----


@dataclass
class RecipeStep(Comparison):
    size: Size
    recipe: str
    micro_batch_tokens: Sequence[int]
    num_samples: int | None = None  # instead of the recipe's global batch
    policies: Sequence[str | None] = (None,)  # of recomputation; None: what the plan chooses
    plans: dict[str, tuple[TrainConfig, int]] = field(default_factory=dict, init=False)

    benchmark, direction, rounds = "train_recipe", STEP, 5

    @property
    def config(self) -> TrainConfig:
        return RECIPES[self.recipe][1]

    @property
    def case(self) -> str:
        title = f"{self.recipe}, {self.size.name}, {self.batch_size} samples"
        return f"{title}, by recomputation" if len(self.policies) > 1 else title

    @property
    def batch_size(self) -> int:
        return self.num_samples or self.config.global_batch_size

    @property
    def variants(self) -> list[str]:
        return [
            f"mmalign, {tokens} tokens per micro-batch"
            + (f", recompute {policy}" if policy else "")
            for tokens in self.micro_batch_tokens
            for policy in self.policies
        ]

    @cached_property
    def samples(self) -> Samples:
        return draw_samples(self.config.stage, self.batch_size, self.size)

    def calls(self, variants: Sequence[str]) -> Calls:
        config = self.config
        model = random_llava(self.size, config.stage, DEVICE, DTYPES[config.precision])
        model.set_trainable(config.stage, config.lora, trains_image_tokens(config))
        return step_calls({name: self._step(name, model) for name in variants})

    def _step(self, variant: str, model: Llava) -> MmalignStep:
        tokens, policy = int(variant.split()[1]), variant.partition(", recompute ")[2] or None
        config = replace(self.config, micro_batch_tokens=tokens)
        self.plans[variant] = planned(config, self.size, variant, policy)
        config, _ = self.plans[variant]
        batches = micro_batches(self.samples.lengths, tokens, 1)[0]
        packed = packed_batches(self.samples, batches, model.image_token_id)
        step = MmalignStep(model, config, packed)
        # logits of random weights are normal: they cost half their variance over a uniform guess
        decoder, loss = self.size.decoder, step.loss()
        expected = math.log(decoder.vocab_size) + decoder.hidden_size * SPREAD**2 / 2
        if not abs(loss - expected) < RANDOM_LOSS * expected:
            raise WrongResult(variant, f"loss {loss} of random weights, expected {expected:.2f}")
        return step

    def figures(self, variant: str, seconds: float) -> dict:
        config = self.config
        info = rates(self.size, config.stage, self.samples, seconds, config.lora)
        planned, planned_bytes = self.plans[variant]
        return info | {"recompute": flags_of(planned), "planned_bytes": planned_bytes}


RANDOM, GROUPED = Peer(), Peer(grouped=True)
TRAIN_STEPS = [
    TrainStep(CPU_SMALL, "pretrain", 16, 16, 8192, "fp32", [RANDOM]),
    TrainStep(CPU_SMALL, "finetune", 8, 8, 8192, "fp32", [RANDOM, GROUPED]),
    TrainStep(CPU_LARGE, "pretrain", 4, 4, 8192, "fp32", [RANDOM]),
    TrainStep(CPU_LARGE, "finetune", 4, 4, 8192, "fp32", [RANDOM, GROUPED]),
]
RECIPE_STEPS = [RecipeStep(CPU_SMALL, "tiny-finetune", [2048], num_samples=4)]
if ON_GPU:  # micro-batches of 16 and 4 samples are those of LLaVA's and of the paper's scripts
    PEERS = [Peer(grouped=g, checkpointing=c) for g in (False, True) for c in (False, True)]
    PEERS += [Peer("liger-kernel", checkpointing=c) for c in (False, True)]
    TRAIN_STEPS = [
        TrainStep(LLAMA2_7B, "pretrain", 64, 16, 16384, "bf16", PEERS),
        TrainStep(LLAMA2_7B, "finetune", 16, 4, 8192, "bf16", PEERS),
        TrainStep(OPENLLAMA_3B, "finetune", 16, 4, 8192, "bf16", PEERS),
    ]
    RECIPE_STEPS = [
        RecipeStep(LLAMA2_7B, "pretrain-7b", [4096, 8192, 16384]),
        RecipeStep(LLAMA2_7B, "finetune-7b", [4096, 8192]),
        RecipeStep(LLAMA2_7B, "finetune-7b-lora", [2048, 4096, 8192]),
        RecipeStep(OPENLLAMA_3B, "pretrain-open-llama-3b", [16384]),
        RecipeStep(OPENLLAMA_3B, "finetune-open-llama-3b", [4096, 8192]),
    ]
test_train_step = each([*TRAIN_STEPS, *RECIPE_STEPS])
