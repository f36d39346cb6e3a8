"""Tiles of packed samples and maps of packed rows, compiled for the host, against NumPy."""

import numpy as np
import pytest

from .host_library import HostLibrary

LENGTHS = {
    "one token each": [1] * 40,
    "ragged": [199, 1, 512, 0, 64, 65, 700, 128, 3, 0],
    "one long sample among short ones": [20] * 30 + [4096] + [20] * 30,
    "nothing": [0, 0],
}


@pytest.fixture(scope="module")
def host(host_library_file):
    return HostLibrary(host_library_file)


def ordered_tiles(host, lengths, causal, tile_rows=64, num_threads=7):
    bounds = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    start = (bounds, len(lengths), tile_rows, causal, num_threads)
    tiles = np.full((host.order_tiles(*start, None), 2), -1, np.int32)
    host.order_tiles(*start, tiles)
    return tiles


def costs(tiles, lengths, causal, tile_rows=64):
    """Tiles of keys that each tile reads."""
    counts = -(-np.array(lengths) // tile_rows)
    return tiles[:, 1] + 1 if causal else counts[tiles[:, 0]]


@pytest.mark.parametrize("causal", (True, False))
@pytest.mark.parametrize("name", LENGTHS)
def test_every_tile_once_from_expensive_to_cheap(host, name, causal):
    lengths = LENGTHS[name]
    tiles = ordered_tiles(host, lengths, causal)
    expected = {(s, i) for s, length in enumerate(lengths) for i in range(-(-length // 64))}
    assert len(tiles) == len(expected) and set(map(tuple, tiles.tolist())) == expected
    assert (np.diff(costs(tiles, lengths, causal)) <= 0).all()
    again = ordered_tiles(host, lengths, causal, num_threads=1)
    assert (tiles == again).all()  # whoever fills the table


@pytest.mark.parametrize("causal", (True, False))
@pytest.mark.parametrize("name", LENGTHS)
@pytest.mark.parametrize(("num_workers", "num_heads"), [(132, 32), (108, 16), (7, 3)])
def test_workers_share_the_cost(host, name, causal, num_workers, num_heads):
    lengths = LENGTHS[name]
    tiles = ordered_tiles(host, lengths, causal)
    cost = np.repeat(costs(tiles, lengths, causal), num_heads)
    workers = np.full(len(cost), -1, np.int32)
    host.assign_items(len(cost), num_workers, workers)
    assert ((workers >= 0) & (workers < num_workers)).all()
    if len(cost):
        work = np.bincount(workers, weights=cost, minlength=num_workers)
        assert work.max() - work.min() <= cost.max()


@pytest.mark.parametrize("num_images", (0, 1, 60, 100))
def test_packed_rows(host, num_images):
    rng = np.random.default_rng(num_images)
    num_rows = 100
    positions = np.sort(rng.choice(num_rows, num_images, replace=False)).astype(np.int64)
    image_rows = np.zeros(num_rows, np.int64)
    text_rows = np.zeros(num_rows - num_images, np.int64)
    host.packed_rows(positions, num_images, num_rows, image_rows, text_rows)
    expected = np.full(num_rows, -1)
    expected[positions] = np.arange(num_images)
    assert (image_rows == expected).all()
    assert (text_rows == np.setdiff1d(np.arange(num_rows), positions)).all()
