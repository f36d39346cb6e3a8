"""Part build of gpu_verify.sh: csrc/ for the card that is here, tools, and what backends serve."""

import re
import shutil
import sys
import time

from bench import verify
from bench.ceilings import ceilings
from bench.record import Record, write_part

TOOLS = ("nvcc", "cmake", "ninja", "g++", "compute-sanitizer", "ncu")
DRY_ARCHITECTURE = "90a"  # Hopper
OUTPUT = 4000  # characters kept of a failed build
TABLE = "python -m mmalign_kernels"


def run(options: verify.Options) -> list[str]:
    measured = ceilings("cuda")
    kernels, problems = build(options)
    records = [*tools(), kernels, backends()]
    for record in records:
        if record.seconds is not None or record.skipped:
            print(verify.line(record))
    write_part(options.results, options.part, records, measured, options.command)
    return problems


def tools() -> list[Record]:
    """The last line of every tool's --version."""
    records = []
    for tool in TOOLS:
        if shutil.which(tool) is None:
            records.append(Record("tools", tool, "build", tool, None, skipped="not on PATH"))
            continue
        _, output = verify.run_quietly([tool, "--version"], 30)
        lines = [line for line in output.splitlines() if re.search(r"\d+\.\d+", line)]
        extra = {"version": lines[-1].strip() if lines else "unknown"}
        records.append(Record("tools", tool, "build", tool, None, extra=extra))
    return records


def build(options: verify.Options) -> tuple[Record, list[str]]:
    """csrc/ into the package in this tree, where Python finds it."""
    name = ("csrc", "mmalign_cuda", "build", "cmake")
    if not (verify.REPOSITORY / "csrc").is_dir():
        return Record(*name, None, skipped="there is no csrc/ in this tree"), []
    started = time.monotonic()
    code, output = verify.build_library(options.seconds_left)
    seconds = time.monotonic() - started
    if code or not verify.LIBRARY.exists():
        extra = {"exit_code": code, "output": output[-OUTPUT:]}
        return Record(*name, None, extra=extra), [f"csrc/ was not built: {output[-OUTPUT:]}"]
    return Record(*name, seconds, repeats=1, extra=compiler_figures(output)), []


def compiler_figures(output: str) -> dict[str, int]:
    """Of ptxas -v: kernels compiled in this run, their most registers, bytes that were spilled."""
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", output)]
    spilled = [int(count) for count in re.findall(r"(\d+) bytes spill stores", output)]
    return {
        "kernels": len(registers),
        "most_registers": max(registers, default=0),
        "spilled_bytes": sum(spilled),
    }


def backends() -> Record:
    """What `python -m mmalign_kernels` says."""
    _, output = verify.run_quietly([sys.executable, *TABLE.split()[1:]], 120)
    return Record("backends", TABLE, "build", "table", None, extra={"output": output.strip()})


def dry_run(options: verify.Options) -> list[str]:
    """Compiles csrc/ for Hopper where nvcc is at hand, and asks for the tools and the backends."""
    for record in tools():
        print(f"{record.case}: {record.extra.get('version', record.skipped)}")
    print(backends().extra["output"], flush=True)
    if shutil.which("nvcc") is None or shutil.which("cmake") is None:
        print("csrc/ is not compiled here: that takes nvcc and cmake")
        return []
    target = f"from tests.csrc.build import build; build(('{DRY_ARCHITECTURE}',), 'mmalign_cuda')"
    started = time.monotonic()
    code, output = verify.run_quietly([sys.executable, "-c", target], options.seconds_left)
    print(f"csrc/ for {DRY_ARCHITECTURE}: {time.monotonic() - started:.0f} s")
    return [f"csrc/ does not compile: {output[-OUTPUT:]}"] if code else []


if __name__ == "__main__":
    verify.part_main(run, dry_run)
