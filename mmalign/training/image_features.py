"""Whether a run keeps the vision tower's outputs on disk, and their making on the way.

An image goes through the tower when a micro-batch needs it and the cache lacks it, alone, so that
its numbers depend neither on its neighbours nor on where an earlier run was stopped.
"""

import logging
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from mmalign.config import TrainConfig
from mmalign.data.feature_cache import FeatureCache, Uncached
from mmalign.data.loader import StepLoader
from mmalign.data.packing import PackedBatch
from mmalign.distributed import Ranks
from mmalign.errors import UserError
from mmalign.model.vision_tower import VisionTower
from mmalign.training.flops import peak_bf16_flops, tower_flops

log = logging.getLogger("mmalign")

# Estimates, by which "auto" decides: what a tower reaches of a GPU's peak, and of a CPU; and what
# an image takes from disk to device, its file's SHA-256 included.
GPU_SHARE, UNKNOWN_GPU, CPU_RATE = 0.4, 100e12, 100e9  # of the peak; a peak; FLOP/s
BYTES_PER_SECOND, LOOK_UP_SECONDS = 1e9, 2e-4
WORTH_SECONDS = 60.0  # less is not worth the disk
MOST_OF_FREE_DISK = 0.5  # that "auto" takes


class ImageFeatures:
    """The features of a run's batches, from the cache and from the tower."""

    def __init__(self, cache: FeatureCache, tower: VisionTower):
        self.cache, self.tower = cache, tower
        self.writes = True

    def complete(self, batch: PackedBatch) -> PackedBatch:
        """The batch, on the tower's device, with the features of all its images."""
        images = len(batch.image_features) + len(batch.uncached)
        if not images:
            return batch
        computed = map(self._compute, batch.uncached.values(), batch.pixel_values)
        kept = iter(batch.image_features)
        features = [next(computed if i in batch.uncached else kept) for i in range(images)]
        no_pixels = batch.pixel_values[:0]
        return replace(
            batch, image_features=torch.stack(features), pixel_values=no_pixels, uncached={}
        )

    def _compute(self, uncached: Uncached, pixels: Tensor) -> Tensor:
        features = self.cache.read(uncached.key)
        if features is not None:  # made since the loader, which works ahead, looked it up
            return features.to(pixels.device)
        if uncached.damaged:
            path = self.cache.path(uncached.key)
            log.warning("%s: damaged, so %s goes through the tower again", path, uncached.image)
        features = self.tower(pixels[None])
        if self.writes:
            try:
                self.cache.write(uncached.key, features)
            except OSError as error:
                self.writes = False
                log.warning("no more image features are kept: %s", error)
        return features


def open_image_features(
    config: TrainConfig, tower: VisionTower | None, loader: StepLoader, ranks: Ranks
) -> ImageFeatures | None:
    """None: every image goes through the tower each time.

    auto: what is decided at the run's first start holds until its end. Raises UserError where
    features are asked for that the disk cannot hold.
    """
    wanted = config.shortcuts.image_feature_cache
    if wanted is False or tower is None:
        return None
    root = Path(config.shortcuts.image_feature_folder or config.run_dir / "image_features")
    begins = wanted is True or (
        not loader.start_step and seconds_spared(tower, loader, ranks) >= WORTH_SECONDS
    )
    if not begins and not ranks.from_main(root.is_dir()):
        return None
    cache = FeatureCache.of(tower, root)
    room = ranks.from_main(_Room.of(cache, loader) if ranks.is_main else None)
    if wanted is True and not room.fits(1.0):
        raise UserError(
            f"{room}. Name another disk with --shortcuts.image-feature-folder, or go on without "
            "it: --shortcuts.image-feature-cache False"
        )
    if wanted == "auto" and not room.begun and not (begins and room.fits(MOST_OF_FREE_DISK)):
        if begins and ranks.is_main:
            log.info("%s: not kept (--shortcuts.image-feature-folder names another disk)", room)
        return None
    cache.folder.mkdir(parents=True, exist_ok=True)
    if ranks.is_main:
        log.info("%s", room)
    return ImageFeatures(cache, tower)


@dataclass(frozen=True)
class _Room:
    """What the entries of a run need and find, as the main process sees it."""

    folder: Path
    begun: bool  # whether there are entries of this tower
    num_images: int
    needed_bytes: int  # where every image is another
    present_bytes: int
    free_bytes: int

    @classmethod
    def of(cls, cache: FeatureCache, loader: StepLoader) -> "_Room":
        folder, num_images = cache.folder, int(loader.report.num_images.sum())
        existing = next(x for x in (folder, *folder.absolute().parents) if x.is_dir())
        return cls(
            folder,
            folder.is_dir(),
            num_images,
            num_images * cache.entry_bytes,
            cache.num_entries() * cache.entry_bytes,
            shutil.disk_usage(existing).free,
        )

    def fits(self, share: float) -> bool:
        """Into this share of what is free."""
        return self.needed_bytes - self.present_bytes <= share * self.free_bytes

    def __str__(self) -> str:
        needed, present, free = map(_gb, (self.needed_bytes, self.present_bytes, self.free_bytes))
        return (
            f"image features: up to {needed} for {self.num_images} images in {self.folder}, which "
            f"has {present}; {free} are free"
        )


def seconds_spared(tower: VisionTower, loader: StepLoader, ranks: Ranks) -> float:
    """Estimate for each process of the whole run; less than 0 where reading takes longer."""
    vision, itemsize = tower.config, tower.class_embedding.dtype.itemsize
    rate = CPU_RATE
    if ranks.device.type == "cuda":
        peak = peak_bf16_flops(torch.cuda.get_device_name(ranks.device))
        rate = GPU_SHARE * (peak or UNKNOWN_GPU)
    moved = vision.num_patches * vision.hidden_size * itemsize / BYTES_PER_SECOND
    gain = tower_flops(vision, 1).total / rate - moved - LOOK_UP_SECONDS
    passes = loader.num_steps * loader.plan.global_batch_size / loader.plan.num_samples
    num_images = int(loader.report.num_images.sum())
    return num_images * ((passes - 1) * gain - moved) / ranks.world_size


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.1f} MB"
