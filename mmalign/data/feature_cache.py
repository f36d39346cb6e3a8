"""What the frozen vision tower makes of an image, kept on disk: one file an image.

An entry is found by the SHA-256 of the image file's bytes, in a folder named after everything else
that decides its numbers (tower_key). So a changed image, other weights or another preprocessing
never meet an old entry; they leave it behind. An entry ends with a CRC-32 of its contents and of
both names: one that is cut short, overwritten or moved is known, computed again and replaced.

Entries are written beside their place and moved there, so any number of processes may share a
folder: at worst two write the same numbers.
"""

import hashlib
import os
import uuid
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mmalign.data import images
from mmalign.errors import UserError
from mmalign.model import vision_tower
from mmalign.model.vision_tower import VisionTower


@dataclass(frozen=True)
class Uncached:
    """An image that has to go through the tower."""

    image: Path
    key: str
    damaged: bool  # whether there is an entry, which cannot be used


@dataclass(frozen=True)
class FeatureCache:
    """The entries of one tower, (num_patches, hidden_size) of `dtype` each."""

    folder: Path
    num_patches: int
    hidden_size: int
    dtype: torch.dtype

    @classmethod
    def of(cls, tower: VisionTower, root: Path) -> "FeatureCache":
        """The tower's part of a folder that towers may share; nothing is made yet."""
        sizes = tower.config.num_patches, tower.config.hidden_size
        return cls(root / tower_key(tower)[:32], *sizes, tower.class_embedding.dtype)

    @property
    def entry_bytes(self) -> int:
        return self.num_patches * self.hidden_size * self.dtype.itemsize + 4

    def key(self, image: Path) -> str:
        try:
            return hashlib.sha256(image.read_bytes()).hexdigest()
        except OSError as error:
            raise UserError(f"{image} cannot be read ({error})") from error

    def look_up(self, image: Path) -> Tensor | Uncached:
        """Features as `read` gives them. Raises UserError where the image cannot be read."""
        key = self.key(image)
        features = self.read(key)
        if features is None:
            return Uncached(image, key, damaged=self.path(key).exists())
        return features

    def read(self, key: str) -> Tensor | None:
        """Features (num_patches, hidden_size) on the CPU, or None: no entry, or a damaged one."""
        try:
            entry = bytearray(self.path(key).read_bytes())
        except OSError:
            return None
        if len(entry) != self.entry_bytes or self._checksum(key, entry[:-4]) != entry[-4:]:
            return None
        features = torch.frombuffer(entry, dtype=torch.uint8)[:-4].view(self.dtype)
        return features.view(self.num_patches, self.hidden_size)

    def write(self, key: str, features: Tensor) -> None:
        """Raises OSError, as for a full disk; then there is no entry, or the one before."""
        path = self.path(key)
        data = features.detach().to("cpu", self.dtype).contiguous().view(torch.uint8).numpy()
        data = data.tobytes()
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f"{path.name}.{uuid.uuid4().hex}.unfinished")
        try:
            unfinished.write_bytes(data + self._checksum(key, data))
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)

    def path(self, key: str) -> Path:
        return self.folder / key[:2] / key

    def num_entries(self) -> int:
        return sum(len(key) == 64 for _, _, keys in os.walk(self.folder) for key in keys)

    def _checksum(self, key: str, data: bytes) -> bytes:
        names = zlib.crc32(f"{self.folder.name} {key}".encode())
        return zlib.crc32(data, names).to_bytes(4, "little")


def tower_key(tower: VisionTower) -> str:
    """SHA-256 of weights, their type, and the code from the image file to the tower's output."""
    digest = hashlib.sha256(repr(tower.config).encode())
    for module in (images, vision_tower):
        digest.update(Path(module.__file__).read_bytes())
    for name, weight in sorted(tower.state_dict().items()):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()
