"""Results of a run of bench/gpu.py: a file of JSON lines, to which its processes append."""

import json
from pathlib import Path

BROKEN = 75  # exit code: CUDA does not work any more in this process


class Records:
    """Appends to a file of JSON lines; several processes may append to one."""

    def __init__(self, path: Path, part: str):
        self.path, self.part = path, part

    def write(self, kind: str, **fields) -> None:
        line = json.dumps({"kind": kind, "part": self.part, **fields})
        with open(self.path, "a") as file:
            file.write(f"{line}\n")  # one write: whole or, if the machine stops, at the end
        shown = {name: x for name, x in fields.items() if name != "info" and x is not None}
        if kind != "begin":
            print(f"{self.part}: {kind}: {', '.join(map(str, shown.values()))}", flush=True)


def read_records(path: Path) -> list[dict]:
    """The lines of a file that another process may be writing; none where there is no file."""
    lines = path.read_text().splitlines() if path.exists() else []
    found = []
    for line in lines:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:  # of a process that was killed while it wrote
            continue
    return found
