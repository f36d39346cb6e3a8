"""The plain tables that end a run of benchmarks: one for each group, fastest first."""

from collections.abc import Iterator, Sequence

from bench.record import Record


def tables(records: Sequence[Record]) -> Iterator[str]:
    groups: dict[tuple, list[Record]] = {}
    for kept in records:
        groups.setdefault((kept.benchmark, kept.case, kept.direction), []).append(kept)
    for (benchmark, case, direction), group in groups.items():
        measured = [kept for kept in group if kept.seconds is not None]
        if measured:
            yield from ("", f"{benchmark}, {direction}: {case}", *aligned(rows(measured)))
    yield from skipped(records)


def rows(measured: Sequence[Record]) -> list[tuple[str, ...]]:
    """Of one group, with a header: sorted by time; ratios are over its first variant that ran."""
    first = measured[0]
    header = ("", "median", "fastest - slowest (rounds)", f"over {first.variant}")
    ordered = sorted(measured, key=lambda kept: kept.seconds)
    return [(*header, "rate", "share", "peak memory"), *(row(kept, first) for kept in ordered)]


def skipped(records: Sequence[Record]) -> Iterator[str]:
    """Every reason once, with the benchmarks that it concerns."""
    reasons: dict[tuple[str, str], dict[str, None]] = {}
    for kept in records:
        if kept.skipped:
            reasons.setdefault((kept.variant, kept.skipped), {})[kept.benchmark] = None
    if reasons:
        yield from ("", "skipped:")
    for (variant, reason), benchmarks in reasons.items():
        yield f"  {variant}: {reason} ({', '.join(benchmarks)})"


def row(kept: Record, first: Record) -> tuple[str, ...]:
    over = "1" if kept is first else f"{kept.seconds / first.seconds:.2f}"
    return (
        kept.variant,
        duration(kept.seconds),
        f"{duration(kept.fastest)} - {duration(kept.slowest)} ({kept.repeats})",
        over,
        rate(kept),
        "" if kept.share is None else f"{kept.share:.0%}",
        "" if kept.peak_memory_bytes is None else f"{kept.peak_memory_bytes / 1e6:.1f} MB",
    )


def rate(kept: Record) -> str:
    """In the unit of the ceiling that bounds the operation."""
    if kept.ceiling is None:
        return ""
    if kept.ceiling == "copy":
        return f"{kept.bytes / kept.seconds / 1e9:.1f} GB/s"
    flops = kept.flops / kept.seconds
    return f"{flops / 1e12:.1f} TFLOP/s" if flops >= 1e12 else f"{flops / 1e9:.1f} GFLOP/s"


def duration(seconds: float) -> str:
    for unit, scale in (("s", 1), ("ms", 1e3), ("us", 1e6)):
        if seconds * scale >= 1 or unit == "us":
            return f"{seconds * scale:.4g} {unit}"
    raise AssertionError


def aligned(lines: Sequence[tuple[str, ...]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = [line[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        yield "  " + "  ".join(cells).rstrip()
