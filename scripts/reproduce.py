"""The whole experiment in one command; rerun it to continue where it stopped.

For example

    python scripts/reproduce.py tiny --output runs/tiny     (the toy world, minutes on a CPU)
    python scripts/reproduce.py paper --decoder DIR ...     (LLaMA2-7B; the README has the line)
"""

import logging
import sys

import tyro

from mmalign.errors import UserError
from mmalign.experiment import PAPER, TINY, run_experiment
from mmalign.training.guards import Stopped


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    presets = {"tiny": ("the toy world", TINY), "paper": ("the paper's row, 7B", PAPER)}
    experiment = tyro.extras.overridable_config_cli(presets, description=__doc__)
    try:
        report = run_experiment(experiment)
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(stopped.exit_code)
    except UserError as error:
        sys.exit(f"error: {error}")
    print(f"\nDone. Read {report}; runs, exports and evaluations are in the same folder.")


if __name__ == "__main__":
    main()
