"""Controls of pictures: exchanged, blank, or replaced by their captions."""

import io
from collections.abc import Iterator

import numpy as np
from PIL import Image

from mmalign.data.captions import image_key
from mmalign.data.controls.control import FIX, Controlled, Source, with_images
from mmalign.data.templates import IMAGE
from mmalign.errors import SampleError, UserError

BLANK = "blank.png"


def shuffle_images(source: Source) -> Controlled:
    images = [image for sample in source.samples for image in sample.images]
    names = [source.file_name(image) for image in images]
    _, labels = np.unique(names, return_inverse=True)
    given = [images[i] for i in deranged(labels, source.random)]
    rest = iter(given)
    rows = [
        with_images(row, [next(rest) for _ in sample.images])
        for row, sample in zip(source.records, source.samples, strict=True)
    ]
    unchanged = sum(x == source.file_name(y) for x, y in zip(names, given, strict=True))
    return Controlled(rows, {"images": len(images), "unchanged": unchanged})


def deranged(labels: np.ndarray, random: np.random.RandomState) -> np.ndarray:
    """A random permutation that gives no place its own label, where one exists.

    labels: (num_places,). Places that got their own label swap with random others; such a partner
    exists unless more than half of all places share the label.
    """
    given = random.permutation(len(labels))
    for i in np.flatnonzero(labels[given] == labels):
        if labels[given[i]] == labels[i]:  # no earlier swap has changed it
            partners = np.flatnonzero((labels != labels[i]) & (labels[given] != labels[i]))
            if len(partners):
                j = partners[random.randint(len(partners))]
                given[i], given[j] = given[j], given[i]
    return given


def blank_image(source: Source) -> Controlled:
    rows = [
        with_images(row, [BLANK] * len(sample.images))
        for row, sample in zip(source.records, source.samples, strict=True)
    ]
    return Controlled(rows, {"images": sum(len(sample.images) for sample in source.samples)})


def blank_png() -> bytes:
    """CLIP's mean colour: after normalisation all channels are nearly 0."""
    file = io.BytesIO()
    Image.new("RGB", (336, 336), (123, 117, 104)).save(file, "PNG")
    return file.getvalue()


def caption_for_image(source: Source) -> Controlled:
    captions: dict[str, str] = source.second
    missing = [
        sample.id
        for sample in source.samples
        if any(image_key(source.file_name(image)) not in captions for image in sample.images)
    ]
    if missing:
        more = f" and {len(missing) - 10:,} more" if missing[10:] else ""
        raise UserError(
            f"the captions lack the images of {len(missing):,} of {len(source.samples):,} samples: "
            f"{', '.join(missing[:10])}{more}. Take captions of the same images, or remove these "
            "samples"
        )
    rows = []
    for row, sample in zip(source.records, source.samples, strict=True):
        if sample.images:
            texts = iter([captions[image_key(source.file_name(image))] for image in sample.images])
            count = sum(turn.text.count(IMAGE) for turn in sample.conversations)
            if count != len(sample.images):
                problem = f"{len(sample.images)} images, but {count} {IMAGE} for their captions"
                raise SampleError(sample.id, problem, FIX)
            turns = [
                turn | {"value": _with_captions(turn["value"], texts)}
                for turn in row["conversations"]
            ]
            row = {key: x for key, x in row.items() if key != "image"} | {"conversations": turns}
        rows.append(row)
    return Controlled(rows, {"captioned": sum(len(x.images) > 0 for x in source.samples)})


def _with_captions(text: str, captions: Iterator[str]) -> str:
    first, *rest = text.split(IMAGE)
    return first + "".join(next(captions) + part for part in rest)
