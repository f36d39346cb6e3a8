"""A training step of both stages: ours on packed samples, Hugging Face's on padded batches.

Same weights, precision, threads, optimizer and bytes of its state; the losses on the same samples
are compared first.
Every side steps over one typical batch (samples.typical_step): random batches for us and for
Hugging Face, and for "grouped by length" one as transformers' LengthGroupedSampler forms them, of
the same mean length. On a GPU also with Liger's kernels, and with the recomputation of activations
that LLaVA's scripts switch on. Preparing the data is in nobody's time.
"""

import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch

from bench.comparison import Calls, CannotRun, Figures, WrongResult, each_row
from bench.models import CPU_LARGE, CPU_SMALL, LLAMA2_7B, OPENLLAMA_3B, Size, random_llava
from bench.samples import Samples, padding_share, samples_of, typical_step
from bench.train_sides import (
    HuggingFaceModel,
    HuggingFaceStep,
    MmalignStep,
    hugging_face_model,
    optimizer_config,
    packed_batches,
    padded_batch,
    peak_bytes,
    step_flops,
)
from mmalign.config import TrainConfig
from mmalign.data.packing import micro_batches
from mmalign.flops import Workload, peak_bf16_flops
from mmalign.model.llava import Llava
from mmalign.system import DTYPES
from mmalign.training.memory.plan import MemoryPlan
from mmalign.training.memory.table import flags_of

OURS = "mmalign"
LOSS_TOLERANCE = {"fp32": 1e-5, "bf16": 5e-3}  # relative
MALLOC = ("MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_")  # they speed up both sides on a CPU


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


@dataclass(frozen=True)
class Case:
    size: Size
    stage: str
    batch_size: int  # samples of an optimizer step
    micro_batch_size: int  # samples of one of Hugging Face's padded batches
    micro_batch_tokens: int  # most tokens of one of our packed batches
    precision: str

    def samples(self, grouped: bool) -> tuple[Samples, list[list[int]]]:
        """Of one typical step, and Hugging Face's micro-batches of them."""
        vision = self.size.vision
        texts = typical_step(
            self.stage, self.batch_size, self.micro_batch_size, vision.num_patches, grouped
        )
        flat = [length for batch in texts for length in batch]
        samples = samples_of(
            self.stage, flat, vision.num_patches, vision.image_size, self.size.image_token_id
        )
        size = self.micro_batch_size
        return samples, [list(range(i, i + size)) for i in range(0, self.batch_size, size)]


@dataclass
class TrainStep:
    """The comparison of one case."""

    of: Case
    peers: Sequence[Peer]
    rounds: int = 3
    peaks: dict[str, int] = field(default_factory=dict)  # by variant, on a CPU
    resident: dict[str, int] = field(default_factory=dict)  # before a step, on a GPU
    recompute: str = ""  # what our side computes again to fit a GPU

    part, benchmark, direction = "train", "train_step", "step"

    @property
    def case(self) -> str:
        case = self.of
        return f"{case.stage}, {case.size.name}, {case.batch_size} samples, {case.precision}"

    @property
    def variants(self) -> list[str]:
        return [OURS, *(peer.name for peer in self.peers)]

    def missing(self, variant: str, device: torch.device) -> str | None:
        if variant.startswith("liger") and importlib.util.find_spec("liger_kernel") is None:
            return "liger-kernel is not installed"
        return None

    def limits(self) -> Mapping[str, float | int]:
        rounds = {"min_rounds": self.rounds, "max_rounds": self.rounds}
        return rounds | {"budget_seconds": 0, "warm_up_rounds": 1}

    @cached_property
    def _samples(self) -> dict[bool, tuple[Samples, list[list[int]]]]:
        return {grouped: self.of.samples(grouped) for grouped in (False, True)}

    def _peer(self, variant: str) -> Peer | None:
        return next((peer for peer in self.peers if peer.name == variant), None)

    def calls(self, variants: Sequence[str], device: torch.device) -> Calls:
        model = random_llava(self.of.size, self.of.stage, device, DTYPES[self.of.precision])
        if device.type == "cuda":
            self._recompute_to_fit(model, torch.cuda.get_device_properties(device).total_memory)
        theirs = self._models(variants, model)
        wrong = self._disagreement(model, theirs, device)
        steps = {name: self._step(name, model, theirs, device) for name in variants}
        full = self._out_of_memory(steps, device)
        if wrong or full:
            del model
            theirs.clear()  # the error outlives this frame; the models must not
            steps.clear()
            raise wrong or full
        return Calls(
            {name: self._call(name, step, device) for name, step in steps.items()},
            {name: self._start(name, steps, device) for name in steps},
        )

    # ---- the sides ----

    def _recompute_to_fit(self, model: Llava, capacity: int) -> None:
        """Of our side as little as the memory plan asks for; the peers' choices are variants."""
        config = TrainConfig(
            stage=self.of.stage,
            optimizer=optimizer_config(DTYPES[self.of.precision]),
            global_batch_size=self.of.batch_size,
            micro_batch_tokens=self.of.micro_batch_tokens,
            precision=self.of.precision,
            recompute="auto",
        )
        vision = model.vision_tower and model.vision_tower.config
        workload = Workload.from_config(config, model.decoder.config, vision)
        plan = MemoryPlan(config, workload, capacity, "cuda")
        chosen = plan.recommend()
        model.decoder.set_recompute(chosen.recompute, chosen.recompute_layers)
        self.recompute = flags_of(chosen)

    def _models(
        self, variants: Sequence[str], model: Llava
    ) -> dict[tuple[str, bool], HuggingFaceModel]:
        peers = [peer for name in variants if (peer := self._peer(name))]
        kinds = dict.fromkeys((peer.library, peer.checkpointing) for peer in peers)
        return {
            (library, checkpointing): hugging_face_model(
                model, checkpointing, library == "liger-kernel"
            )
            for library, checkpointing in kinds
        }

    def _step(
        self, variant: str, model: Llava, theirs: Mapping, device: torch.device
    ) -> MmalignStep | HuggingFaceStep:
        peer = self._peer(variant)
        if peer is None:
            samples, _ = self._samples[False]
            batches = micro_batches(samples.lengths, self.of.micro_batch_tokens, 1)[0]
            return MmalignStep(
                model, packed_batches(samples, batches, model.image_token_id), device
            )
        samples, batches = self._samples[peer.grouped]
        return HuggingFaceStep(
            theirs[peer.library, peer.checkpointing],
            [padded_batch(samples, indices, model) for indices in batches],
        )

    # ---- checks before any timing ----

    def _disagreement(
        self, model: Llava, theirs: Mapping, device: torch.device
    ) -> WrongResult | None:
        """Compares the losses of the two shortest samples, of unlike length: one is padded."""
        samples, _ = self._samples[False]
        order = sorted(range(len(samples)), key=lambda i: samples.lengths[i])
        packed = packed_batches(samples, [order[:2]], model.image_token_id)
        ours = MmalignStep(model, packed, device).loss()
        padded = [padded_batch(samples, order[:2], model)]
        for (library, checkpointing), peer in theirs.items():
            found = HuggingFaceStep(peer, padded).loss()
            if abs(found / ours - 1) > LOSS_TOLERANCE[self.of.precision]:
                name = next(
                    p.name
                    for p in self.peers
                    if (p.library, p.checkpointing) == (library, checkpointing)
                )
                return WrongResult(name, f"loss {found}, ours {ours}, on the same samples")
        return None

    def _out_of_memory(self, steps: Mapping, device: torch.device) -> CannotRun | None:
        """A first step of each on a GPU."""
        if device.type != "cuda":
            return None
        for name, step in steps.items():
            try:
                self._start(name, steps, device)()
                step()
            except torch.OutOfMemoryError as error:
                return CannotRun(name, f"out of memory: {str(error).partition('.')[0]}")
        return None

    # ---- what is timed ----

    def _call(
        self, name: str, step: MmalignStep | HuggingFaceStep, device: torch.device
    ) -> Callable[[None], object]:
        def call(_: None) -> None:
            if device.type == "cpu" and name not in self.peaks:  # the warm-up round
                self.peaks[name] = peak_bytes(step)
            else:
                step()

        return call

    def _start(self, name: str, steps: Mapping, device: torch.device) -> Callable[[], None]:
        """On a GPU there is room for one optimizer's state at a time."""

        def start() -> None:
            if device.type == "cuda":
                for other in steps.keys() - {name}:
                    steps[other].stop()
            if steps[name].optimizer is None:
                steps[name].start()
            if device.type == "cuda":
                self.resident[name] = torch.cuda.memory_allocated(device)

        return start

    # ---- what is said about it ----

    def figures(self, variant: str, seconds: float, ceilings: Mapping) -> Figures:
        peer = self._peer(variant)
        samples, batches = self._samples[peer is not None and peer.grouped]
        flops = step_flops(self.of.size, self.of.stage, samples)
        tokens = sum(samples.lengths)
        extra = {
            "samples_per_second": len(samples) / seconds,
            "tokens_per_second": tokens / seconds,
            "mean_length": tokens / len(samples),
            "padding": padding_share(samples.lengths, batches) if peer else 0.0,
            "threads": torch.get_num_threads(),
            "malloc": " ".join(f"{n}={os.environ[n]}" for n in MALLOC if n in os.environ),
        }
        if peer is None and self.recompute:
            extra["recompute"] = self.recompute
        if variant in self.peaks:
            extra["step_memory_bytes"] = self.peaks[variant]
        if variant in self.resident:
            extra["resident_bytes"] = self.resident[variant]
            peak = peak_bf16_flops(torch.cuda.get_device_name())
            extra |= {"mfu": flops / seconds / peak} if peak else {}
        return Figures(flops=flops, ceiling=ceilings["matrix_reference"], extra=extra)


RANDOM, GROUPED = Peer(), Peer(grouped=True)
ON_CPU = [
    TrainStep(Case(CPU_SMALL, "pretrain", 16, 16, 8192, "fp32"), [RANDOM]),
    TrainStep(Case(CPU_SMALL, "finetune", 8, 8, 8192, "fp32"), [RANDOM, GROUPED]),
    TrainStep(Case(CPU_LARGE, "pretrain", 4, 4, 8192, "fp32"), [RANDOM]),
    TrainStep(Case(CPU_LARGE, "finetune", 4, 4, 8192, "fp32"), [RANDOM, GROUPED]),
]
ON_GPU_PEERS = [
    *(Peer(grouped=grouped, checkpointing=c) for grouped in (False, True) for c in (False, True)),
    *(Peer("liger-kernel", checkpointing=checkpointing) for checkpointing in (False, True)),
]
ON_GPU = [  # micro-batches of 16 and 4 samples are those of LLaVA's and of the paper's scripts
    TrainStep(Case(LLAMA2_7B, "pretrain", 64, 16, 16384, "bf16"), ON_GPU_PEERS),
    TrainStep(Case(LLAMA2_7B, "finetune", 16, 4, 8192, "bf16"), ON_GPU_PEERS),
    TrainStep(Case(OPENLLAMA_3B, "finetune", 16, 4, 8192, "bf16"), ON_GPU_PEERS),
]


@each_row(ON_GPU if torch.cuda.is_available() else ON_CPU)
def test_train_step(row, compare):
    compare(row)
