"""What is in a data file besides its lengths, gathered while every sample is checked.

Samples are compared by 64-bit hashes: among 600,000 the chance of a false duplicate is 1e-8.
Pictures are compared by CRC-32 and size, which a zip knows without reading: among 600,000 of 10,000
sizes, 0.4%.
"""

import hashlib
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from mmalign.data.archive import Member
from mmalign.data.archives import ZipArchive
from mmalign.data.dataset import ConversationDataset, EncodedSample
from mmalign.data.overlap import QuestionIndex
from mmalign.data.pictures import Picture, open_picture
from mmalign.data.samples import Sample

CheckedSamples = Sequence[tuple[int, EncodedSample]]  # with their indices into the dataset


@dataclass(frozen=True)
class Seen:
    """Of the usable samples of a part of the file."""

    samples: np.ndarray  # (num_samples, 3) uint64; index, content, number of questions
    # (num_pictures, 4) uint64; index of the sample, place in it, name, content
    pictures: np.ndarray
    types: Counter[str | None]
    overlap: np.ndarray  # (num_matches, 3) int64; index of the sample, question, runs found


@dataclass
class Survey:
    """An observer of check_samples."""

    questions: QuestionIndex | None = None
    parts: list[Seen] = field(default_factory=list)

    def observe(self, dataset: ConversationDataset, checked: CheckedSamples) -> Seen:
        samples, pictures, types, texts = [], [], Counter(), []
        for index, encoded in checked:
            sample = dataset.samples[index]
            types[sample.type] += 1
            text = _hash(repr([(turn.speaker, turn.text) for turn in sample.conversations]))
            shown = _pictures(dataset, sample, encoded)
            pictures += [(index, place, *x) for place, x in enumerate(shown)]
            content = _hash(repr((text, [content or name for name, content in shown])))
            samples.append(
                (index, content, sum(x.speaker == "human" for x in sample.conversations))
            )
            texts.append([turn.text for turn in sample.conversations])
        overlap = []
        if self.questions:
            found = self.questions.find(texts)
            overlap = [(checked[x.row][0], x.question, x.found) for x in found]
        seen = _table(samples, 3, np.uint64), _table(pictures, 4, np.uint64)
        return Seen(*seen, types, _table(overlap, 3, np.int64))

    def collect(self, seen: Seen) -> None:
        self.parts.append(seen)

    @property
    def samples(self) -> np.ndarray:
        return np.concatenate([part.samples for part in self.parts])

    @property
    def pictures(self) -> np.ndarray:
        return np.concatenate([part.pictures for part in self.parts])

    @property
    def overlap(self) -> np.ndarray:
        return np.concatenate([part.overlap for part in self.parts])

    @property
    def types(self) -> Counter[str | None]:
        return sum((part.types for part in self.parts), Counter())

    def repeated_samples(self) -> list[np.ndarray]:
        """Indices of the samples that have one content, for each content of several samples."""
        index, content, _ = self.samples.T
        return [index[rows].astype(np.int64) for rows in _groups(content)]

    def repeated_pictures(self) -> list[list[tuple[int, int]]]:
        """Sample and place of each name, for each content that has several names."""
        read = self.pictures[self.pictures[:, 3] > 0]
        _, first = np.unique(read[:, 2], return_index=True)  # of each name
        read = read[np.sort(first)]
        return [[(int(i), int(place)) for i, place in read[x, :2]] for x in _groups(read[:, 3])]

    @property
    def num_unread_pictures(self) -> int:
        return int((self.pictures[:, 3] == 0).sum())

    @property
    def num_different_pictures(self) -> int:
        return len(np.unique(self.pictures[:, 2]))


def _pictures(
    dataset: ConversationDataset, sample: Sample, encoded: EncodedSample
) -> list[tuple[int, int]]:
    """Hash of the name, and content, of every picture; content 0 where it is not known."""
    reads = dataset.data.check_images is True
    return [
        (_hash(name), _content_of(picture, reads))
        for name, picture in zip(sample.images, encoded.images, strict=False)  # none: text only
    ]


def _content_of(picture: Picture, reads: bool) -> int:
    """CRC-32 and size as one number; 0 where the check reads none."""
    if isinstance(picture, Member) and isinstance(picture.archive, ZipArchive):
        crc, size = picture.archive.checksum(picture)
    elif reads:
        with open_picture(picture) as file:
            content = file.read()
        crc, size = zlib.crc32(content), len(content)
    else:
        return 0
    return crc << 32 | size


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


def _table(rows: list, width: int, dtype: type) -> np.ndarray:
    return np.array(rows, dtype).reshape(-1, width)


def _groups(content: np.ndarray) -> list[np.ndarray]:
    """The rows that share a content, for each content that several have; first ones first."""
    order = np.argsort(content, kind="stable")
    _, begins, counts = np.unique(content[order], return_index=True, return_counts=True)
    repeated = zip(begins[counts > 1], counts[counts > 1], strict=True)
    return sorted((order[i : i + n] for i, n in repeated), key=lambda rows: rows[0])
