"""Entries of the feature cache: what damages them, what they depend on, several processes."""

import multiprocessing
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mmalign.data.feature_cache import FeatureCache, Uncached, tower_key
from mmalign.errors import UserError
from mmalign.model.config import VisionConfig
from mmalign.model.layers import init_weights
from mmalign.model.vision_tower import VisionTower

VISION = VisionConfig(48, 96, 2, 2, 56, 14, 1e-5)
KEY, OTHER = "ab" * 32, "cd" * 32


def tower(seed: int = 0) -> VisionTower:
    model = VisionTower(VISION)
    init_weights(model, seed)
    return model


@pytest.fixture
def cache(tmp_path) -> FeatureCache:
    return FeatureCache(tmp_path / "tower", 16, 48, torch.float32)


def features(seed: int = 0) -> torch.Tensor:
    return torch.randn(16, 48, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_entries_come_back_bit_for_bit(cache, dtype):
    cache = replace(cache, dtype=dtype)
    assert cache.read(KEY) is None and cache.num_entries() == 0
    cache.write(KEY, features().to(dtype))
    found = cache.read(KEY)
    assert found.dtype == dtype and torch.equal(found, features().to(dtype))
    assert cache.num_entries() == 1 and cache.path(KEY).stat().st_size == cache.entry_bytes


def cut_short(data: bytes) -> bytes:
    return data[: len(data) // 2]


def one_bit(data: bytes) -> bytes:
    return data[:100] + bytes([data[100] ^ 1]) + data[101:]


def nothing(data: bytes) -> bytes:
    return b""


def zeros(data: bytes) -> bytes:
    return bytes(len(data))


@pytest.mark.parametrize("damage", [cut_short, one_bit, nothing, zeros])
def test_damaged_entries_are_seen(cache, tmp_path, damage):
    image = tmp_path / "image.png"
    image.write_bytes(b"pixels")
    key = cache.key(image)
    assert cache.look_up(image) == Uncached(image, key, damaged=False)
    cache.write(key, features())
    assert torch.equal(cache.look_up(image), features())
    cache.path(key).write_bytes(damage(cache.path(key).read_bytes()))
    assert cache.look_up(image) == Uncached(image, key, damaged=True)


def test_an_entry_of_another_image_or_tower_is_damage(cache):
    cache.write(KEY, features())
    cache.path(OTHER).parent.mkdir()
    os.replace(cache.path(KEY), cache.path(OTHER))
    assert cache.read(OTHER) is None
    cache.write(KEY, features())
    cache.folder.rename(cache.folder.with_name("another"))
    assert replace(cache, folder=cache.folder.with_name("another")).read(KEY) is None


def test_a_changed_image_has_another_entry(cache, tmp_path):
    image = tmp_path / "image.png"
    image.write_bytes(b"pixels")
    cache.write(cache.key(image), features())
    before = image.stat()
    image.write_bytes(b"qixels")
    os.utime(image, ns=(before.st_atime_ns, before.st_mtime_ns))  # as a copy may leave it
    assert not cache.look_up(image).damaged
    with pytest.raises(UserError, match="missing.png cannot be read"):
        cache.look_up(tmp_path / "missing.png")


def test_towers_have_folders_of_their_own(tmp_path):
    folders = {FeatureCache.of(x, tmp_path).folder for x in (tower(), tower(), tower(seed=1))}
    assert len(folders) == 2
    changed = tower()
    with torch.no_grad():
        changed.layers[0].fc1.bias[3] += 1e-6
    keys = {tower_key(x) for x in (tower(), changed, tower().bfloat16())}
    resized = tower()
    resized.config = replace(VISION, layer_norm_eps=1e-6)
    assert len(keys | {tower_key(resized)}) == 4


def test_a_write_that_fails_leaves_what_was_there(cache, monkeypatch):
    cache.write(KEY, features())

    def full(self, data):
        with self.open("wb") as file:
            file.write(data[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        cache.write(KEY, features(1))
    assert torch.equal(cache.read(KEY), features())
    assert [path.name for path in cache.path(KEY).parent.iterdir()] == [KEY]


def _write_and_read(cache: FeatureCache, seed: int, results) -> None:
    found = Counter()
    for _ in range(150):
        cache.write(KEY, features(seed))
        entry = cache.read(KEY)
        found[next((x for x in (0, 1) if entry is not None and entry.equal(features(x))), -1)] += 1
    results.put(found)


def test_processes_that_write_one_entry_never_see_half_of_it(cache):
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    processes = [
        context.Process(target=_write_and_read, args=(cache, seed, results)) for seed in (0, 1)
    ]
    for process in processes:
        process.start()
    found = results.get() + results.get()
    for process in processes:
        process.join()
    assert found[-1] == 0 and found[0] + found[1] == 300
    assert [path.name for path in cache.path(KEY).parent.iterdir()] == [KEY]
