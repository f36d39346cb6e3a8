"""The memory plan in words: for a device by name, as a table, and before a run begins."""

import logging
import os
from pathlib import Path

import torch

from mmalign.config import TrainConfig
from mmalign.errors import UserError
from mmalign.model.config import DecoderConfig, VisionConfig
from mmalign.model.recompute import POLICIES
from mmalign.training.flops import Workload
from mmalign.training.memory_plan import MemoryPlan
from mmalign.training.parallel import Ranks

log = logging.getLogger("mmalign")

# GiB that CUDA reports as the whole memory of the card, rounded down
GPUS = {
    "a100-40g": 39.4,
    "a100-80g": 79.1,
    "h100-80g": 79.1,
    "h200": 139.7,
    "b200": 178.3,
    "l40s": 44.3,
    "a6000": 47.4,
    "rtx-3090": 23.5,
    "rtx-4090": 23.5,
}


def capacity_of(gpu: str) -> int:
    """Bytes of a card by its name in GPUS."""
    if gpu not in GPUS:
        raise UserError(f"--gpu {gpu}: not one of {', '.join(GPUS)}")
    return int(GPUS[gpu] * 2**30)


def workload_of(config: TrainConfig) -> Workload:
    """From the configurations in config.model's folders. Image tokens get their rows."""
    decoder = DecoderConfig.from_hf(config.model.decoder)
    if config.data.text_only:
        return Workload(decoder, None, config.stage, config.lora)
    vision = VisionConfig.from_hf(config.model.vision_tower)
    return Workload(decoder, vision, config.stage, config.lora)


def render(plan: MemoryPlan) -> str:
    """GB by kind (columns: policies) with the plan's micro-batch, and what fits at most."""
    chosen = plan.recommend()
    tokens, num_layers = chosen.micro_batch_tokens, chosen.recompute_layers
    columns = [plan.at(tokens, x, num_layers if x == chosen.recompute else None) for x in POLICIES]
    rows = [(f"GB with {tokens:,} tokens, recompute", *POLICIES)]
    for kind in columns[0]:
        if any(column[kind] for column in columns):
            rows.append((kind, *(f"{column[kind] / 1e9:.2f}" for column in columns)))
    rows.append(("total", *(f"{sum(column.values()) / 1e9:.2f}" for column in columns)))
    rows.append(("most tokens that fit", *(f"{plan.most_tokens(x):,}" for x in POLICIES)))
    width = max(len(row[0]) for row in rows)
    lines = [f"{row[0]:<{width}}" + "".join(f"{cell:>13}" for cell in row[1:]) for row in rows]
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join(lines)


def flags_of(config: TrainConfig) -> str:
    """The decided knobs as they are written on the command line."""
    layers = config.recompute_layers
    limited = "" if layers is None else f" --recompute-layers {layers}"
    return (
        f"--recompute {config.recompute}{limited} --micro-batch-tokens {config.micro_batch_tokens}"
    )


def check(plan: MemoryPlan) -> TrainConfig:
    """plan.recommend(), or UserError with the table and the knobs where it does not fit.

    What fragmentation may take is planned for, but its estimate alone refuses nothing.
    """
    chosen = plan.recommend()
    policy, tokens = chosen.recompute, chosen.micro_batch_tokens
    needed = plan.at(tokens, policy, chosen.recompute_layers)
    if tokens and sum(needed.values()) - needed["fragmentation"] <= plan.capacity:
        return chosen
    total, capacity = (x / 1e9 for x in (sum(needed.values()), plan.capacity))
    what = (
        f"micro-batches of {tokens} tokens need" if tokens else "even without a micro-batch it is"
    )
    raise UserError(
        f"this run does not fit: {what} {total:.1f} GB of {capacity:.1f} GB.\n{render(plan)}\n"
        f"Turn one of these knobs: {'; '.join(_knobs(plan, chosen))}."
    )


def _knobs(plan: MemoryPlan, chosen: TrainConfig) -> list[str]:
    """What would help, the cheapest first."""
    config, knobs = plan.config, []
    most = plan.most_tokens(chosen.recompute, chosen.recompute_layers)
    if most:
        knobs.append(f"--micro-batch-tokens {most} (or auto)")
    fitting = [x for x in POLICIES if plan.most_tokens(x) >= max(chosen.micro_batch_tokens, 1)]
    if fitting:
        knobs.append(f"--recompute {fitting[0]} (or auto)")
    optimizer = config.optimizer
    if plan.workload.trains_decoder and (optimizer.master, optimizer.moments) != (
        "stochastic",
        "8bit",
    ):
        knobs.append("--optimizer.moments bf16 or 8bit, --optimizer.master stochastic (new run)")
    if config.precision == "fp32":
        knobs.append("--precision bf16 (new run)")
    if plan.workload.trains_decoder:
        knobs.append("--lora.rank 64 (new run)")
        if plan.num_shards == 1:
            knobs.append("--parallel.sharding full over several devices (torchrun)")
    return [*knobs, "a device with more memory"]


def plan_run(config: TrainConfig, ranks: Ranks) -> TrainConfig:
    """Before anything is loaded: config with every "auto" decided, or UserError."""
    capacity, where = _free_memory(ranks)
    plan = MemoryPlan(config, workload_of(config), capacity, ranks.device.type, ranks.world_size)
    chosen = check(ranks.from_main(plan))  # one decision for all processes
    total = plan.total(chosen.micro_batch_tokens, chosen.recompute, chosen.recompute_layers)
    if ranks.is_main:
        log.info(
            "memory: %.1f of %.1f GB %s, planned with %s",
            *(total / 1e9, capacity / 1e9, where, flags_of(chosen)),
        )
    return chosen


def _free_memory(ranks: Ranks) -> tuple[int, str]:
    """Bytes that this process may use, and of what."""
    if ranks.device.type == "cuda":
        return torch.cuda.get_device_properties(ranks.device).total_memory, "of the GPU"
    sharing = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    path = Path("/proc/meminfo")
    if path.exists():
        fields = dict(line.split(":") for line in path.read_text().splitlines())
        free = int(fields["MemAvailable"].split()[0]) * 1024
        return free // sharing, "of free RAM"
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return whole // sharing, "of all RAM (what of it is free is not known here)"
