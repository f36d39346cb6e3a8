"""The whole experiment in one command; rerun it to continue where it stopped.

For example

    python scripts/reproduce.py tiny --output runs/tiny     (the toy world, minutes on a CPU)
    python scripts/reproduce.py paper --decoder DIR ...     (LLaMA2-7B; the README has the line)
"""

import tyro

from mmalign.command import command_line
from mmalign.experiment import PAPER, TINY, run_experiment


def main() -> None:
    presets = {"tiny": ("the toy world", TINY), "paper": ("the paper's row, 7B", PAPER)}
    with command_line():
        experiment = tyro.extras.overridable_config_cli(presets, description=__doc__)
        report = run_experiment(experiment)
        print(f"\nDone. Read {report}; runs, exports and evaluations are in the same folder.")


if __name__ == "__main__":
    main()
