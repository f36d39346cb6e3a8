"""Part kernels of gpu_verify.sh: every microbenchmark of bench/, ours beside its peers.

`pytest bench/` with --record; stopped after the part's time it keeps what it has measured.
"""

from collections.abc import Iterator
from importlib import import_module

import torch

from bench import variants, verify

PROGRAMS = {  # of whole programs: they belong to the parts train and evaluate
    *("bench_train_step.py", "bench_data_loading.py", "bench_scaling.py", "bench_scoring.py"),
    "bench_shortcuts.py",
}


def files() -> list[str]:
    found = (verify.REPOSITORY / "bench").glob("bench_*.py")
    return sorted(path.name for path in found if path.name not in PROGRAMS)


def run(options: verify.Options) -> list[str]:
    return verify.run_benchmarks(files(), options)


def dry_run(options: verify.Options) -> list[str]:
    """Lists the comparisons that a GPU would run, with the bytes and FLOPs of a call."""
    variants.DEVICE, variants.DTYPE = torch.device("cuda"), torch.bfloat16
    variants.TYPE_NAME = "bf16"
    problems = []
    for name in files():
        try:
            for comparison in _comparisons(name):
                cost = comparison.shared.case.costs[comparison.direction]
                print(
                    f"{comparison.benchmark}, {comparison.case}, {comparison.direction}: "
                    f"{cost.bytes / 1e6:.1f} MB, {cost.flops / 1e9:.1f} GFLOP: "
                    f"{'; '.join(comparison.variants)}"
                )
        except Exception as error:  # a file that fails is a finding, the others go on
            problems.append(f"{name}: {type(error).__name__}: {error}")
    return problems


def _comparisons(name: str) -> Iterator:
    """Of every test of a file, once each; the rows of a test are its comparisons' variants."""
    seen = set()
    for value in vars(import_module(f"bench.{name.removesuffix('.py')}")).values():
        for mark in getattr(value, "pytestmark", ()):
            for row in mark.args[1] if mark.name == "parametrize" else ():
                if row.group not in seen:
                    seen.add(row.group)
                    yield row.comparison


if __name__ == "__main__":
    verify.part_main(run, dry_run)
