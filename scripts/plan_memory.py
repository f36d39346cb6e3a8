"""Plan a run's memory: python scripts/plan_memory.py RECIPE [--gpu NAME] [--world-size N] [...]

    python scripts/plan_memory.py finetune-7b --gpu h100-80g
    python scripts/plan_memory.py finetune-7b --gpu a100-40g --world-size 8 --parallel.sharding full
    python scripts/plan_memory.py finetune-7b --model.decoder FOLDER --model.vision-tower FOLDER

Takes the fields of the recipe as train.py does. Without folders, the shapes are those of the
recipe's published models. No weights are read.
"""

import sys
from dataclasses import dataclass, replace
from typing import Annotated

import tyro

from mmalign.config import TrainConfig
from mmalign.errors import UserError
from mmalign.recipes import RECIPES
from mmalign.training.memory.plan import MemoryPlan
from mmalign.training.memory.table import (
    MEMORY_GIB,
    capacity_of,
    check,
    flags_of,
    published_workload,
    render,
    total_of,
)


@dataclass(frozen=True)
class Arguments:
    recipe: tyro.conf.Suppress[str]
    config: Annotated[TrainConfig, tyro.conf.arg(name="")]
    gpu: str = "h100-80g"
    """a100-40g, a100-80g, h100-80g, h200, b200, l40s, a40, a6000, a10g, rtx-3090, rtx-4090, GiB."""
    world_size: int = 1
    """Processes that torchrun starts."""


def main() -> None:
    recipes = {name: (text, Arguments(name, config)) for name, (text, config) in RECIPES.items()}
    arguments = tyro.extras.overridable_config_cli(
        recipes, prog="plan_memory.py", description=__doc__
    )
    config, parallel = arguments.config, arguments.config.parallel
    if parallel.sharding == "hybrid" and not parallel.shard_size:
        sys.exit("error: --parallel.shard-size is needed: processes per node are unknown here")
    try:
        workload, capacity = (
            published_workload(config, arguments.recipe),
            capacity_of(arguments.gpu),
        )
        plan = MemoryPlan(config, workload, capacity, "cuda", arguments.world_size)
        chosen = check(plan)
    except UserError as error:
        sys.exit(f"error: {error}")
    print(f"{arguments.recipe} on {_devices(plan, arguments.gpu)}\n\n{render(plan)}\n")
    print(f"recommended: {flags_of(chosen)}")
    if plan.num_shards < plan.world_size and parallel.sharding == "none":
        parallel = replace(parallel, sharding="full")
        shared = replace(plan, config=replace(chosen, parallel=parallel))
        print(f"with --parallel.sharding full as well: {total_of(shared):.1f} GB")


def _devices(plan: MemoryPlan, gpu: str) -> str:
    number = f"{plan.world_size} x " if plan.world_size > 1 else ""
    device = f"{number}{gpu if gpu in MEMORY_GIB else 'a GPU'}"
    sharding = f", --parallel.sharding {plan.config.parallel.sharding}" if number else ""
    return f"{device} with {plan.capacity / 2**30:.1f} GiB ({plan.capacity / 1e9:.1f} GB){sharding}"


if __name__ == "__main__":
    main()
