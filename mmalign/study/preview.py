"""The dry run: every run and its state, what is missing, GPU-hours and disk."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence

from mmalign.errors import UserError
from mmalign.evaluation.document_scores import MEANS
from mmalign.evaluation.tasks import TASKS, load_documents, resolve_tasks
from mmalign.study.contrasts import parse_contrast
from mmalign.study.cost import MFU, Cost, cost_of, free_bytes, seconds_of
from mmalign.study.identity import Orders
from mmalign.study.plan import PRETRAIN, Run
from mmalign.study.statistics import smallest_detectable_share
from mmalign.training.build import TOY_WORLD

# documents of the published files, where they are missing
NUM_DOCUMENTS = {"truthfulqa": 817, "ethics_commonsense": 3885, "ethics_deontology": 3596}
NUM_DOCUMENTS |= {"ethics_justice": 2704, "ethics_utilitarianism": 4808, "ethics_virtue": 4975}
NUM_DOCUMENTS |= {"vqav2": 214_354, "pope": 9000, "mme": 2374}
DISCORDANT = (0.1, 0.2, 0.3)
_STATES = ("done", "running", "stopped", "failed", "new")


def preview(orders: Orders, chosen: Sequence[Run], jobs: int, gpu: str) -> str:
    """The whole text of --dry-run."""
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in chosen:
        groups.setdefault((run.parent, run.variant), []).append(run)
    costs = {
        x: cost_of(orders.study, x, orders[x].config)
        for x in chosen
        if x.config and not (TOY_WORLD in orders.missing and x.decoder == TOY_WORLD)
    }
    rows: list[tuple[str, ...]] = [("parent", "variant", "runs", "PFLOP each", "GPU-hours", "data")]
    for runs in groups.values():
        rows.append(_row(orders, runs, costs, gpu))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    right = (3, 4)
    lines = [
        "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join([*lines, "", *_totals(orders, chosen, costs, jobs, gpu)])


def _row(orders: Orders, runs: list[Run], costs: dict[Run, Cost], gpu: str) -> tuple[str, ...]:
    states = Counter(orders.state(run) for run in runs)
    state = ", ".join(f"{states[x]} {x}" for x in _STATES if states[x])
    first = runs[0]
    if first.variant == PRETRAIN:
        state += f", shared by {sum(len(orders.study.dependants(run)) for run in runs)}"
    if first.config is None:
        return (first.parent, first.variant, state, "", "", "")
    if first not in costs:
        return (first.parent, first.variant, state, "-", "-", _data(first))
    hours = _hours(orders, runs, costs, gpu)
    flops = costs[first].flops / 1e15
    shown = f"{flops:,.0f}" if flops >= 10 else f"{flops:.2g}"
    return (first.parent, first.variant, state, shown, _shown(hours), _data(first))


def _hours(orders: Orders, runs: Sequence[Run], costs: dict[Run, Cost], gpu: str) -> float | None:
    """Of the runs that are not done, by what finished runs took, or else by the FLOP model."""
    total = 0.0
    for run in runs:
        if run not in costs or orders.state(run) == "done":
            continue
        alike = [x for x in orders.study.runs if x.variant == run.variant and x.config]
        took = seconds_of([orders[x].outcome() for x in alike])
        hours = took / 3600 if took is not None else costs[run].hours(gpu)
        if run.config and run.config.precision == "fp32" and took is None:
            return None  # a CPU, whose rate is unknown
        total += hours
    return total


def _shown(hours: float | None) -> str:
    return "-" if hours is None else f"{hours:.1f}" if hours >= 0.1 or not hours else f"{hours:.3f}"


def _data(run: Run) -> str:
    assert run.config is not None
    data, transform = run.config.data, run.transform
    parts = [data.path or "-"]
    if data.types:
        parts.append("+".join(data.types))
    if data.text_only:
        parts.append("text only")
    if transform:
        parts += [transform.control] if transform.control else []
        parts += [f"{transform.samples:,} samples"] if transform.samples else []
        if transform.supervised_tokens:
            parts.append(f"{transform.supervised_tokens:,} supervised tokens")
    if run.config.lora.rank:
        parts.append(f"LoRA {run.config.lora.rank}")
    return ", ".join(parts)


def _totals(
    orders: Orders, chosen: Sequence[Run], costs: dict[Run, Cost], jobs: int, gpu: str
) -> list[str]:
    study = orders.study
    states = Counter(orders.state(run) for run in chosen)
    pretrains = [run for run in chosen if run.variant == PRETRAIN]
    shared = sum(len(study.dependants(run)) for run in pretrains)
    counted = ", ".join(f"{states[x]} {x}" for x in _STATES if states[x])
    lines = [
        f"{len(chosen)} runs: {counted}; {len(pretrains)} of stage 1, shared by {shared} of stage 2"
    ]
    hours = _hours(orders, list(costs), costs, gpu)
    if not any(run.config for run in chosen):
        lines.append("training: none; the models are scored as they are")
    elif hours is None or not costs:
        lines.append("time: unknown until a run of each variant has ended (no GPU)")
    else:
        how = f"{gpu} at an assumed MFU of {MFU:.0%}; finished variants as measured"
        lines.append(f"training: {hours:,.1f} GPU-hours to do ({how})")
    todo = [cost.weights for run, cost in costs.items() if orders.state(run) != "done"]
    kept = sum(x.weights for x in costs.values()) if study.settings.keep == "all" else 0
    at_once = sum(sorted(todo)[-jobs:]) + kept
    if study.settings.keep == "scores":
        at_once += sum(costs[x].weights for x in pretrains if x in costs)
    lines.append(
        f"disk: up to {at_once / 1e9:,.1f} GB of exports and checkpoints with {jobs} at once, "
        f"{kept / 1e9:,.1f} GB when done (keep = {study.settings.keep}); "
        f"{free_bytes(study.runs_folder) / 1e9:,.0f} GB free"
    )
    for path, names in orders.missing.items():
        if path == TOY_WORLD:
            lines.append("the toy world will be made first, in a minute or two")
            continue
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        lines.append(f"missing: {path} ({names[0]}{more})")
    return lines + list(_detectable(orders))


def _detectable(orders: Orders) -> Iterator[str]:
    """What the primary questions can find, if two checkpoints differ in so many answers."""
    counts = _num_documents(orders)
    asked = [x for x in orders.study.questions if x.family == "primary"]
    shares = " / ".join(f"{share:.0%}" for share in DISCORDANT)
    if asked:
        yield f"smallest detectable difference where {shares} of the answers differ, in points:"
    for question in asked:
        for metric in parse_contrast(question).metrics or question.metrics:
            tasks = [_task_of(member) for member in MEANS.get(metric, (metric,))]
            if any(counts.get(task, 0) < 2 for task in tasks):
                continue
            found = [
                100
                * math.hypot(*(smallest_detectable_share(counts[x], share) for x in tasks))
                / len(tasks)
                for share in DISCORDANT
            ]
            points = " / ".join(f"{x:.1f}" for x in found)
            yield f"  {question.name} ({question.contrast}) on {metric}: {points}"


def _num_documents(orders: Orders) -> dict[str, int]:
    """By task; of the published files where they are missing."""
    asked, tasks = orders.evaluation, resolve_tasks(orders.study.settings.tasks)
    try:
        found = load_documents(tasks, asked.data_root, asked.limit)
        return {task: len(documents) for task, documents in found.items()}
    except UserError:
        known = {x: n for task, n in NUM_DOCUMENTS.items() for x in tasks if x.startswith(task)}
        return {task: min(n, asked.limit or n) for task, n in known.items()}


def _task_of(metric: str) -> str:
    return max((task for task in TASKS if metric.startswith(task)), key=len, default="")
