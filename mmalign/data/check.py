"""Every sample is read once before training: what will not work shows before the first step."""

import json
import os
import zipfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from mmalign.batch import IGNORE_INDEX
from mmalign.data.dataset import ConversationDataset, EncodedSample
from mmalign.errors import SampleError, UserError

_CHUNK = 256  # samples that a worker process checks at a time
NUM_LISTED = 10  # offenders that an error names


@dataclass(frozen=True)
class CheckReport:
    """What the check found; the arrays have one entry for each kept sample."""

    kept: np.ndarray  # (num_kept,) int64; indices into the dataset
    lengths: np.ndarray  # (num_kept,) int32; tokens with the image expanded
    num_loss_tokens: np.ndarray  # (num_kept,) int32; targets that have a loss, after the shift
    num_images: np.ndarray  # (num_kept,) int32; 0 or 1
    skipped: list[SampleError]
    prefix: np.ndarray  # (prefix_length,) int32; tokens that all kept samples start
    # with, before anything of an image and before the first row with a target


@dataclass(frozen=True)
class _Checked:
    """What was found in some samples."""

    counts: np.ndarray  # (num_samples, 3) int32; length, loss tokens, images; zeros: not usable
    skipped: list[SampleError]
    prefix: np.ndarray | None  # None: no sample is usable


def check_samples(
    dataset: ConversationDataset,
    cache_path: str | Path | None = None,
    num_workers: int | None = None,
    progress: bool = True,
) -> CheckReport:
    """Encode every sample and decode every image (data.check_images) in worker processes.

    Args:
        cache_path: .npz that remembers the report. It is used, and no image read again, as long as
            data file, data settings, tokenizer and image root are those that it was made with.
        num_workers: processes; None: one a CPU core, none where data.num_workers is 0.
    Raises:
        SampleError: the first sample that cannot be used, and how many there are, where
            data.on_bad_sample is "error". With "skip" they are in the report's `skipped`.
        UserError: no usable sample is left.
    """
    cache = None if cache_path is None else Path(cache_path)
    report = None if cache is None else load_report(dataset, cache)
    if report is not None:
        return report
    report = _check_all(dataset, num_workers, progress)
    if report.skipped and dataset.data.on_bad_sample == "error":
        raise _summary(report.skipped, len(dataset))
    if not len(report.kept):
        raise UserError(f"no usable sample: {_summary(report.skipped, len(dataset))}")
    if cache is not None:
        _save(report, cache, dataset.fingerprint)
    return report


def load_report(dataset: ConversationDataset, cache_path: Path) -> CheckReport | None:
    """The remembered report; None where there is none or it is of other data or settings."""
    try:
        with np.load(cache_path) as file:
            if str(file["fingerprint"]) != dataset.fingerprint:
                return None
            skipped = [SampleError(*entry) for entry in json.loads(str(file["skipped"]))]
            arrays = (file[name] for name in ("kept", "lengths", "num_loss_tokens", "num_images"))
            return CheckReport(*arrays, skipped, file["prefix"])
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile):  # none, or cut short
        return None


def _check_all(
    dataset: ConversationDataset, num_workers: int | None, progress: bool
) -> CheckReport:
    chunks = [
        range(begin, min(begin + _CHUNK, len(dataset))) for begin in range(0, len(dataset), _CHUNK)
    ]
    bar = tqdm(total=len(dataset), desc="checking samples", unit=" samples", disable=not progress)
    counts, skipped, prefix = [], [], None
    with bar:
        for chunk in _run(dataset, chunks, num_workers):
            counts.append(chunk.counts)
            skipped += chunk.skipped
            prefix = _shared(prefix, chunk.prefix)
            bar.update(len(chunk.counts))
    counts = np.concatenate(counts)  # (num_samples, 3)
    prefix = np.empty(0, np.int32) if prefix is None else prefix
    kept = np.flatnonzero(counts[:, 0])
    lengths, num_loss_tokens, num_images = np.ascontiguousarray(counts[kept].T)
    return CheckReport(kept, lengths, num_loss_tokens, num_images, skipped, prefix)


def _run(
    dataset: ConversationDataset, chunks: list[range], num_workers: int | None
) -> Iterator[_Checked]:
    if num_workers is None:
        num_workers = _num_cores() if dataset.data.num_workers else 0
    if num_workers == 0 or len(chunks) == 1:
        yield from (_check_chunk(dataset, chunk) for chunk in chunks)
        return
    with ProcessPoolExecutor(
        min(num_workers, len(chunks)), initializer=_start_worker, initargs=(dataset,)
    ) as pool:
        yield from pool.map(_check_chunk_in_worker, chunks)


def _num_cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # the cores that this process may use
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


_worker_dataset: ConversationDataset | None = None


def _start_worker(dataset: ConversationDataset) -> None:
    global _worker_dataset
    _worker_dataset = dataset


def _check_chunk_in_worker(chunk: range) -> _Checked:
    return _check_chunk(_worker_dataset, chunk)


def _check_chunk(dataset: ConversationDataset, chunk: range) -> _Checked:
    counts = np.zeros((len(chunk), 3), np.int32)
    skipped, prefix = [], None
    for row, index in enumerate(chunk):
        try:
            sample = dataset.encode(index)
            num_loss_tokens = np.count_nonzero(sample.labels[1:] != IGNORE_INDEX)
            if num_loss_tokens == 0:
                raise SampleError(sample.id, "nothing to train on", "Leave it out of the file")
            dataset.check_image(sample)
            counts[row] = len(sample.input_ids), num_loss_tokens, sample.image is not None
            prefix = _shared(prefix, _constant_start(dataset, sample))
        except SampleError as error:
            skipped.append(error)
    return _Checked(counts, skipped, prefix)


def _constant_start(dataset: ConversationDataset, sample: EncodedSample) -> np.ndarray:
    """The tokens before the image, <im_start> and <im_end>, and before the first target's row."""
    tokenizer = dataset.tokenizer
    of_image = (tokenizer.image_token_id, tokenizer.im_start_id, tokenizer.im_end_id)
    first_of_image = np.flatnonzero(np.isin(sample.input_ids, of_image))[:1]
    first_target = np.flatnonzero(sample.labels != IGNORE_INDEX)[:1]
    ends = (*first_of_image, *(first_target - 1), len(sample.input_ids) - 1)
    return sample.input_ids[: max(0, min(ends))]


def _shared(first: np.ndarray | None, second: np.ndarray | None) -> np.ndarray | None:
    """What both begin with; None is that of no sample."""
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
    remedy = f"{first.remedy}\n{len(skipped)} of {num_samples} samples cannot be used:{listed}"
    return SampleError(first.sample_id, first.problem, remedy)


def _save(report: CheckReport, path: Path, fingerprint: str) -> None:
    arrays = {name: value for name, value in vars(report).items() if name != "skipped"}
    skipped = json.dumps([(e.sample_id, e.problem, e.remedy) for e in report.skipped])
    temporary = path.with_name(f"{path.name}.tmp{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            np.savez_compressed(file, fingerprint=fingerprint, skipped=skipped, **arrays)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write the data check to {path} ({error.strerror})") from error
