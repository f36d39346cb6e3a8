"""Compare evaluation outputs, document by document, and report them side by side.

For example

    python scripts/compare.py DIR_A DIR_B
    python scripts/compare.py BASE TUNED_1 TUNED_2 --output runs/comparison
"""

from pathlib import Path
from typing import Annotated

import tyro

from mmalign.command import command_line
from mmalign.errors import UserError
from mmalign.evaluation.items import make_folder
from mmalign.evaluation.report import compare_with_base, name_evaluations, write_report
from mmalign.evaluation.report.tables import print_comparison
from mmalign.files import write_json
from mmalign.ownership import require_names


def main(
    dir_a: Annotated[Path, tyro.conf.Positional],
    dir_b: Annotated[Path, tyro.conf.Positional],
    others: Annotated[tuple[Path, ...], tyro.conf.Positional] = (),
    output: Path | None = None,
) -> None:
    """Compare evaluation outputs, document by document, and report them side by side.

    Args:
        dir_a: Output folder of scripts/evaluate.py, for example of the base model.
        dir_b: Another one over the same documents; differences are B - A.
        others: More outputs; each is compared with the first.
        output: Folder for report.md, its figures, CSV files, the flipped documents and
            comparison.json; default: comparison/ in the last output.
    """
    folders = [dir_a, dir_b, *others]
    names = name_evaluations(folders)
    output = output or folders[-1] / "comparison"
    if output.resolve() in [folder.resolve() for folder in folders]:
        raise UserError(f"--output {output} is an evaluation, whose report would be replaced")
    require_names(output, ("report.md", "*.png", "*.csv", "flipped*.jsonl", "comparison.json"))
    comparisons = compare_with_base(names)
    make_folder(output)
    title = "Evaluations side by side"
    report = write_report(output / "report.md", {}, names, title=title, comparisons=comparisons)
    kept = [{k: v for k, v in found.items() if k != "flipped"} for found in comparisons.values()]
    path = output / "comparison.json"
    write_json(path, dict(zip(comparisons, kept, strict=True)))
    for comparison in comparisons.values():
        print_comparison(comparison)
    print(f"report: {report}\nflipped documents: {output / 'flipped*.jsonl'}\nnumbers: {path}")


if __name__ == "__main__":
    with command_line():
        tyro.cli(main, description=__doc__)
