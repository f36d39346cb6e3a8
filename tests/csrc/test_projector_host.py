"""Where the projector's kernel looks and writes, against the layouts that the PTX ISA documents.

A NumPy machine copies tiles as TMA does, reads operands as wgmma does and hands out accumulators;
the addresses, descriptors and maps are those of the kernel's headers. Then the whole kernel, all
threads of a cluster in random order, copies arriving at any time.
"""

import numpy as np
import pytest

from .host_library import HostLibrary

STAGES, ROWS, DEPTH = 4, 128, 64
COLUMNS = (8, 40, 224, 256, 480, 1024, 2048, 3200, 4096, 5120, 8192, 16384)
TILES = [(224, 1), (224, 8), (256, 1), (256, 2), (256, 4), (256, 8)]


@pytest.fixture(scope="module")
def host(host_library_file):
    return HostLibrary(host_library_file)


def plan(host, columns):
    found = np.zeros(3, np.int32)
    host.projector_plan(columns, found)
    return found.tolist()


@pytest.mark.parametrize("columns", COLUMNS)
def test_every_column_belongs_to_one_tile(host, columns):
    tile, cluster, passes = plan(host, columns)
    begins = [
        host.projector_first_column(tile, cluster, rank, turn)
        for rank in range(cluster)
        for turn in range(passes)
    ]
    assert sorted(begins) == list(range(0, tile * cluster * passes, tile))
    assert tile * cluster * passes >= columns
    assert passes == 1 or tile * cluster * (passes - 1) < columns


def test_plans_of_the_models(host):
    assert plan(host, 4096) == [256, 8, 2]
    assert plan(host, 3200) == [224, 8, 2]
    assert plan(host, 40) == [224, 1, 1]


@pytest.mark.parametrize("columns", COLUMNS)
def test_shared_memory_is_aligned_and_fits(host, columns):
    tile, cluster, passes = plan(host, columns)
    regions = np.zeros(7, np.int32)
    host.projector_regions(tile, cluster, passes, 2048, regions)
    stages, sums, bias, norm_weight, barriers, marks, end = regions.tolist()
    assert stages == 0 and sums == STAGES * (ROWS + tile) * 128 and sums % 1024 == 0
    assert bias == sums + 2 * ROWS * cluster * 4  # two turns, a number for each row and block
    assert norm_weight == bias + 2 * passes * tile and norm_weight % 16 == bias % 16 == 0
    assert barriers == norm_weight + 2 * passes * tile and barriers % 8 == 0
    assert marks == barriers + 8 * (2 * STAGES + 2 * 2 + 2) and end == marks + 4 * 2048
    assert end + 1024 <= 227 * 1024  # and room to align it


def swizzle(address):
    """TMA and wgmma with 128-byte swizzle: bits 4 to 6 of an address, exclusive or bits 7 to 9."""
    return address ^ (address >> 7 & 7) << 4


def copy_box(memory, to, box):
    """TMA: rows of 128 bytes, one after the other, swizzled."""
    address = to + np.arange(box.nbytes).reshape(box.shape[0], 128)
    memory[swizzle(address)] = np.ascontiguousarray(box).view(np.uint8)


def read_operand(memory, descriptor, num_rows):
    """wgmma: an operand of num_rows x 16 16-bit elements, rows contiguous, 128-byte swizzle."""
    assert descriptor >> 62 == 1 and descriptor >> 49 & 7 == 0  # 128-byte swizzle, base offset 0
    start, stride = (descriptor & 0x3FFF) << 4, (descriptor >> 32 & 0x3FFF) << 4
    row, byte = np.arange(num_rows)[:, None], np.arange(32)[None]
    address = start + row // 8 * stride + row % 8 * 128 + byte
    return memory[swizzle(address)].copy().view(np.float16)


@pytest.mark.parametrize("group", (0, 1))
@pytest.mark.parametrize(("tile", "cluster"), TILES)
def test_a_product_of_every_stage(host, tile, cluster, group):
    """Slices that the blocks of a cluster fetch, multiplied as the descriptors say."""
    rng = np.random.default_rng(tile + cluster + group)
    base, slice_rows = 3072, ROWS // cluster
    memory = np.zeros(base + STAGES * (ROWS + tile) * 128, np.uint8)
    tensors = []
    for stage in range(STAGES):
        places, descriptors = np.zeros(1 + cluster, np.int32), np.zeros(8, np.uint64)
        host.projector_stage(tile, cluster, stage, group, base, places, descriptors)
        features, weight = (
            rng.integers(-8, 8, (n, DEPTH)).astype(np.float16) for n in (ROWS, tile)
        )
        for rank in range(cluster):
            rows = slice(rank * slice_rows, (rank + 1) * slice_rows)
            copy_box(memory, base + places[1 + rank], features[rows])
        copy_box(memory, base + places[0], weight)
        tensors.append((features, weight, [int(x) for x in descriptors]))
    for features, weight, descriptors in tensors:
        total = np.zeros((64, tile), np.float32)
        for part in range(4):
            a = read_operand(memory, descriptors[part], 64).astype(np.float32)
            total += a @ read_operand(memory, descriptors[4 + part], tile).astype(np.float32).T
        expected = features[group * 64 :][:64].astype(np.float32) @ weight.astype(np.float32).T
        assert (total == expected).all()


def fragment(num):
    """PTX ISA, wgmma m64nNk16, accumulator fragment: row and column of d[i] in each thread."""
    thread, i = np.arange(128)[:, None], np.arange(num)[None]
    row = 16 * (thread // 32) + thread % 32 // 4 + 8 * (i // 2 % 2)
    column = 8 * (i // 4) + 2 * (thread % 4) + i % 2
    return row, column


def test_accumulators_are_the_documented_fragment(host):
    places = np.zeros((128, 128, 2), np.int32)
    host.accumulators(128, places)
    row, column = fragment(128)
    assert (places[..., 0] == row).all() and (places[..., 1] == column).all()


@pytest.mark.parametrize("tile", (224, 256))
def test_rows_leave_in_order(host, tile):
    """Of accumulators as wgmma hands them out, after the exchange among the threads of a row."""
    product = np.arange(64 * tile, dtype=np.uint16).reshape(64, tile)
    held = np.ascontiguousarray(product[fragment(tile // 2)])  # (threads, accumulators)
    rows = np.full((64, tile), -1, np.int16).view(np.uint16)
    host.projector_rows(held.view(np.uint32), tile, rows)
    assert (rows == product).all()


def test_rows_are_dealt_once(host):
    found = [host.dealt_row(slot, block, 7) for slot in range(5) for block in range(7)]
    assert found == list(range(35))


def bf16(x):
    """Bits, rounded to nearest even, and back."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return (bits + 0x7FFF + (bits >> 16 & 1) >> 16).astype(np.uint16)


def wide(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


EPS = 1e-5
# images, features, tokens, columns; then columns of a tile, blocks of a cluster, passes, clusters
RUNS = {
    "few rows": (3, 24, 7, 40, 224, 1, 1, 1),
    "a cluster of two, two row blocks": (130, 136, 150, 440, 224, 2, 1, 1),
    "stages again and again, two passes": (130, 328, 140, 1000, 256, 2, 2, 1),
    "clusters share the rows": (300, 64, 330, 1000, 256, 4, 1, 2),
    "no images": (0, 8, 5, 40, 224, 1, 1, 1),
    "nothing else": (129, 8, 129, 256, 256, 1, 1, 1),
}


@pytest.mark.parametrize("name", RUNS)
def test_the_kernel(host, name):
    """Small integers, so that every product is exact, in whatever order it is added up."""
    images, depth, tokens, columns, *plan = RUNS[name]
    rng = np.random.default_rng(images + tokens)
    features, weight, bias = (
        rng.integers(-4, 5, shape).astype(np.float32)
        for shape in ((images, depth), (columns, depth), (columns,))
    )
    text, norm_weight = rng.normal(size=(tokens, columns)), rng.normal(size=columns)
    positions = rng.permutation(tokens)[:images].astype(np.int64)
    inputs = [bf16(x) for x in (features, weight, bias, text)]
    new_hidden, normed = (np.full((tokens, columns), 0xFFFF, np.uint16) for _ in range(2))
    rstd = np.full(tokens, np.nan, np.float32)
    failed = host.project(
        *inputs, positions, bf16(norm_weight), images, depth, tokens, columns,
        np.array(plan, np.int32), EPS, len(name), new_hidden, normed, rstd,
    )  # fmt: skip
    assert not failed
    expected = inputs[3].copy()
    expected[positions] = bf16(features @ weight.T + bias)
    assert (new_hidden == expected).all()
    exact = wide(expected).astype(np.float64)
    inverse = 1 / np.sqrt((exact**2).mean(1) + EPS)
    np.testing.assert_allclose(rstd, inverse, rtol=1e-5)
    result = exact * inverse[:, None] * wide(bf16(norm_weight))
    np.testing.assert_allclose(wide(normed), result, rtol=2.0**-8)
