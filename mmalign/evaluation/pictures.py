"""Which pictures questions come with, decoded ahead of the model by worker processes."""

import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch.utils.data import DataLoader, Dataset

from mmalign.data.images import load_picture
from mmalign.errors import UserError
from mmalign.evaluation.corruptions import corrupt
from mmalign.model.config import VisionConfig
from mmalign.model.tiles import Pixels

Control = Literal["blind", "mismatched"]


@dataclass(frozen=True)
class Shown:
    """Which picture a question comes with."""

    control: Control | None = None
    corruption: tuple[str, int] | None = None  # name, severity

    @property
    def name(self) -> str:
        """Of the folder; empty: the question's own picture, as it is."""
        return (
            f"{self.corruption[0]}-{self.corruption[1]}" if self.corruption else self.control or ""
        )


def load_pictures(
    data_root: Path,
    images: list[str],
    vision: VisionConfig,
    shown: Shown,
    seed: int,
    num_workers: int,
) -> Iterator[Pixels]:
    """Each, in order; UserError for a bad file."""
    pictures = _Pictures(data_root, images, vision, shown, seed)
    loader = DataLoader(
        pictures,
        batch_size=None,
        num_workers=min(num_workers, len(images)),
        worker_init_fn=_ignore_interrupts,
        generator=torch.Generator(),  # the default would draw from the global generator
    )
    for pixels in loader:
        if isinstance(pixels, UserError):
            raise pixels
        yield pixels


def _ignore_interrupts(worker_id: int) -> None:
    """Ctrl-C reaches every process: the main one ends the others."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def exchanged(images: Sequence[str]) -> dict[str, str]:
    """For every picture another one, half of the list away."""
    images = list(dict.fromkeys(images))
    if len(images) < 2:
        raise UserError(
            "all questions are about one picture: --controls mismatched needs another one to show"
        )
    return {x: images[(i + len(images) // 2) % len(images)] for i, x in enumerate(images)}


@dataclass(frozen=True)
class _Pictures(Dataset):
    """What worker processes decode; an error is an item, which the main process raises."""

    data_root: Path
    images: list[str]
    vision: VisionConfig
    shown: Shown
    seed: int

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Pixels | UserError:
        path = self.data_root / self.images[index]
        try:
            if self.shown.corruption is None:
                return load_picture(path, self.vision)
            name, severity = self.shown.corruption
            change = partial(
                corrupt, name=name, severity=severity, picture=path.name, seed=self.seed
            )
            return load_picture(path, self.vision, change)
        except UserError as error:
            return error
