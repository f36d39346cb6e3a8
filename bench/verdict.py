"""What a run of bench/gpu.py says: measured, predicted beforehand, best peer, and what follows.

    python -m bench.verdict bench/results/<gpu>/verification.jsonl

Also of a run that was stopped: it reads the results that are there.
"""

import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.comparison import Comparison, is_ours
from bench.records import read_records
from bench.render import Entry, duration, fastest, flops, groups, markdown
from mmalign.system import GPUS

PREDICTIONS = Path(__file__).with_name("predictions.json")
MISSED = 0.2  # a prediction is missed where the time differs by more
FAMILIES = {  # of csrc/: the benchmarks that decide whether it runs by default
    "adamw": ("adamw fp32", "adamw split", "adamw stochastic"),
    "projector": ("project_image_features",),
    "rms_norm": ("rms_norm", "add_rms_norm"),
    "rotary_attention": ("rotary_attention",),
}
FASTER, SLOWER = 0.97, 1.05  # of Triton's time: in all at most, and nowhere more
SETS = {"truthfulqa": (1, 3.0), "ethics": (10, 45.0)}  # times what is scored; seconds at 7B
TOKENS = {"finetune-7b": 15_600, "pretrain-7b": 22_000}  # per second
ATTENTION = 1.3  # times torch's varlen attention, forward

Record = Mapping[str, Any]


def title_of(comparison: Comparison | Entry) -> str:
    if comparison.benchmark == "scoring":  # its case says which documents there were
        return scoring_title(_task(comparison.case))
    return f"{comparison.benchmark}, {comparison.case}, {comparison.direction}"


def scoring_title(task: str) -> str:
    return f"scoring, {task}"


def _task(case: str) -> str:
    return next(task for task in SETS if task in case)


def render(records: Sequence[Record], predictions: Record) -> str:
    """Markdown of everything; a run that was stopped has fewer lines."""
    found = [_entry(x) for x in records if x["kind"] == "measured"]
    device = next((x["device"] for x in records if x["kind"] == "machine"), "")
    card = next((gpu.name for gpu in GPUS if re.search(gpu.pattern, device)), "")
    predicted = predictions["seconds"].get(card, {})
    kernels = [g for g in groups(found) if "bytes" in g[0].info]
    programs = [g for g in groups(found) if g[0].benchmark != "product" and g not in kernels]
    lines = [f"{device or 'No result'}.", "", *_peaks(records, found)]
    lines += _kernels(kernels, predicted)
    lines += _programs(programs, predicted)
    lines += _targets(found)
    lines += [*_csrc(records, found), "", *_problems(records), *_parts(records)]
    return "\n".join(lines) + "\n"


def _entry(record: Record) -> Entry:
    names = ("benchmark", "case", "direction", "variant", "seconds", "info")
    return Entry(*(record[name] for name in names))


# ---- the tables ----


def _peaks(records: Sequence[Record], found: Iterable[Entry]) -> Iterator[str]:
    for peak in (x for x in records if x["kind"] == "peaks"):
        yield (
            f"Copy {peak['copy_bytes_per_second'] / 1e12:.2f} TB/s, "
            f"{peak['matmul']} {flops(peak['matmul_flops_per_second'])}."
        )
    for gpu in [x for x in records if x["kind"] == "gpu" and "sm_clock_mhz" in x][-1:]:
        yield (
            f"SM clock {gpu['sm_clock_mhz']:.0f} MHz, {gpu['power_watts']:.0f} W, throttled in "
            f"{gpu['throttled']:.0%} of the samples of the last part."
        )
    yield ""
    products = [x for x in found if x.benchmark == "product"]
    lines = [[x.case, x.direction, duration(x.seconds), x.rate] for x in products]
    yield from markdown(["product", "gradient", "time", "rate"], lines)


def _against(seconds: float, prediction: float | None) -> list[str]:
    """Predicted time, and measured over predicted."""
    if prediction is None:
        return ["", ""]
    ratio = seconds / prediction
    off = " !" if not 1 - MISSED <= ratio <= 1 + MISSED else ""
    return [duration(prediction), f"{ratio:.2f}{off}"]


def _kernels(found: Sequence[list[Entry]], predicted: Mapping[str, float]) -> Iterator[str]:
    lines = []
    for group in found:
        ours = fastest(row for row in group if is_ours(row.variant))
        peer = fastest(row for row in group if not is_ours(row.variant))
        if ours is None:
            continue
        beside = [peer.variant, duration(peer.seconds), ours.over(peer)] if peer else [""] * 3
        cells = [ours.benchmark, ours.case, ours.direction, ours.variant.removeprefix("mmalign ")]
        cells += [duration(ours.seconds), *_against(ours.seconds, predicted.get(title_of(ours)))]
        lines.append([*cells, ours.rate, ours.cell("share_of_peak"), *beside])
    headings = ["operation", "case", "direction", "ours", "measured", "predicted", "ratio"]
    headings += ["rate", "share of peak", "best peer", "its time", "ours over it"]
    yield from markdown(headings, lines)


def _programs(found: Sequence[list[Entry]], predicted: Mapping[str, float]) -> Iterator[str]:
    lines = []
    for row in (row for group in found for row in group):
        planned, held = row.info.get("planned_bytes"), row.info.get("device_bytes")
        alone = sum(row.group == other[0].group and len(other) == 1 for other in found)
        prediction = predicted.get(title_of(row)) if alone else None
        cells = [row.benchmark, row.case, row.variant, duration(row.seconds)]
        cells += _against(row.seconds, prediction)
        cells += [row.cell("tokens_per_second"), row.cell("mfu"), row.cell("recompute")]
        gigabytes = [f"{held / 1e9:.1f} GB" if held else row.cell("peak_memory_bytes")]
        gigabytes.append(f"{planned / 1e9:.1f} GB" if planned else "")
        lines.append([*cells, *gigabytes])
    headings = ["program", "case", "variant", "measured", "predicted", "ratio", "tokens/s", "MFU"]
    yield from markdown([*headings, "recomputation", "memory", "planned"], lines)


def _targets(found: Sequence[Entry]) -> Iterator[str]:
    lines = []
    for row in found:
        recipe = row.case.partition(",")[0]
        if row.benchmark == "train_recipe" and recipe in TOKENS and row.direction == "step":
            reached, wanted = row.info["tokens_per_second"], TOKENS[recipe]
            lines.append([f"{recipe}, tokens/s", f"{reached:,.0f}", f"{wanted:,}", reached, wanted])
        if row.benchmark == "scoring":
            times, wanted = SETS[_task(row.case)]
            seconds = row.seconds * times
            cells = [f"all of {_task(row.case)}", f"{seconds:.1f} s", f"{wanted:g} s"]
            lines.append([*cells, wanted, seconds])
    for group in groups(row for row in found if row.benchmark == "rotary_attention"):
        ours = fastest(row for row in group if is_ours(row.variant))
        varlen = next((row for row in group if row.variant.startswith("torch_varlen")), None)
        if ours and varlen and ours.direction == "forward":
            ratio = varlen.seconds / ours.seconds
            cells = [f"attention forward over torch varlen, {ours.case}", f"{ratio:.2f}x"]
            lines.append([*cells, f"{ATTENTION}x", ratio, ATTENTION])
    rows = [[*cells, "yes" if got >= wanted else "no"] for *cells, got, wanted in lines]
    yield from markdown(["target", "measured", "wanted", "reached"], rows)


# ---- csrc/ ----


def faster_families(found: Sequence[Entry]) -> set[str]:
    """Families of csrc/ that are right everywhere and beat Triton's."""
    winners = set()
    for family, benchmarks in FAMILIES.items():
        times = []
        for group in groups(row for row in found if row.benchmark in benchmarks):
            by_variant = {row.variant: row.seconds for row in group}
            times.append((by_variant.get("mmalign cuda"), by_variant.get("mmalign triton")))
        complete = {row.benchmark for row in found if row.benchmark in benchmarks}
        if len(complete) < len(benchmarks) or not all(a and b for a, b in times):
            continue  # a kernel that was wrong or broke its process has no time
        total = sum(a for a, _ in times) / sum(b for _, b in times)
        if total <= FASTER and all(a <= SLOWER * b for a, b in times):
            winners.add(family)
    return winners


def _csrc(records: Sequence[Record], found: Sequence[Entry]) -> Iterator[str]:
    lines = []
    for family, benchmarks in FAMILIES.items():
        for group in groups(row for row in found if row.benchmark in benchmarks):
            by_variant = {row.variant: row for row in group}
            ours, other = (by_variant.get(f"mmalign {x}") for x in ("cuda", "triton"))
            cells = [duration(x.seconds) if x else "" for x in (ours, other)]
            ratio = ours.over(other) if ours and other else ""
            title = f"{group[0].benchmark}, {group[0].case}, {group[0].direction}"
            lines.append([family, title, *cells, ratio])
    if lines:
        yield from markdown(["csrc/", "case", "cuda", "triton", "cuda over triton"], lines)
    if not any(x["kind"] == "part" and x["what"] == "kernels" and _done(x) for x in records):
        yield "csrc/ is undecided: not all kernels were measured."
        return
    names = ", ".join(f'"{family}"' for family in sorted(faster_families(found)))
    value = f"frozenset({{{names}}})" if names else "frozenset()"
    yield f"`MEASURED_CUDA: frozenset[str] = {value}`, in kernels/mmalign_kernels/dispatch.py."


def _done(part: Record) -> bool:
    return part["status"] == "done"


# ---- what went wrong, and the parts ----


def problems(records: Sequence[Record]) -> list[str]:
    """Results that are wrong, and what failed."""
    bad = [x for x in records if x["kind"] in ("wrong", "failed")]
    return [f"{x['part']}: {x['what']}: {x['reason']}" for x in bad]


def _problems(records: Sequence[Record]) -> Iterator[str]:
    if found := problems(records):
        yield from ("Wrong or failed:", "", *(f"- {one}" for one in found), "")
    left_out = {(x["what"], x["reason"]) for x in records if x["kind"] == "left out"}
    if left_out:
        names = "; ".join(f"{what} ({reason})" for what, reason in sorted(left_out))
        yield from (f"Not measured: {names}.", "")


def _parts(records: Sequence[Record]) -> Iterator[str]:
    lines = [
        [x["what"], x["status"], f"{x['seconds']:.0f}", f"{x['expected']:.0f}", x["note"]]
        for x in records
        if x["kind"] == "part"
    ]
    yield from markdown(["part", "status", "seconds", "expected", "note"], lines)


def main(path: str) -> None:
    print(render(read_records(Path(path)), json.loads(PREDICTIONS.read_text())))


if __name__ == "__main__":
    main(sys.argv[1])
