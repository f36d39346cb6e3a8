"""Plan a run's memory: python scripts/plan_memory.py RECIPE [--gpu NAME] [--world-size N] [...]

    python scripts/plan_memory.py finetune-7b --gpu h100-80g
    python scripts/plan_memory.py finetune-7b --gpu a100-40g --world-size 8 --parallel.sharding full
    python scripts/plan_memory.py finetune-7b --model.decoder FOLDER --model.vision-tower FOLDER

Takes the fields of the recipe as train.py does. Without folders the recipe's published models are
assumed; without --data.path samples as long as LLaVA's, with one image each. No weights are read.
"""

import sys
from dataclasses import dataclass, replace
from typing import Annotated

import tyro

from mmalign.command import command_line
from mmalign.config import TrainConfig
from mmalign.errors import UserError
from mmalign.recipes import RECIPES
from mmalign.tokenizer import Tokenizer
from mmalign.training.build import build_dataset, resolve
from mmalign.training.memory.plan import MemoryPlan
from mmalign.training.memory.samples import AverageSample, average_sample
from mmalign.training.memory.table import (
    MEMORY_GIB,
    capacity_of,
    check,
    flags_of,
    published_workload,
    render,
    total_of,
)
from mmalign.training.optimizer import check_update_in_backward
from mmalign.training.unused import options_in, refuse_unused
from mmalign.validation import validate


@dataclass(frozen=True)
class PlanMemory:
    recipe: tyro.conf.Suppress[str]
    config: Annotated[TrainConfig, tyro.conf.arg(name="")]
    gpu: Annotated[str, tyro.conf.arg(help=f"GiB, or {', '.join(MEMORY_GIB)}.")] = "h100-80g"
    world_size: int = 1
    """Processes that torchrun starts."""


def report(options: PlanMemory) -> str:
    validate(options.config)
    validate(options)
    check_update_in_backward(options.config.optimizer, options.world_size)
    config, parallel, world_size = options.config, options.config.parallel, options.world_size
    if parallel.sharding == "hybrid" and not parallel.shard_size:
        raise UserError("the number of processes per node is unknown: set --parallel.shard-size")
    if parallel.sharding == "hybrid" and world_size % parallel.shard_size:
        raise UserError(
            f"--parallel.shard-size {parallel.shard_size} does not divide --world-size {world_size}"
        )
    workload = published_workload(config, options.recipe)
    capacity, given = capacity_of(options.gpu), sample_of(config)
    plan = MemoryPlan(config, workload, capacity, "cuda", world_size, given)
    chosen = check(plan)
    gpus = options.gpu if options.gpu in MEMORY_GIB else "a GPU"
    gpus += f" of {plan.capacity / 2**30:.1f} GiB ({plan.capacity / 1e9:.1f} GB)"
    if world_size > 1:
        gpus = f"{world_size} x {gpus}, --parallel.sharding {parallel.sharding}"
    sample, source = plan.sample, config.data.path if given else "as in LLaVA's data"
    lines = f"{options.recipe} on {gpus}\n{sample.tokens:.0f} tokens per sample ({source}): "
    lines += f"{sample.loss_tokens:.0f} with a target, {sample.image_tokens:.0f} of images"
    text = f"{lines}\n\n{render(plan)}\n\nrecommended: {flags_of(chosen)}"
    if plan.num_shards < world_size and parallel.sharding == "none":
        sharded = replace(chosen, parallel=replace(parallel, sharding="full"))
        total = total_of(replace(plan, config=sharded))
        text += f"\nwith --parallel.sharding full as well: {total:.1f} GB"
    return text


def sample_of(config: TrainConfig) -> AverageSample | None:
    """Of the data, where the command line names it."""
    if not config.data.path:
        return None
    if not (config.model.decoder or config.model.tokenizer):
        raise UserError("--data.path: to count its tokens, --model.tokenizer is needed as well")
    config = resolve(config)
    return average_sample(build_dataset(config, Tokenizer.from_pretrained(config.model.tokenizer)))


if __name__ == "__main__":
    presets = {name: (text, PlanMemory(name, run)) for name, (text, run) in RECIPES.items()}
    with command_line():
        options = tyro.extras.overridable_config_cli(presets, description=__doc__)
        refuse_unused(options.config, options_in(sys.argv))
        print(report(options))
