"""Train one stage: python|torchrun scripts/train.py RECIPE [--field.sub value ...]

    python scripts/train.py tiny-pretrain --run-dir runs/pretrain
    python scripts/train.py tiny-finetune --run-dir runs/finetune --model.projector runs/pretrain
    python scripts/train.py tiny-pretrain --run-dir runs/profiled --profile 10:13

The same command resumes a stopped run; one that a signal stopped exits with code 75.
--help lists the recipes, RECIPE --help its fields; scripts/README.md explains them.
"""

import os
import sys

import tyro

from mmalign.command import Stopped, command_line
from mmalign.evaluation.report import write_report
from mmalign.recipes import RECIPES
from mmalign.training.loop import train
from mmalign.training.run_folder import config_json
from mmalign.training.unused import options_in, refuse_unused


def main() -> None:
    config = tyro.extras.overridable_config_cli(RECIPES, prog="train.py", description=__doc__)
    if config.print_config:
        print(config_json(config))
        return
    refuse_unused(config, options_in(sys.argv))
    is_main = int(os.environ.get("RANK", 0)) == 0
    try:
        train(config)
    except Stopped as stopped:
        if is_main:  # every rank has stopped after the same step
            raise
        sys.exit(stopped.exit_code)
    if is_main:
        stages = {config.stage: config.run_dir}
        report = write_report(config.run_dir / "report.md", stages, evaluations={})
        print(f"curves and settings: {report}")


if __name__ == "__main__":
    with command_line():
        main()
