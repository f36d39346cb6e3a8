"""The samples of a LLaVA JSON file, encoded: ids, labels and pixels."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar
from zlib import crc32

import numpy as np

from mmalign.config import DataConfig
from mmalign.data.images import check_image, count_tiles, load_picture
from mmalign.data.memo import Memo
from mmalign.data.mix import open_samples
from mmalign.data.pictures import FIX_OR_SKIP, Picture, Pictures, UnreadableRootError, check_exists
from mmalign.data.samples import Sample, Samples, Turn
from mmalign.data.segments import IMAGE, IMAGE_SENTINEL, special_ids
from mmalign.data.templates import encode_conversation, find_template
from mmalign.data.turns import checked_turns
from mmalign.errors import LongSampleError, SampleError, UserError
from mmalign.model.config import VisionConfig
from mmalign.model.tiles import Pixels, Tiles, join_pixels
from mmalign.tokenizer import Tokenizer

T = TypeVar("T")
_SHARE_CHECKED, _LEAST_CHECKED = 0.01, 1000  # of the samples with data.check_images "sample"
_MOST_CHARACTERS = 256  # of one token: no vocabulary has longer ones
_MEMO_BYTES = 2**26  # of encoded samples, and as many of pixels
_SAMPLE_BYTES = 1024  # of an encoded sample besides its arrays, at most


@dataclass(frozen=True, slots=True)
class EncodedSample:
    """One sample as the model sees it, before packing."""

    id: str
    input_ids: np.ndarray  # (num_tokens,) int32; every patch of an image is an image_token_id
    labels: np.ndarray  # (num_tokens,) int32; unshifted, IGNORE_INDEX where there is no loss
    images: tuple[Picture, ...]  # in the order of their patches
    num_tiles: int  # squares of them that the tower sees: one each, more in LLaVA 1.6
    num_cut: int = 0  # tokens that data.on_long_sample "truncate" has cut off


class ConversationDataset:
    """Encodes samples lazily, one by one.

    Outside of worker processes it keeps some results: small data is encoded and decoded once.
    vision: the tower that the images are for; None: text only (data.text_only).

    Raises SampleError for an unusable sample: wrong order of speakers, a number of `<image>` that
    differs from its images, an empty question or answer, more than data.max_length tokens (unless
    data.on_long_sample is "truncate"), an image path outside data.image_root.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        tokenizer: Tokenizer,
        data: DataConfig,
        vision: VisionConfig | None,
    ):
        if vision is None and not data.text_only:
            raise ValueError("images need the VisionConfig of their tower")
        pads = data.image_aspect_ratio == "pad"
        if vision is not None and vision.grids and pads:
            raise UserError(
                "the vision tower is that of a LLaVA 1.6, which cuts images to tiles and never "
                "pads them to squares. Use --data.image-aspect-ratio square"
            )
        self.samples, self.tokenizer, self.data = samples, tokenizer, data
        self.vision = vision.padding() if vision is not None and pads else vision
        self.template = find_template(data.template)
        self._require_template()
        tables = samples.tables if isinstance(samples, Samples) else {}
        memo_bytes = _MEMO_BYTES if data.num_workers in ("auto", 0) else 0
        self._encoded: Memo[EncodedSample] = Memo(memo_bytes)  # by index
        self._pixels: Memo[Pixels] = Memo(memo_bytes)  # by path
        self.pictures = None
        if not data.text_only:
            self.pictures = Pictures(data.image_roots, data.follow_links, tables)
            _refuse_unreadable(self.pictures, samples)

    def _require_template(self) -> None:
        """UserError where it can write no conversation, before the first sample is blamed."""
        special = special_ids(self.tokenizer, self.data.use_im_start_end)
        try:
            list(self.template.render([Turn("human", "a"), Turn("gpt", "a")], special))
        except UserError as error:
            raise UserError(f"--data.template {self.data.template}: {error}") from error

    @classmethod
    def open(
        cls, data: DataConfig, tokenizer: str | Path, vision: VisionConfig | None
    ) -> "ConversationDataset":
        """Read data.path and the tokenizer's folder or file."""
        samples = open_samples(data.path, data)
        return cls(samples, Tokenizer.from_pretrained(tokenizer), data, vision)

    def __len__(self) -> int:
        return len(self.samples)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of everything that decides how samples are encoded, except the image files."""
        data, vision = self.data, self.vision
        images = None
        if vision is not None:
            grids = (vision.grids,) if vision.grids else ()
            images = vision.preprocessing, vision.num_patches, *grids
        settings = (
            data.template,
            data.use_im_start_end,
            data.text_only,
            data.max_length,
            data.on_long_sample,
            data.check_images,
            data.on_bad_sample,
            data.follow_links,
            self.pictures and self.pictures.fingerprint,
            images,
            self.tokenizer.fingerprint,
        )
        digest = hashlib.sha256(repr(settings).encode())
        if isinstance(self.samples, Samples):
            digest.update(self.samples.fingerprint.encode())
        else:
            for sample in self.samples:
                digest.update(repr(sample).encode())
        return digest.hexdigest()

    def id_of(self, index: int) -> str:
        known = self._encoded.get(index)
        return known.id if known else self.samples[index].id

    def encode(self, index: int) -> EncodedSample:
        """Ids and labels with images expanded to their patches.

        The images are not opened; with LLaVA 1.6's tower, whose tokens depend on their sizes, they
        are not decoded.
        """
        if known := self._encoded.get(index):
            return known
        encoded = self._encode(self.samples[index])
        num_bytes = encoded.input_ids.nbytes + encoded.labels.nbytes + _SAMPLE_BYTES
        return self._encoded.keep(index, encoded, num_bytes)

    def _encode(self, sample: Sample) -> EncodedSample:
        data, tokenizer = self.data, self.tokenizer
        turns = checked_turns(sample, data, self.template)
        num_characters = sum(len(turn.text) for turn in turns)
        if num_characters > _MOST_CHARACTERS * data.max_length:  # tokenising it could take hours
            raise self._too_long(sample, f"{num_characters:,} characters")
        try:
            ids, labels = encode_conversation(
                turns, self.template, tokenizer, data.use_im_start_end
            )
        except Exception as error:  # whatever the libraries raise for text that they cannot take
            raise SampleError(
                sample.id, f"its text cannot be tokenised ({error})", "Fix or remove the sample"
            ) from error
        if len(ids) > data.max_length and data.on_long_sample != "truncate":
            raise self._too_long(sample, f"{len(ids)} tokens (an image counted as one)")
        if tokenizer.image_token_id in ids:
            raise SampleError(
                sample.id,
                f"the text contains {tokenizer.token(tokenizer.image_token_id)!r}, the token that "
                "marks image positions",
                f"Write {IMAGE} at the image's place",
            )
        if padding := tokenizer.padding.keys() & set(ids):
            name = tokenizer.padding[padding.pop()]
            problem = f"the text contains {name!r}, the tokenizer's padding token"
            raise SampleError(sample.id, problem, "Remove it from the text")
        ids, labels = np.array(ids, np.int32), np.array(labels, np.int32)
        images, tiles = self._pictures(sample), []
        if images and self.vision:
            found = [self._count_tiles(sample.id, image) for image in images]
            tiles, lengths = zip(*found, strict=True)
            ids, labels = self._expand(ids, labels, lengths)
        num_cut = max(0, len(ids) - data.max_length) if data.on_long_sample == "truncate" else 0
        if num_cut:
            if tokenizer.image_token_id in ids[data.max_length :]:
                raise self._too_long(sample, f"{len(ids)} tokens, and an image would be cut")
            ids, labels = ids[: data.max_length], labels[: data.max_length]
        return EncodedSample(sample.id, ids, labels, images, sum(tiles), num_cut)

    def _too_long(self, sample: Sample, length: str) -> LongSampleError:
        problem = f"{length}, at most {self.data.max_length} tokens allowed"
        remedy = "Shorten or split the conversation, or raise --data.max-length"
        if self.data.on_long_sample == "error":
            remedy += ", or choose --data.on-long-sample skip or truncate"
        return LongSampleError(sample.id, problem, remedy)

    def load_pixels(self, index: int) -> Pixels | None:
        """The sample's images, uint8 (num_images, 3, crop_size, crop_size), or their tiles.

        None without any.
        """
        if known := self._encoded.get(index):
            sample_id, images = known.id, known.images
        else:
            sample = self.samples[index]
            sample_id, images = sample.id, self._pictures(sample)
        if not images or not self.vision:
            return None
        return join_pixels([self._load(sample_id, image) for image in images])

    def _load(self, sample_id: str, image: Picture) -> Pixels:
        if (known := self._pixels.get(image) if isinstance(image, Path) else None) is not None:
            return known
        assert self.vision is not None  # a sample has images only where there is a tower
        remedy = "Fix the file and rerun the same command to resume"
        if self.data.check_images is not True:
            remedy += " (--data.check-images True finds such files before the first step)"
        pixels = _naming_sample(sample_id, remedy, load_picture, image, self.vision)
        if isinstance(image, Path):
            stored = pixels.pixels if isinstance(pixels, Tiles) else pixels
            self._pixels.keep(image, pixels, stored.nbytes)
        return pixels

    def _count_tiles(self, sample_id: str, image: Picture) -> tuple[int, int]:
        assert self.vision is not None  # a sample has images only where there is a tower
        return _naming_sample(sample_id, FIX_OR_SKIP, count_tiles, image, self.vision)

    def check_images(self, sample: EncodedSample) -> None:
        """Raise SampleError where load_pixels would.

        Where data.check_images does not ask to decode them, files only have to exist.
        """
        decodes = self.data.check_images
        if decodes == "sample":
            share = max(_SHARE_CHECKED, _LEAST_CHECKED / len(self))
            decodes = crc32(sample.id.encode()) < share * 2**32  # the same ones every time
        for image in sample.images:
            if decodes:
                assert self.vision is not None  # a sample has images only where there is a tower
                preprocessing = self.vision.preprocessing
                _naming_sample(sample.id, FIX_OR_SKIP, check_image, image, preprocessing)
            else:
                _naming_sample(sample.id, FIX_OR_SKIP, check_exists, image)

    def _expand(
        self, ids: np.ndarray, labels: np.ndarray, lengths: Sequence[int]
    ) -> tuple[np.ndarray, np.ndarray]:
        """lengths: tokens of each image."""
        repeats = np.ones_like(ids)
        repeats[ids == IMAGE_SENTINEL] = lengths
        ids = np.where(ids == IMAGE_SENTINEL, self.tokenizer.image_token_id, ids)
        return np.repeat(ids, repeats).astype(np.int32), np.repeat(labels, repeats)

    def _pictures(self, sample: Sample) -> tuple[Picture, ...]:
        if self.pictures is None:
            return ()
        return tuple(self.pictures.find(sample.id, image) for image in sample.images)


def _refuse_unreadable(pictures: Pictures, samples: Sequence[Sample]) -> None:
    """Where nothing of a root can be read: UserError that names the first sample it is for."""
    for index in range(len(samples)) if pictures.unreadable else ():
        try:
            for image in samples[index].images:
                pictures.find(samples[index].id, image)
        except UnreadableRootError:
            raise
        except SampleError:  # the check names it
            continue
    if pictures.unreadable:
        raise pictures.unreadable


def _naming_sample(sample_id: str, remedy: str, read: Callable[..., T], *arguments) -> T:
    try:
        return read(*arguments)
    except UserError as error:
        raise SampleError(sample_id, str(error), remedy) from error
