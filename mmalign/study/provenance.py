"""Where a study's scores come from: versions, time, energy, content of the data, other runs."""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from mmalign.evaluation.items import read_results
from mmalign.evaluation.report.tables import bullets
from mmalign.files import markdown_table, read_json, read_steps
from mmalign.study.contrasts import BASE
from mmalign.study.identity import Order, Orders
from mmalign.study.tables import GAP
from mmalign.training.run_folder import config_json, flatten

_VERSIONS = ("git_commit", "torch", "device")


def provenance(orders: Orders) -> Iterator[str]:
    done = [orders[run] for run in orders.study.runs if orders.state(run) == "done"]
    if not done:
        return
    versions = [read_json(order.folder / "run.json")["versions"] for order in done]
    seconds = sum(sum(order.outcome()["seconds"].values()) for order in done)
    joules = sum(_energy(order.train_dir / "metrics.jsonl") for order in done if order.config)
    rows = [
        ["runs", f"{len(done)} of {len(orders.study.runs)}, in `{orders.study.runs_folder}`"],
        ["study file", f"`{orders.study.path}`, seeds {_listed(orders.study.settings.seeds)}"],
        *([x, _listed(version.get(x) for version in versions)] for x in _VERSIONS),
        ["time", f"{seconds / 3600:,.2f} hours of all runs together"],
        ["energy", f"{joules / 3.6e6:,.2f} kWh of the GPUs" if joules else GAP],
        *_data_rows(done),
    ]
    yield "## Provenance"
    yield markdown_table(["", "value"], rows, ":---")
    if others := list(_other_runs(orders)):
        yield "Runs of other settings, which are not in this report:"
        yield bullets(others)


def _listed(values: Iterable[object]) -> str:
    return ", ".join(str(x) for x in dict.fromkeys(values) if x is not None) or GAP


def _data_rows(done: Sequence[Order]) -> list[list[str]]:
    found = {}
    for order in done:
        path = order.train_dir / "inputs.json"
        inputs = read_json(path)["inputs"] if path.exists() else {}
        if order.config and "data file" in inputs:
            name = Path(order.config.data.path)
            shown = order.run.variant if order.run.transform else name.name
            found.setdefault(f"data {shown}", set()).add(inputs["data file"]["sha256"][:16])
        if order.run.variant == BASE:
            files = read_results(order.scores)["config"]["data_files"]
            found |= {name: {facts["sha256"][:16]} for name, facts in files.items()}
    return [[name, f"sha256 {', '.join(f'`{x}`' for x in sorted(x))}"] for name, x in found.items()]


def _energy(path: Path) -> float:
    """Joules of a run; the counter begins anew whenever the run resumes."""
    total = last = 0.0
    for record in read_steps(path)[0] if path.exists() else []:
        now = record.get("energy_joules", 0.0)
        total += last if now < last else 0.0
        last = now
    return total + last


def _other_runs(orders: Orders) -> Iterator[str]:
    """Folders of the study's runs with another identity, and what is different about them."""
    known = {orders[run].folder for run in orders.study.runs}
    for run in orders.study.runs:
        current = orders[run]
        parent = current.folder.parent
        stem = current.folder.name.rpartition("-")[0] or current.folder.name
        for folder in sorted(parent.glob(f"{stem}-*")):
            if folder not in known and (folder / "run.json").exists():
                yield f"`{folder}`: {_difference(folder, current)}"


def _difference(folder: Path, current: Order) -> str:
    before = flatten(read_json(folder / "run.json")["order"].get("config") or {})
    now = flatten(json.loads(config_json(current.config))) if current.config else {}
    changed = [
        f"{name} {before[name]} (here {now[name]})"
        for name in before.keys() & now.keys()
        if before[name] != now[name] and not name.endswith(("run_dir", "projector"))
    ]
    return ", ".join(sorted(changed)) or "another content of its data or weights"
