"""Runs the parts of scripts/gpu_verify.sh, each in a process of its own, and what they share."""

import argparse
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bench.record import Record

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = REPOSITORY / "bench/results"
LIBRARY = REPOSITORY / "kernels/mmalign_kernels/cuda/libmmalign_cuda.so"
PART_SECONDS = 480
LAST_WORDS_SECONDS = 20  # for a stopped pytest to write its report
INTERRUPTED = 2  # exit code of pytest
PACKAGES = (
    *("matplotlib", "numpy", "nvidia-ml-py", "pillow", "pytest", "pytest-benchmark", "rich"),
    *("safetensors", "sentencepiece", "tensorboard", "tokenizers", "torch", "tqdm", "transformers"),
    *("triton", "tyro", "typeguard", "docstring-parser"),  # the last two are tyro's
)
IMPORT_NAMES = {"nvidia-ml-py": "pynvml", "pillow": "PIL"}  # of the others: - is _
PARTS = ("build", "correctness", "kernels", "train", "evaluate")


@dataclass(frozen=True)
class Options:
    """Of one part's process."""

    part: str
    dry_run: bool = False
    results: Path = RESULTS
    data_root: Path | None = None
    tokenizer: Path | None = None
    only: str | None = None
    started: float = field(default_factory=time.monotonic)

    @property
    def seconds_left(self) -> float:
        return self.started + PART_SECONDS - time.monotonic()

    @property
    def command(self) -> str:
        """What reproduces the part; stands in its results."""
        given = {"--data-root": self.data_root, "--tokenizer": self.tokenizer}
        more = "".join(f" {name} DIR" for name, value in given.items() if value)
        return f"bash scripts/gpu_verify.sh --part {self.part}{more}"

    def arguments(self) -> list[str]:
        """The command line of the part's process."""
        given = {"--results": self.results, "--data-root": self.data_root}
        given |= {"--tokenizer": self.tokenizer, "--only": self.only}
        words = ["--part", self.part] + (["--dry-run"] if self.dry_run else [])
        return words + [str(word) for pair in given.items() if pair[1] for word in pair]


def parse(words: list[str] | None = None) -> list[Options]:
    """One Options for every part that the command line names; all parts where it names none."""
    parser = argparse.ArgumentParser(
        prog="gpu_verify.sh", description="Verifies the project on the GPU of this machine."
    )
    parser.add_argument("--part", choices=PARTS, nargs="+", default=PARTS, help="default: all")
    parser.add_argument("--dry-run", action="store_true", help="all but the launches; needs no GPU")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON files")
    parser.add_argument("--data-root", type=Path, help="folder with truthfulqa/ and ethics/")
    parser.add_argument("--tokenizer", type=Path, help="the model's tokenizer, with --data-root")
    parser.add_argument("--only", help="only what pytest -k EXPR picks of bench/", metavar="EXPR")
    given = parser.parse_args(words)
    if (given.data_root is None) != (given.tokenizer is None):
        parser.error("--data-root and --tokenizer go together: real documents need both")
    shared = {name: value for name, value in vars(given).items() if name != "part"}
    return [Options(part, **shared) for part in given.part]


def missing_packages() -> list[str]:
    """What has to be importable and is not, by the names that pip takes."""
    imports = {name: IMPORT_NAMES.get(name, name.replace("-", "_")) for name in PACKAGES}
    return [name for name, imported in imports.items() if find_spec(imported) is None]


def run(words: Sequence[str], seconds: float) -> int:
    """Exit code of a command whose output is shown. After `seconds` it gets Ctrl-C, so that pytest
    still writes what it has."""
    process = subprocess.Popen(words, cwd=REPOSITORY)
    try:
        return process.wait(max(seconds, 1))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
    try:
        return process.wait(LAST_WORDS_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def run_quietly(
    words: Sequence[str], seconds: float, env: Mapping[str, str] | None = None
) -> tuple[int, str]:
    """(exit code, output) of a command; it is killed after `seconds`."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(words, cwd=REPOSITORY, env=env, **pipes)
    try:
        output, _ = process.communicate(timeout=max(seconds, 1))
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
        output += f"\nkilled after {seconds:.0f} seconds"
    return process.returncode, without_paths(output)


def without_paths(text: str) -> str:
    """Records are committed: they name files from the repository's root on."""
    return text.replace(f"{REPOSITORY}/", "")


def line(record: "Record") -> str:
    """One line of a part's output."""
    name = f"{record.benchmark}, {record.case}, {record.variant}"
    if record.seconds is None:
        return f"{name}: skipped, {record.skipped}"
    rates = {"tokens_per_second": "tokens/s", "samples_per_second": "samples/s", "mfu": "MFU"}
    said = [
        f"{record.extra[key]:,.4g} {unit}" for key, unit in rates.items() if key in record.extra
    ]
    said += [] if record.share is None else [f"{record.share:.0%} of {record.ceiling}"]
    said += [f"{record.peak_memory_bytes / 1e9:.1f} GB"] if record.peak_memory_bytes else []
    return f"{name}: {record.seconds:.3g} s  {'  '.join(said)}"


def run_benchmarks(files: Sequence[str], options: Options) -> list[str]:
    """`pytest --record` on files of bench/ in what is left of the part's time; what is wrong."""
    paths = [f"bench/{name}" for name in files]
    words = [sys.executable, "-m", "pytest", *paths, "--record", str(options.results)]
    words += ["-k", options.only] if options.only else []
    code = run(words, options.seconds_left - LAST_WORDS_SECONDS)
    if code == INTERRUPTED:
        return ["the part's 8 minutes were over: name what is missing with --only"]
    return [f"pytest {' '.join(paths)} ended with {code}"] if code else []


def collect_benchmarks(files: Sequence[str], options: Options) -> list[str]:
    """Imports the files and counts their cases; what is wrong."""
    paths = [f"bench/{name}" for name in files]
    words = [sys.executable, "-m", "pytest", "--collect-only", *paths]
    code, output = run_quietly(words, options.seconds_left)
    print(f"{' '.join(paths)}: {output.strip().splitlines()[-1]}", flush=True)
    return [f"{' '.join(paths)} cannot be collected: {output[-2000:]}"] if code else []


def build_library(seconds: float) -> tuple[int, str]:
    """(exit code, output) of building csrc/ for the card that is here, into the package."""
    return run_quietly([sys.executable, "setup.py", "build_ext", "--inplace"], seconds)


def part_main(
    part: Callable[[Options], list[str]], dry_run: Callable[[Options], list[str]]
) -> None:
    """Main of bench/verify_<part>.py: runs it, prints what is wrong, exits with 1 if anything."""
    (options,) = parse()
    if not options.dry_run and options.part != "build" and not LIBRARY.exists():
        build_library(options.seconds_left / 2)
        print(f"csrc/ was {'built' if LIBRARY.exists() else 'not built, --part build says why'}")
    problems = dry_run(options) if options.dry_run else part(options)
    for problem in problems:
        print(f"PROBLEM in {options.part}: {problem}", flush=True)
    sys.exit(bool(problems))


def main() -> None:
    """All parts one after the other, and which of them failed."""
    parts = parse()
    if missing := missing_packages():
        sys.exit(f"not importable here; install them: python -m pip install {' '.join(missing)}")
    _check_device(parts[0].dry_run)
    failed = []
    for options in parts:
        print(f"==== {options.part} ====", flush=True)
        words = [sys.executable, "-m", f"bench.verify_{options.part}", *options.arguments()]
        started = time.monotonic()
        try:
            code = subprocess.run(words, cwd=REPOSITORY, timeout=PART_SECONDS + 20).returncode
        except subprocess.TimeoutExpired:
            print(f"PROBLEM in {options.part}: not finished after {PART_SECONDS + 20} seconds")
            code = 124
        print(f"==== {options.part}: {time.monotonic() - started:.0f} seconds", flush=True)
        failed += [options.part] if code else []
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")
    print("all parts passed")


def _check_device(dry_run: bool) -> None:
    import torch

    if not dry_run and not torch.cuda.is_available():
        sys.exit("PyTorch sees no CUDA device here; --dry-run checks everything but the launches")


if __name__ == "__main__":
    main()
