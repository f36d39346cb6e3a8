"""Plan a run's memory: python scripts/plan_memory.py RECIPE [--gpu NAME] [--world-size N] [...]

    python scripts/plan_memory.py finetune-7b --gpu h100-80g
    python scripts/plan_memory.py finetune-7b --gpu a100-40g --world-size 8 --parallel.sharding full
    python scripts/plan_memory.py finetune-7b --model.decoder FOLDER --model.vision-tower FOLDER

Any field of the recipe can be set as for train.py. Without folders the recipe's published models
are assumed. No weights are read. --gpu: a100-40g, a100-80g, h100-80g (the default), h200, b200,
l40s, a40, a6000, a10g, rtx-3090, rtx-4090, or GiB of another card, such as 31.4. --world-size: the
processes that torchrun starts, 1 unless given.
"""

import argparse
import sys
from dataclasses import replace

from mmalign.command_line import parse_recipe
from mmalign.errors import UserError
from mmalign.recipes import RECIPES
from mmalign.training.memory.plan import MemoryPlan
from mmalign.training.memory.published import published_workload
from mmalign.training.memory.table import GPUS, capacity_of, check, flags_of, render, total_of


def main() -> None:
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--gpu", default="h100-80g")
    own.add_argument("--world-size", type=int, default=1)
    options, rest = own.parse_known_args()
    name = next((x for x in rest if x in RECIPES), "")
    config = parse_recipe(RECIPES, "plan_memory.py", __doc__, rest)
    parallel = config.parallel
    if parallel.sharding == "hybrid" and not parallel.shard_size:
        sys.exit("error: --parallel.shard-size: how many processes a node has is not known here")
    try:
        workload = published_workload(config, name)
        plan = MemoryPlan(config, workload, capacity_of(options.gpu), "cuda", options.world_size)
        chosen = check(plan)
    except UserError as error:
        sys.exit(f"error: {error}")
    print(f"{name} on {_cards(plan, options.gpu)}\n\n{render(plan)}\n")
    print(f"recommended: {flags_of(chosen)}")
    if plan.num_shards < plan.world_size and parallel.sharding == "none":
        parallel = replace(parallel, sharding="full")
        shared = replace(plan, config=replace(chosen, parallel=parallel))
        print(f"with --parallel.sharding full as well: {total_of(shared):.1f} GB")


def _cards(plan: MemoryPlan, gpu: str) -> str:
    number = f"{plan.world_size} x " if plan.world_size > 1 else ""
    card = f"{number}{gpu if gpu in GPUS else 'a card'}"
    sharding = f", --parallel.sharding {plan.config.parallel.sharding}" if number else ""
    return f"{card} of {plan.capacity / 2**30:.1f} GiB ({plan.capacity / 1e9:.1f} GB){sharding}"


if __name__ == "__main__":
    main()
