"""Read every sample once before training, so that bad ones show before the first step."""

import hashlib
import json
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mmalign.batch import IGNORE_INDEX
from mmalign.command import progress_bar
from mmalign.data.dataset import ConversationDataset, EncodedSample
from mmalign.data.samples import Samples
from mmalign.data.workers import usable_cores
from mmalign.errors import LongSampleError, SampleError, UserError, readable
from mmalign.files import replacing

log = logging.getLogger("mmalign")
_CHUNK = 256  # samples that a worker process checks at a time
NUM_LISTED = 10  # bad samples that an error names
COUNTS = ("lengths", "num_loss_tokens", "num_images", "num_tiles", "num_cut")  # of each sample


@dataclass(frozen=True)
class CheckReport:
    """The result of the check; the arrays have one entry per kept sample."""

    kept: np.ndarray  # (num_kept,) int64; indices into the dataset
    lengths: np.ndarray  # (num_kept,) int32; tokens with images expanded
    num_loss_tokens: np.ndarray  # (num_kept,) int32; targets that have a loss, after the shift
    num_images: np.ndarray  # (num_kept,) int32
    num_tiles: np.ndarray  # (num_kept,) int32; as in EncodedSample
    num_cut: np.ndarray  # (num_kept,) int32; tokens that data.on_long_sample "truncate" cuts off
    skipped: list[SampleError]
    prefix: np.ndarray  # (prefix_length,) int32; the shared prompt header: tokens that all kept
    # samples start with, before an image's tokens and before the first row with a target


@dataclass(frozen=True)
class _CheckedChunk:
    counts: np.ndarray  # (num_samples, 5) int32: the arrays of CheckReport; zeros: unusable
    skipped: list[SampleError]
    prefix: np.ndarray | None  # None: no sample is usable
    seen: object = None  # what the observer has found


class Observer(Protocol):
    """Sees the usable samples: `observe` runs in worker processes, `collect` in the main one."""

    def observe(
        self, dataset: ConversationDataset, checked: Sequence[tuple[int, EncodedSample]]
    ) -> object:
        """checked: usable samples with their indices."""
        ...

    def collect(self, seen: Any) -> None:
        """What `observe` has returned, in the order of the file."""
        ...


def check_samples(
    dataset: ConversationDataset,
    cache_path: str | Path | None = None,
    num_workers: int | None = None,
    progress: bool = True,
    observer: Observer | None = None,
) -> CheckReport:
    """Encode every sample and decode every image (data.check_images) in worker processes.

    Args:
        cache_path: .npz that stores the report. It is reused, without reading an image again, while
            data file, data settings, tokenizer, vision tower and image root stay the same.
        num_workers: processes; None: one per CPU core, none if data.num_workers is 0.
        observer: also sees every usable sample; not with cache_path, which remembers nothing of it.
    Raises:
        SampleError: the first unusable sample, and how many there are, if data.on_bad_sample is
            "error". With "skip" they are in the report's `skipped`, as are long ones with
            data.on_long_sample "skip".
        UserError: no usable sample is left.
    """
    if observer is not None and cache_path is not None:
        raise ValueError("an observer would see nothing of what is remembered")
    cache = None if cache_path is None else Path(cache_path)
    report = None if cache is None else load_report(dataset, cache)
    if report is not None:
        return report
    _warn_of_unused_fields(dataset)
    _warn_of_cut_archives(dataset)
    report = _check_all(dataset, num_workers, progress, observer)
    skips_long = dataset.data.on_long_sample == "skip"
    bad = [x for x in report.skipped if not (skips_long and isinstance(x, LongSampleError))]
    if bad and dataset.data.on_bad_sample == "error":
        raise _summary(bad, len(dataset))
    if not len(report.kept):
        raise UserError(f"no usable sample: {_summary(report.skipped, len(dataset))}")
    if cache is not None:
        _save(report, cache, dataset.fingerprint)
    return report


def load_report(dataset: ConversationDataset, cache_path: Path) -> CheckReport | None:
    """The stored report; None if there is none, one of other data or settings, or a damaged one."""
    if not cache_path.exists():
        return None
    try:
        with np.load(cache_path) as file:
            if str(file["fingerprint"]) != dataset.fingerprint:
                return None
            skipped = [SampleError(*entry) for entry in json.loads(str(file["skipped"]))]
            arrays = {name: file[name] for name in ("kept", *COUNTS, "prefix")}
            report = CheckReport(**arrays, skipped=skipped)
            if str(file["digest"]) != _digest(report):
                raise ValueError("its content has changed since it was written")
            return report
    except Exception as error:  # a damaged archive can raise anything
        log.warning("%s is damaged (%s): all samples are checked again", cache_path, error)
        return None


def _warn_of_unused_fields(dataset: ConversationDataset) -> None:
    unused = dataset.samples.unused if isinstance(dataset.samples, Samples) else {}
    if unused:
        most = sorted(unused, key=lambda name: unused[name], reverse=True)[:NUM_LISTED]
        fields = ", ".join(f"{readable(name, 50)} ({unused[name]:,})" for name in most)
        rest = f" and {len(unused) - len(most)} more" if len(unused) > len(most) else ""
        log.warning("fields of the data file that are not used (samples): %s%s", fields, rest)


def _warn_of_cut_archives(dataset: ConversationDataset) -> None:
    for archive in dataset.pictures.archives if dataset.pictures else ():
        if archive.problem:
            log.warning(
                "%s is not complete (%s): samples whose pictures it lacks are unusable. Where a "
                "download or a copy was cut short, repeat it",
                *(archive, archive.problem),
            )


def _check_all(
    dataset: ConversationDataset, num_workers: int | None, progress: bool, observer: Observer | None
) -> CheckReport:
    chunks = [
        range(begin, min(begin + _CHUNK, len(dataset))) for begin in range(0, len(dataset), _CHUNK)
    ]
    bar = progress_bar(
        total=len(dataset), desc="checking samples", unit=" samples", disable=not progress
    )
    counts, skipped, prefix = [], [], None
    with bar:
        for chunk in _run(dataset, chunks, num_workers, observer):
            if observer is not None:
                observer.collect(chunk.seen)
            counts.append(chunk.counts)
            skipped += chunk.skipped
            prefix = _common_prefix(prefix, chunk.prefix)
            bar.update(len(chunk.counts))
    counts = np.concatenate(counts)  # (num_samples, 5)
    prefix = np.empty(0, np.int32) if prefix is None else prefix
    kept = np.flatnonzero(counts[:, 0])
    columns = dict(zip(COUNTS, np.ascontiguousarray(counts[kept].T), strict=True))
    return CheckReport(kept=kept, **columns, skipped=skipped, prefix=prefix)


def _run(
    dataset: ConversationDataset,
    chunks: list[range],
    num_workers: int | None,
    observer: Observer | None,
) -> Iterator[_CheckedChunk]:
    if num_workers is None:
        num_workers = 0 if dataset.data.num_workers == 0 else len(usable_cores())
    if num_workers == 0 or len(chunks) == 1:
        yield from (_check_chunk(dataset, chunk, observer) for chunk in chunks)
        return
    with ProcessPoolExecutor(
        min(num_workers, len(chunks)), initializer=_start_worker, initargs=(dataset, observer)
    ) as pool:
        try:
            yield from pool.map(_check_chunk_in_worker, chunks)
        except BrokenProcessPool as error:
            raise UserError(
                "a process of the data check was killed, which happens when memory runs out. "
                "Rerun with --data.num-workers 0, which checks in one process"
            ) from error


_worker_state: tuple[ConversationDataset, Observer | None]  # of this worker process


def _start_worker(dataset: ConversationDataset, observer: Observer | None) -> None:
    global _worker_state
    _worker_state = dataset, observer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the main process, which ends these
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """Otherwise a worker outlives a main process that a signal has ended."""
    if main := multiprocessing.parent_process():
        main.join()
    os._exit(1)


def _check_chunk_in_worker(chunk: range) -> _CheckedChunk:
    dataset, observer = _worker_state
    return _check_chunk(dataset, chunk, observer)


def _check_chunk(
    dataset: ConversationDataset, chunk: range, observer: Observer | None
) -> _CheckedChunk:
    counts = np.zeros((len(chunk), len(COUNTS)), np.int32)
    skipped, checked, prefix = [], [], None
    for row, index in enumerate(chunk):
        try:
            sample = dataset.encode(index)
            num_loss_tokens = np.count_nonzero(sample.labels[1:] != IGNORE_INDEX)
            if num_loss_tokens == 0:
                raise _nothing_to_train_on(sample)
            dataset.check_images(sample)
            lengths = len(sample.input_ids), num_loss_tokens
            counts[row] = *lengths, len(sample.images), sample.num_tiles, sample.num_cut
            prefix = _common_prefix(prefix, _prompt_header(dataset, sample))
            checked.append((index, sample))
        except SampleError as error:
            skipped.append(error)
    seen = None if observer is None else observer.observe(dataset, checked)
    return _CheckedChunk(counts, skipped, prefix, seen)


def _nothing_to_train_on(sample: EncodedSample) -> SampleError:
    if not sample.num_cut:
        return SampleError(sample.id, "nothing to train on", "Remove it from the file")
    problem = f"nothing to train on in the {len(sample.input_ids):,} tokens that are left of it"
    return SampleError(sample.id, problem, "Raise --data.max-length, or remove the sample")


def _prompt_header(dataset: ConversationDataset, sample: EncodedSample) -> np.ndarray:
    """The tokens before those of an image and before the row of the first target."""
    tokenizer = dataset.tokenizer
    image_ids = (tokenizer.image_token_id, tokenizer.im_start_id, tokenizer.im_end_id)
    first_image_row = np.flatnonzero(np.isin(sample.input_ids, image_ids))[:1]
    first_target = np.flatnonzero(sample.labels != IGNORE_INDEX)[:1]
    ends = (*first_image_row, *(first_target - 1), len(sample.input_ids) - 1)
    return sample.input_ids[: max(0, min(ends))]


def _common_prefix(first: np.ndarray | None, second: np.ndarray | None) -> np.ndarray | None:
    """The tokens that both start with; None stands for no sample at all."""
    if first is None or second is None:
        return second if first is None else first
    length = min(len(first), len(second))
    differ = np.flatnonzero(first[:length] != second[:length])
    return first[: differ[0] if len(differ) else length]


def _summary(skipped: list[SampleError], num_samples: int) -> SampleError:
    first = skipped[0]
    if len(skipped) == 1:
        return first
    listed = "".join(f"\n  {error.sample_id!r}: {error.problem}" for error in skipped[:NUM_LISTED])
    rest = len(skipped) - NUM_LISTED
    listed += f"\n  and {rest} more" if rest > 0 else ""
    remedy = f"{first.remedy}\n{len(skipped)} of {num_samples} samples are unusable:{listed}"
    return SampleError(first.sample_id, first.problem, remedy)


def _digest(report: CheckReport) -> str:
    arrays = [value for name, value in vars(report).items() if name != "skipped"]
    facts = [(array.dtype.str, array.tobytes()) for array in arrays]
    return hashlib.sha256(repr((facts, list(map(str, report.skipped)))).encode()).hexdigest()


def _save(report: CheckReport, path: Path, fingerprint: str) -> None:
    arrays = {name: value for name, value in vars(report).items() if name != "skipped"}
    skipped = json.dumps([(e.sample_id, e.problem, e.remedy) for e in report.skipped])
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, "wb") as file:
            about = {"fingerprint": fingerprint, "digest": _digest(report), "skipped": skipped}
            np.savez_compressed(file, **about, **arrays)
    except OSError as error:
        raise UserError(
            f"cannot write the data check to {path} ({error.strerror}). Fix this and rerun the "
            "same command"
        ) from error
