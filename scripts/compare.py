"""Compare two evaluation outputs, document by document.

python scripts/compare.py DIR_A DIR_B
"""

import json
import sys
from pathlib import Path
from typing import Annotated

import tyro

from mmalign.errors import UserError
from mmalign.evaluation.compare import compare_evaluations
from mmalign.evaluation.tables import print_comparison


def main(
    dir_a: Annotated[Path, tyro.conf.Positional],
    dir_b: Annotated[Path, tyro.conf.Positional],
    output: Path | None = None,
) -> None:
    """Compare two evaluation outputs, document by document.

    Args:
        dir_a: Output folder of scripts/evaluate.py, for example of the base model.
        dir_b: Another one over the same documents; differences are B - A.
        output: JSON file to write; default: comparison.json in DIR_B.
    """
    comparison = compare_evaluations(dir_a, dir_b)
    path = output or dir_b / "comparison.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(comparison, indent=2) + "\n")
    print_comparison(comparison)
    print(f"written to {path}")


if __name__ == "__main__":
    try:
        tyro.cli(main, description=__doc__)
    except UserError as error:
        sys.exit(f"error: {error}")
