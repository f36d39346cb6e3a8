"""Part train of gpu_verify.sh: optimizer steps of 7B and 3B recipes with random weights.

A step is the recipe's global batch, cut into micro-batches of a given size, from packed batches in
host memory to updated weights: copies, forward, backward, gradient norm, AdamW. What does not fit
the card is recorded with the reason. The peers are those of bench_train_step.py.
"""

import gc
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace

import torch

from bench import verify
from bench.ceilings import ceilings
from bench.models import (
    CPU_SMALL,
    LLAMA2_7B,
    NUM_IMAGE_TOKENS,
    OPENLLAMA_3B,
    Size,
    random_llava,
)
from bench.record import Record, write_part
from bench.samples import draw_samples
from mmalign.config import TrainConfig
from mmalign.data.loader import micro_batches
from mmalign.data.packing import PackedBatch, pack_samples
from mmalign.model.decoder import Decoder
from mmalign.model.llava import Llava
from mmalign.model.projector import Projector
from mmalign.model.vision_tower import VisionTower
from mmalign.recipes import RECIPES
from mmalign.system import DTYPES
from mmalign.training.flops import Workload, batch_flops
from mmalign.training.optimizer import AdamW
from mmalign.training.parallel import Ranks
from mmalign.training.sharding import to_device
from mmalign.training.telemetry import Telemetry

BENCHMARK = "train_recipe"
PEERS = ("bench_train_step.py",)
WARM_UP_STEPS, STEPS = 2, 5
SECONDS_A_CASE = 45  # guessed, with compilation; a case that may not fit in is left out


@dataclass(frozen=True)
class Case:
    size: Size
    recipe: str
    micro_batch_tokens: tuple[int, ...]  # rising, until the memory is full

    @property
    def config(self) -> TrainConfig:
        return RECIPES[self.recipe][1]

    def title(self, tokens: int) -> str:
        precision = self.config.precision
        return f"{self.recipe}, {self.size.name}, {tokens} tokens a micro-batch, {precision}"


CASES = (
    Case(LLAMA2_7B, "pretrain-7b", (4096, 8192, 16384)),
    Case(LLAMA2_7B, "finetune-7b", (4096, 8192)),
    Case(LLAMA2_7B, "finetune-7b-lora", (2048, 4096, 8192)),
    Case(OPENLLAMA_3B, "pretrain-open-llama-3b", (16384,)),
    Case(OPENLLAMA_3B, "finetune-open-llama-3b", (4096, 8192)),
)


def step_batches(
    case: Case, micro_batch_tokens: int, num_samples: int | None = None
) -> list[PackedBatch]:
    """One optimizer step's packed batches on the CPU; as many samples as the recipe takes."""
    samples = draw_samples(
        case.config.stage,
        num_samples or case.config.global_batch_size,
        case.size.vision.num_patches,
        case.size.vision.image_size,
        case.size.image_token_id,
    )
    return [
        pack_samples(
            [samples.encoded[i] for i in indices],
            [samples.pixels[i] for i in indices],
            case.size.image_token_id,
        )
        for indices in micro_batches(samples.lengths, micro_batch_tokens, world_size=1)[0]
    ]


# ---- memory ----


def state_bytes(model: Llava) -> int:
    """Weights, gradients and what the optimizer keeps: fp32 moments, and the masters' low bits."""
    weights = sum(p.nbytes for p in model.parameters())
    trained = model.trainable_parameters().values()
    moments = sum(8 * p.numel() for p in trained)
    remainders = sum(2 * p.numel() for p in trained if p.dtype == torch.bfloat16)
    return weights + sum(p.nbytes for p in trained) + moments + remainders


def activation_bytes(case: Case) -> int:
    """Estimate for one token of a micro-batch, in bf16: what a layer keeps for its backward.

    Always qkv, the attention's result, two residual streams, gate and up; where the weights learn,
    or adapters on them, also the inputs of the products.
    """
    decoder = case.size.decoder
    hidden, inner = decoder.hidden_size, decoder.intermediate_size
    numbers = sum(decoder.qkv_sizes) + decoder.qkv_sizes[0] + 2 * hidden + 2 * inner
    if case.config.stage == "finetune":
        numbers += 2 * hidden + inner
    if case.config.lora.rank:  # a dropped-out copy and its mask for each of the seven adapters
        numbers += round(1.5 * (3 * hidden + decoder.qkv_sizes[0] + 2 * hidden + inner))
    return 2 * numbers * decoder.num_hidden_layers


def meta_model(case: Case) -> Llava:
    """The model without memory behind it, with what the recipe trains marked."""
    config = replace(case.size.decoder, vocab_size=case.size.decoder.vocab_size + NUM_IMAGE_TOKENS)
    first = case.size.image_token_id
    tokens = SimpleNamespace(image_token_id=first, im_start_id=first + 1, im_end_id=first + 2)
    with torch.device("meta"):
        tower = VisionTower(case.size.vision)
        projector = Projector(case.size.vision.hidden_size, config.hidden_size)
        model = Llava(Decoder(config), tower, projector, tokens)
    model.to(DTYPES[case.config.precision]).set_stage(case.config)
    return model


# ---- measuring ----


def measure_case(case: Case, options: verify.Options, measured: dict) -> Iterator[Record]:
    """A record for every size of micro-batch; from the first that does not fit on, the reason."""
    device = torch.device("cuda")
    needed = state_bytes(meta_model(case))
    total = torch.cuda.get_device_properties(device).total_memory
    model, reason = None, None
    if needed > total:
        reason = (
            f"weights, gradients and optimizer state take {needed / 1e9:.0f} GB; "
            f"the card has {total / 1e9:.0f} GB"
        )
    for tokens in case.micro_batch_tokens:
        if reason is None and options.seconds_left < SECONDS_A_CASE:
            reason = "the part's 8 minutes were over"
        if reason is None:
            try:
                model = model or build_model(case, device)
                yield measure_steps(case, model, tokens, measured)
                continue
            except torch.OutOfMemoryError:
                reached = torch.cuda.max_memory_allocated() / 1e9
                reason = f"out of memory with {tokens} tokens a micro-batch, after {reached:.0f} GB"
        yield Record(BENCHMARK, case.title(tokens), "step", "mmalign", None, skipped=reason)


def build_model(case: Case, device: torch.device) -> Llava:
    """Random weights on `device`, with what the recipe trains marked."""
    model = random_llava(case.size, case.config.stage, device, DTYPES[case.config.precision])
    model.set_stage(case.config)
    return model.to(device).train()


def measure_steps(
    case: Case,
    model: Llava,
    micro_batch_tokens: int,
    measured: dict,
    num_samples: int | None = None,
    rounds: tuple[int, int] = (WARM_UP_STEPS, STEPS),
) -> Record:
    """The record of one size of micro-batch; num_samples stands in for the recipe's batch."""
    device = next(model.parameters()).device
    batches = step_batches(case, micro_batch_tokens, num_samples)
    optimizer = AdamW(model.trainable_parameters(), case.config.optimizer)
    with Telemetry(case.config, Ranks(0, 1, device)) as telemetry:
        for _ in range(rounds[0]):
            optimizer_step(model, optimizer, batches, device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds = [optimizer_step(model, optimizer, batches, device) for _ in range(rounds[1])]
        work = step_work(case, model, batches)
        median = statistics.median(seconds)
        said = telemetry.record(**work, seconds=median, data_seconds=0.0)
    reference = measured["matrix_reference"]
    extra = work | {"micro_batches": len(batches), "state_bytes": state_bytes(model)}
    return Record(
        BENCHMARK,
        case.title(micro_batch_tokens),
        "step",
        "mmalign",
        median,
        fastest=min(seconds),
        slowest=max(seconds),
        repeats=rounds[1],
        flops=work["flops"],
        ceiling=reference,
        share=work["flops"] / median / measured["matrix_flops_per_second"][reference],
        peak_memory_bytes=said["memory_peak_bytes"],
        extra=extra | {name: _plain(value) for name, value in said.items()},
    )


def step_work(case: Case, model: Llava, batches: list[PackedBatch]) -> dict[str, int]:
    workload = Workload.of(model, case.config)
    return {
        "tokens": sum(len(batch.input_ids) for batch in batches),
        "samples": sum(len(batch.cu_seqlens) - 1 for batch in batches),
        "flops": sum(batch_flops(workload, batch).total for batch in batches),
    }


def _plain(value: float | list[str]) -> float | str:
    return ", ".join(value) if isinstance(value, list) else value


def optimizer_step(
    model: Llava, optimizer: AdamW, batches: list[PackedBatch], device: torch.device
) -> float:
    """Seconds of one step, which ends when the weights are updated."""
    started = time.perf_counter()
    num_loss_tokens = sum(batch.num_loss_tokens for batch in batches)
    for batch in batches:
        (model(to_device(batch, device)) / num_loss_tokens).backward()
    optimizer.step(optimizer.config.learning_rate, optimizer.gradient_norm())
    optimizer.zero_grad()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


# ---- the part ----


def run(options: verify.Options) -> list[str]:
    if options.only is None:
        measure_cases(options)
    return verify.run_benchmarks(PEERS, options)


def measure_cases(options: verify.Options) -> None:
    measured = ceilings("cuda")
    records = []
    for case in CASES:
        for record in measure_case(case, options, measured):
            print(verify.line(record), flush=True)
            records.append(record)
            write_part(options.results, options.part, records, measured, options.command)
        gc.collect()  # the model of this case goes before the next one comes
        torch.cuda.empty_cache()


def dry_run(options: verify.Options) -> list[str]:
    """Every case on paper, a small model for real, and the peers collected."""
    for case in CASES:
        print(on_paper(case), flush=True)
    small = Case(CPU_SMALL, "tiny-finetune", (2048,))
    model = build_model(small, torch.device("cpu"))
    record = measure_steps(small, model, 2048, ceilings("cpu"), num_samples=2, rounds=(0, 1))
    print(verify.line(record))
    return verify.collect_benchmarks(PEERS, options)


def on_paper(case: Case) -> str:
    """Size, memory and FLOPs of the case's largest micro-batch."""
    model, tokens = meta_model(case), max(case.micro_batch_tokens)
    sizes = [p.numel() / 1e9 for p in model.parameters()]
    trained = [p.numel() / 1e9 for p in model.trainable_parameters().values()]
    flops = step_work(case, model, step_batches(case, tokens))["flops"]
    return (
        f"{case.title(tokens)}: {sum(sizes):.2f} B parameters, {sum(trained):.3f} B trained, "
        f"{state_bytes(model) / 1e9:.1f} GB of state, about "
        f"{activation_bytes(case) * tokens / 1e9:.0f} GB of activations, "
        f"{flops / 1e12:.0f} TFLOP a step"
    )


if __name__ == "__main__":
    verify.part_main(run, dry_run)
