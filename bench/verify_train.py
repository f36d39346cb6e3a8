"""Part train of gpu_verify.sh: optimizer steps of 7B and 3B recipes with random weights.

A step is the recipe's global batch, cut into micro-batches of a given size, from packed batches in
host memory to updated weights: copies, forward, backward, gradient norm, AdamW. The memory plan
chooses the recomputation, and what it expects stands beside the peak in the record; what does not
fit the card is recorded with the reason. The peers are those of bench_train_step.py.
"""

import gc
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

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
from mmalign.batch import PackedBatch
from mmalign.config import TrainConfig
from mmalign.data.loader import micro_batches
from mmalign.data.packing import pack_samples
from mmalign.distributed import DistributedContext
from mmalign.errors import UserError
from mmalign.flops import Workload, batch_flops
from mmalign.model.llava import Llava
from mmalign.recipes import RECIPES
from mmalign.system import DTYPES
from mmalign.training.memory.plan import MemoryPlan
from mmalign.training.memory.table import capacity_of, check, flags_of, total_of
from mmalign.training.optimizer import AdamW
from mmalign.training.telemetry import Telemetry

BENCHMARK = "train_recipe"
PEERS = ("bench_train_step.py", "bench_shortcuts.py")
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

    def plan(self, tokens: int, device: torch.device) -> MemoryPlan:
        decoder = self.size.decoder
        decoder = replace(decoder, vocab_size=decoder.vocab_size + NUM_IMAGE_TOKENS)
        config = replace(self.config, micro_batch_tokens=tokens)
        workload = Workload(decoder, self.size.vision, config.stage, config.lora)
        capacity = 2**63
        if device.type == "cuda":
            capacity = torch.cuda.get_device_properties(device).total_memory
        return MemoryPlan(config, workload, capacity, device.type)

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


# ---- measuring ----


def measure_case(case: Case, options: verify.Options, measured: dict) -> Iterator[Record]:
    """A record for every size of micro-batch; from the first that does not fit on, the reason."""
    device = torch.device("cuda")
    model, reason = None, None
    for tokens in case.micro_batch_tokens:
        reason = reason or why_it_cannot_fit(case.plan(tokens, device))
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


def why_it_cannot_fit(plan: MemoryPlan) -> str | None:
    try:
        check(plan)
    except UserError:
        needed = total_of(replace(plan, config=plan.recommend()))
        return f"{needed:.0f} GB are planned; the card has {plan.capacity / 1e9:.0f} GB"
    return None


def build_model(case: Case, device: torch.device) -> Llava:
    """Random weights on `device`, with what the recipe trains marked."""
    model = random_llava(case.size, case.config.stage, device, DTYPES[case.config.precision])
    config = case.config
    model.set_trainable(config.stage, config.lora, config.trains_image_tokens)
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
    plan = case.plan(micro_batch_tokens, device)
    chosen = plan.recommend()
    model.decoder.set_recompute(chosen.recompute, chosen.recompute_layers)
    planned = plan.at(micro_batch_tokens, chosen.recompute, chosen.recompute_layers)
    batches = step_batches(case, micro_batch_tokens, num_samples)
    optimizer = AdamW(model.trainable_parameters(), case.config.optimizer)
    with Telemetry(case.config, DistributedContext(0, 1, device)) as telemetry:
        for _ in range(rounds[0]):
            optimizer_step(model, optimizer, batches, device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds = [optimizer_step(model, optimizer, batches, device) for _ in range(rounds[1])]
        work = step_work(plan.workload, batches)
        median = statistics.median(seconds)
        said = telemetry.record(**work, seconds=median, data_seconds=0.0)
    reference = measured["matrix_reference"]
    # the peak is of tensors: it has neither CUDA's context nor what fragmentation takes
    tensors = sum(planned.values()) - planned["context"] - planned["fragmentation"]
    decided = {"recompute": flags_of(chosen), "planned_bytes": tensors}
    extra = work | {"micro_batches": len(batches)} | decided
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


def step_work(workload: Workload, batches: list[PackedBatch]) -> dict[str, int]:
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
        (model(batch.to(device)) / num_loss_tokens).backward()
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
    """Size, memory and FLOPs of the case's largest micro-batch, on an H100 of 80 GB."""
    tokens = max(case.micro_batch_tokens)
    plan = case.plan(tokens, torch.device("cpu"))
    plan = replace(plan, device_type="cuda", capacity=capacity_of("h100-80g"))
    plan = replace(plan, config=plan.recommend())
    trained = sum(x.numel for x in plan.parameters if x.trained) / 1e9
    flops = step_work(plan.workload, step_batches(case, tokens))["flops"]
    return (
        f"{case.title(tokens)}: {sum(x.numel for x in plan.parameters) / 1e9:.2f} B parameters, "
        f"{trained:.3f} B trained, {total_of(plan):.0f} GB with {flags_of(plan.config)}, "
        f"{flops / 1e12:.0f} TFLOP a step"
    )


if __name__ == "__main__":
    verify.part_main(run, dry_run)
