"""The memory plan in words: for a GPU by name, as a table, and before a run starts."""

import gc
import logging
import os
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch

from mmalign.config import TrainConfig
from mmalign.data.dataset import ConversationDataset
from mmalign.distributed import DistributedContext
from mmalign.errors import UserError
from mmalign.flops import Workload
from mmalign.model.config import CLIP_VIT_L_14, CLIP_VIT_L_14_336, LLAMA2_7B, OPENLLAMA_3B
from mmalign.model.recompute import POLICIES
from mmalign.system import GPUS
from mmalign.training.build import TOY_WORLD
from mmalign.training.memory.plan import CONTEXT_BYTES, STEP, MemoryPlan
from mmalign.training.memory.samples import average_sample
from mmalign.training.optimizer import cannot_shard_codes, check_update_in_backward
from mmalign.training.run_folder import with_first_decision

log = logging.getLogger("mmalign")

MEMORY_GIB = {gpu.name: gpu.memory_gib for gpu in GPUS if gpu.memory_gib}
SMALLER_STATES = (  # optimizer states that a refusal proposes
    {"moments": "bf16"},
    {"moments": "8bit"},
    {"master": "stochastic"},
    {"master": "stochastic", "moments": "bf16"},
    {"master": "stochastic", "moments": "8bit"},
)


def capacity_of(gpu: str) -> int:
    """Bytes of a GPU by its name in MEMORY_GIB, or from a number of GiB."""
    try:
        gib = MEMORY_GIB[gpu] if gpu in MEMORY_GIB else float(gpu)
    except ValueError:
        gib = -1.0
    if not 0 < gib <= 1e6:
        raise UserError(f"--gpu {gpu}: expected one of {', '.join(MEMORY_GIB)}, or a number of GiB")
    return int(gib * 2**30)


def published_workload(config: TrainConfig, recipe: str) -> Workload:
    """Of the folders that config names, or else of the published models of the recipe."""
    model = config.model
    if TOY_WORLD in (model.decoder, model.vision_tower):
        raise UserError(
            f"{recipe}: the toy world is built when it is first used, and fits every device. Plan "
            "a recipe of a published model, or add --model.decoder and --model.vision-tower"
        )
    if model.decoder and (model.vision_tower or config.data.text_only):
        return Workload.from_config(config)
    if model.decoder or model.vision_tower:
        raise UserError("use --model.decoder and --model.vision-tower together, or neither")
    decoder = OPENLLAMA_3B if "open-llama-3b" in recipe else LLAMA2_7B
    vision = CLIP_VIT_L_14_336 if "llava-1.5" in recipe else CLIP_VIT_L_14
    return Workload.from_config(config, decoder, None if config.data.text_only else vision)


def render(plan: MemoryPlan) -> str:
    """GB by kind (columns: policies) with the plan's micro-batch, and the most tokens that fit."""
    tokens, chosen, num_layers = plan.recommend().micro_batching
    layers = {x: num_layers if x == chosen else None for x in POLICIES}
    columns = [plan.at(tokens, x, layers[x]) for x in POLICIES]
    heads = (x if layers[x] is None else f"{x}, {layers[x]} layers" for x in POLICIES)
    rows = [(f"GB with {tokens:,} tokens, recompute", *heads)]
    logits = plan.logits(plan.batch(tokens)) / 1e9
    names = {"workspace": f"workspace (logits alone: {logits:.2f})"}
    for kind in columns[0]:
        if any(column[kind] for column in columns):
            name = names.get(kind, kind)
            rows.append((name, *(f"{column[kind] / 1e9:.2f}" for column in columns)))
    rows.append(("total", *(f"{sum(column.values()) / 1e9:.2f}" for column in columns)))
    most = (plan.most_tokens(x, layers[x]) for x in POLICIES)
    rows.append(("most tokens that fit", *(f"{num:,}" for num in most)))
    width, cell_width = max(len(row[0]) for row in rows), max(len(x) for x in rows[0][1:]) + 2
    lines = [f"{row[0]:<{width}}" + "".join(f"{x:>{cell_width}}" for x in row[1:]) for row in rows]
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join(lines)


def flags_of(config: TrainConfig) -> str:
    """The plan's choices as flags; policies of some layers only are those of "auto"."""
    recompute = config.recompute
    if config.recompute_layers is not None:
        recompute = f"auto ({recompute} in {config.recompute_layers} layers)"
    return f"--recompute {recompute} --micro-batch-tokens {config.micro_batch_tokens}"


def total_of(plan: MemoryPlan) -> float:
    """GB of a plan whose configuration has no "auto"."""
    return plan.total(*plan.config.micro_batching) / 1e9


def check(plan: MemoryPlan) -> TrainConfig:
    """plan.recommend(); raises UserError with the table and remedies where it does not fit."""
    if plan.unshardable:
        raise cannot_shard_codes("a matrix", plan.unshardable)
    chosen = plan.recommend()
    if _fits(plan, chosen):
        return chosen
    tokens, capacity = chosen.micro_batching.tokens, plan.capacity / 1e9
    total = total_of(replace(plan, config=chosen))
    what = f"micro-batches of {tokens} tokens need" if tokens else "without a micro-batch it needs"
    remedies = "".join(f"\n  {remedy}" for remedy in _remedies(plan, chosen))
    raise UserError(
        f"this run does not fit: {what} {total:.1f} GB, and there are {capacity:.1f}.\n\n"
        f"{render(plan)}\n\nEach of these alone makes it fit:{remedies}"
    )


def _fits(plan: MemoryPlan, chosen: TrainConfig) -> bool:
    """Fragmentation is planned for, but its estimate alone refuses nothing."""
    required = plan.at(*chosen.micro_batching)
    total = sum(required.values()) - required["fragmentation"]
    return chosen.micro_batching.tokens > 0 and total <= plan.capacity


def _remedies(plan: MemoryPlan, chosen: TrainConfig) -> Iterator[str]:
    """Changes that make it fit, the cheapest first."""

    def helps(plan: MemoryPlan = plan, **changes) -> bool:
        config = replace(plan.config, **changes)
        other = replace(plan, config=config, workload=replace(plan.workload, lora=config.lora))
        return other.unshardable is None and _fits(other, other.recommend())

    tokens, policy, num_layers = chosen.micro_batching
    if most := plan.most_tokens(policy, num_layers):
        yield f"--micro-batch-tokens {most} (or auto)"
    if helps(recompute="auto", recompute_layers=None):
        yield "--recompute auto"
    for kind in _smaller_runs(plan.config):
        helpful = (flags for flags, changes in kind if helps(**changes))
        yield from (f"{flags} (in a new --run-dir)" for flags in islice(helpful, 1))
    if plan.num_shards == 1 and plan.device_type == "cuda":
        parallel = replace(plan.config.parallel, sharding="full")
        numbers = (2**i for i in range(1, 7) if 2**i >= plan.world_size)
        enough = (n for n in numbers if helps(replace(plan, world_size=n), parallel=parallel))
        yield from (
            f"--parallel.sharding full, on {n} devices (torchrun)" for n in islice(enough, 1)
        )
    required = total_of(replace(plan, config=replace(chosen, micro_batch_tokens=tokens or STEP)))
    device = "device" if plan.device_type == "cuda" else "machine"
    yield f"a {device} with {required:.0f} GB of free memory"


def _smaller_runs(config: TrainConfig) -> Iterator[list[tuple[str, dict]]]:
    """Runs with less state, kind by kind and the mildest first: flags, and what they change."""
    if config.precision == "fp32":
        yield [("--precision bf16", {"precision": "bf16"})]
    if config.stage == "finetune":
        yield [
            (
                " ".join(f"--optimizer.{name} {value}" for name, value in state.items()),
                {"optimizer": replace(config.optimizer, **state)},
            )
            for state in SMALLER_STATES
        ]
    lora = config.lora
    if config.stage == "finetune" and lora.rank == 0:
        yield [("--lora.rank 64", {"lora": replace(lora, rank=64)})]
    elif lora.train_embeddings:
        without = replace(lora, train_embeddings=False)
        yield [("--lora.train-embeddings False", {"lora": without})]


def plan_run(
    config: TrainConfig, ranks: DistributedContext, dataset: ConversationDataset
) -> TrainConfig:
    """Before anything is loaded: config with "auto" resolved; raises UserError if it cannot fit."""
    check_update_in_backward(config.optimizer, ranks.world_size)
    capacity, where = _free_memory(ranks)
    config = with_first_decision(config)
    workload = Workload.from_config(config)
    device, sample = ranks.device.type, average_sample(dataset) if ranks.is_main else None
    plan = MemoryPlan(config, workload, capacity, device, ranks.world_size, sample)
    chosen = check(ranks.broadcast_from_main(plan))  # one decision for all ranks
    if ranks.is_main:
        total, flags = total_of(replace(plan, config=chosen)), flags_of(chosen)
        log.info("memory: %.1f of %.1f GB %s, planned with %s", total, capacity / 1e9, where, flags)
    return chosen


def _free_memory(ranks: DistributedContext) -> tuple[int, str]:
    """Bytes that this process may use, and of what."""
    if ranks.device.type == "cuda":
        gc.collect()  # what an earlier stage of this process has left
        free, total = torch.cuda.mem_get_info(ranks.device)
        # not free, but ours: the context, which the plan counts, and the allocator's cache
        cached = torch.cuda.memory_reserved(ranks.device)
        cached -= torch.cuda.memory_allocated(ranks.device)
        return min(free + cached + CONTEXT_BYTES["cuda"], total), "free on the GPU"
    sharing = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    path = Path("/proc/meminfo")
    if path.exists():
        fields = dict(line.split(":") for line in path.read_text().splitlines())
        free = int(fields["MemAvailable"].split()[0]) * 1024
        return free // sharing, "of free RAM"
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return total // sharing, "of total RAM (free memory unknown on this platform)"
