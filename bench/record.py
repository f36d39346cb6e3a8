"""What benchmarks measured, and the JSON files that RESULTS.md is rendered from.

`<folder>/<machine>/<part>.json` holds the machine, the ceilings of the same run, and one record for
each variant of each case. A run of a few benchmarks replaces only these benchmarks' records.
"""

import datetime
import json
import os
import platform
import re
import subprocess
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from mmalign.system import versions


@dataclass(frozen=True)
class Record:
    benchmark: str  # the operation or comparison: rms_norm, train_step
    case: str  # shape and dtype, or model and stage: "llama2-7b, 16384 tokens, bf16"
    direction: str  # forward, backward, both; step, score, load for whole programs
    variant: str  # mmalign triton, torch eager, transformers padded ...
    seconds: float | None  # median of one call; None where it was skipped
    fastest: float | None = None
    slowest: float | None = None
    repeats: int = 0
    bytes: int | None = None  # that the operation must move at least
    flops: int | None = None  # that it must compute at least
    ceiling: str | None = None  # key of the part's ceilings that `share` refers to
    share: float | None = None  # of that ceiling, reached by the median
    peak_memory_bytes: int | None = None
    extra: dict[str, float | int | str] = field(default_factory=dict)  # samples_per_second, mfu ...
    skipped: str | None = None  # the reason


def machine() -> dict:
    """The machine of this run; "name" is its folder under bench/results."""
    if torch.cuda.is_available():
        device, name = torch.cuda.get_device_name(), torch.cuda.get_device_name()
    else:
        cores = len(os.sched_getaffinity(0))
        device = _cpu_model()
        name = f"cpu {device} {cores} cores"
    found = {key: value for key, value in versions().items() if key != "device"}
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return {
        "name": slug,
        "device": device,
        "driver": _driver(),
        "system": platform.system(),
    } | found


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _driver() -> str | None:
    if not torch.cuda.is_available():
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True).stdout.split("\n")[0] or None


def write_part(
    folder: Path, part: str, records: list[Record], ceilings: dict, command: str
) -> Path:
    """Adds records to `<folder>/<machine>/<part>.json`, in place of the same benchmarks'."""
    this = machine()
    path = folder / this["name"] / f"{part}.json"
    measured = {record.benchmark for record in records}
    before = json.loads(path.read_text())["records"] if path.exists() else []
    date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    run = {"date": date, "command": command, "commit": this["git_commit"]}
    rows = [row for row in before if row["benchmark"] not in measured]
    rows += [asdict(record) | {"run": run} for record in records]
    content = {"machine": this, "ceilings": ceilings, "records": rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(path)  # never a torn file
    return path


def read_parts(folder: Path) -> dict[str, dict[str, dict]]:
    """{machine: {part: content}} of every file that write_part left."""
    return {
        path.name: {part.stem: json.loads(part.read_text()) for part in sorted(path.glob("*.json"))}
        for path in sorted(folder.iterdir())
        if path.is_dir()
    }
