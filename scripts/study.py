"""A study: parents x variants x seeds, and a verdict on each question; given again, it continues.

python scripts/study.py scripts/studies/tiny.toml --dry-run   # what it would run, and the cost
python scripts/study.py scripts/studies/tiny.toml --jobs 2    # runs what is not done; report.md
"""

from dataclasses import dataclass
from pathlib import Path

import tyro

from mmalign.command import command_line
from mmalign.errors import UserError
from mmalign.ownership import require_names
from mmalign.study.identity import Orders
from mmalign.study.preview import preview
from mmalign.study.report import FILES, write_study
from mmalign.study.schedule import run_study
from mmalign.study.slurm import slurm_script
from mmalign.study.study_file import parse_overrides, read_study


@dataclass(frozen=True)
class Options:
    study: tyro.conf.Positional[Path]
    """The study's TOML file; --table.key VALUE replaces any key (scripts/studies explain them)."""
    dry_run: tyro.conf.FlagCreatePairsOff[bool] = False
    """Only print every run with its state, GPU-hours, disk, and what is missing."""
    report: tyro.conf.FlagCreatePairsOff[bool] = False
    """Only write the report from what is there."""
    slurm: tyro.conf.FlagCreatePairsOff[bool] = False
    """Only print the sbatch commands that run the study as job arrays, stage by stage."""
    only: tuple[str, ...] = ()
    """Run only these variants (also base, pretrain), parents, or PARENT/VARIANT; no report."""
    seeds: tuple[int, ...] = ()
    """Run only these seeds of the study."""
    jobs: int = 1
    """Runs at a time: each has a GPU, or a share of the cores."""
    gpu: str = "h100-80g"
    """Whose GPU-hours --dry-run prints."""


def _refuse_together(options: Options) -> None:
    """UserError for options of which one would be ignored."""
    instead = {"--dry-run": options.dry_run, "--report": options.report, "--slurm": options.slurm}
    modes = [flag for flag, given in instead.items() if given]
    if len(modes) > 1:
        raise UserError(f"{' and '.join(modes)} are different commands. Give one of them")
    if options.report and (options.only or options.seeds):
        raise UserError("--report covers the whole study. Leave out --only and --seeds")


def main() -> None:
    options, rest = tyro.cli(Options, description=__doc__, return_unknown_args=True)
    _refuse_together(options)
    orders = Orders(read_study(options.study, parse_overrides(rest)), dry=options.dry_run)
    chosen = orders.study.chosen(options.only, options.seeds)
    if options.dry_run:
        return print(preview(orders, chosen, options.jobs, options.gpu))
    if options.slurm:
        return print(slurm_script(orders, chosen, [str(options.study), *rest]))
    require_names(orders.study.output, FILES, ("runs",))
    failed = {} if options.report else run_study(orders, chosen, options.jobs)
    if options.report or not (options.only or options.seeds):
        print(write_study(orders))
    if failed:
        raise UserError("\n  ".join(["failed:", *(f"{name}: {failed[name]}" for name in failed)]))


if __name__ == "__main__":
    with command_line():
        main()
