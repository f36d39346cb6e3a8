"""Everything that only a GPU can show: the build, the GPU tests, and the benchmarks.

    bash scripts/gpu_verify.sh                        # all parts
    bash scripts/gpu_verify.sh --part build kernels   # some of them
    bash scripts/gpu_verify.sh --dry-run              # shows the commands

Every part is a list of commands, which go on after a failure. A benchmark writes
bench/results/<gpu>/<benchmark>.json, and how each command ended is added to verification.json as
soon as it ends. `python -m bench.render` makes bench/RESULTS.md of them.
"""

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch
import tyro

from bench.measured_peaks import machine
from mmalign.files import write_json

REPOSITORY = Path(__file__).resolve().parents[1]
PYTEST = (sys.executable, "-m", "pytest")
TESTS = ("tests/kernels", "tests/csrc", "tests/model", "tests/training")
SANITIZER = ("compute-sanitizer", "--target-processes", "all", "--error-exitcode", "86")
# PyTorch's cache of freed blocks would hide reads past the end of a tensor
UNCACHED = ("env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1")
PROGRAMS = {
    "train": ("train_step", "shortcuts", "scaling", "data_loading"),
    "evaluate": ("scoring",),
}

Part = Literal["build", "correctness", "kernels", "train", "evaluate"]
PARTS: tuple[Part, ...] = ("build", "correctness", "kernels", "train", "evaluate")


@dataclass(frozen=True)
class Options:
    part: tuple[Part, ...] = PARTS
    """What to run; by default everything."""
    dry_run: tyro.conf.FlagCreatePairsOff[bool] = False
    """Show the commands and run none."""
    results: Path = REPOSITORY / "bench/results"
    """Folder of the results: RESULTS/<gpu>/*.json."""


def commands(part: Part, folder: Path) -> list[tuple[str, ...]]:
    """The commands of a part, whose results go to `folder`."""
    if part == "build":
        build = (sys.executable, "setup.py", "build_ext", "--inplace")
        return [build, (sys.executable, "-m", "mmalign_kernels")]
    if part == "correctness":
        workers = ("-n", "8") if find_spec("xdist") else ()  # most of the time compiles kernels
        cuda, triton = "tests/csrc/sanitize.py", "tests/kernels/test_registration.py"
        return [
            (*PYTEST, *TESTS, "-m", "gpu", *workers),
            *(
                (*UNCACHED, *SANITIZER, "--tool", tool, sys.executable, cuda)
                for tool in ("memcheck", "racecheck", "initcheck")
            ),
            (*UNCACHED, *SANITIZER, *PYTEST, triton, "-m", "gpu", "-k", "opcheck and triton"),
        ]
    return [
        (*PYTEST, f"bench/bench_{name}.py", "--benchmark-json", str(folder / f"{name}.json"))
        for name in benchmarks(part)
    ]


def benchmarks(part: Part) -> Sequence[str]:
    """Names of the benchmark files of a part: kernels has those that no other part has."""
    if part != "kernels":
        return PROGRAMS[part]
    others = {name for names in PROGRAMS.values() for name in names}
    files = (REPOSITORY / "bench").glob("bench_*.py")
    return sorted({path.stem.removeprefix("bench_") for path in files} - others)


def run(command: Sequence[str]) -> tuple[int, str]:
    """(exit code, last line of the output); the output is shown as it comes."""
    last = ""
    try:
        process = subprocess.Popen(
            command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
    except FileNotFoundError as error:
        return 127, f"{error.filename} is not on PATH"
    for line in process.stdout or ():
        print(line, end="", flush=True)
        last = line.strip() or last
    return process.wait(), last


def verify(options: Options) -> list[str]:
    """Runs the parts; the commands that failed."""
    folder = options.results / machine()["name"]
    path, failed = folder / "verification.json", []
    if not options.dry_run:
        folder.mkdir(parents=True, exist_ok=True)
    known = json.loads(path.read_text())["commands"] if path.exists() else []
    records = [record for record in known if record["part"] not in options.part]
    for part in options.part:
        for command in commands(part, folder):
            # the interpreter first: it may lie in the repository
            shown = shlex.join(command).replace(sys.executable, "python")
            shown = shown.replace(f"{REPOSITORY}/", "")
            print(f"==== {part}: {shown}", flush=True)
            if options.dry_run:
                continue
            started = time.monotonic()
            code, last = run(command)
            seconds = time.monotonic() - started
            record = {"part": part, "command": shown, "exit_code": code, "seconds": seconds}
            records.append(record | {"last_line": last.replace(f"{REPOSITORY}/", "")})
            write_json(path, {"commands": records})
            failed += [shown] if code else []
    return failed


def main() -> None:
    options = tyro.cli(Options, prog="gpu_verify.sh", description=__doc__)
    if not options.dry_run and not torch.cuda.is_available():
        sys.exit("PyTorch sees no CUDA device here; --dry-run shows the commands")
    if failed := verify(options):
        sys.exit("\n  ".join(["failed:", *failed]))


if __name__ == "__main__":
    main()
