"""Rotary attention of csrc/: its scheduling and its whole block on the host, its machine code, its
arguments. What a GPU computes is in test_rotary_attention_on_gpu.py."""

from collections import Counter
from itertools import groupby

import numpy as np
import pytest
import torch
from mmalign_kernels.cuda import library as cuda_library
from mmalign_kernels.cuda import rotary_attention as rotary_cuda
from torch._subclasses.fake_tensor import FakeTensorMode

from csrc.build import ARCHITECTURES
from tests.kernels.accuracy import RATIOS
from tests.kernels.packed_samples import rotary_table
from tests.kernels.test_attention import Case

from . import machine_code
from .host_library import HostLibrary
from .machine_code import count

TILE = 128  # rows of queries and of keys
LENGTHS = {
    "one token each": [1] * 40,
    "ragged": [199, 1, 512, 0, 128, 129, 700, 127, 3, 0],
    "long beside short": [20] * 5 + [40_000] + [20] * 5,
    "nothing": [0, 0],
}
HEADS = ((32, 32, 128), (32, 8, 128), (6, 3, 64))  # heads, key heads, head_dim


@pytest.fixture(scope="module")
def host(host_library_file):
    return HostLibrary(host_library_file)


def bounds_of(lengths):
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)


def scheduled_items(host, lengths, heads, causal):
    """(num_items, 5): first row and length of the sample, tile, head, tiles of keys."""
    start = (bounds_of(lengths), len(lengths), *heads, causal)
    items = np.full((host.attention_items(*start, None), 5), -1, np.int32)
    host.attention_items(*start, items)
    return items


@pytest.mark.parametrize("causal", (True, False))
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("name", LENGTHS)
def test_every_tile_of_every_head_once(host, name, heads, causal):
    lengths = LENGTHS[name]
    expected = {
        (int(first), length, tile, head, tile + 1 if causal else -(-length // TILE))
        for first, length in zip(bounds_of(lengths), lengths, strict=False)
        for tile in range(-(-length // TILE))
        for head in range(heads[0])
    }
    items = scheduled_items(host, lengths, heads, causal)
    assert len(items) == len(expected) and set(map(tuple, items.tolist())) == expected


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("name", ("ragged", "long beside short"))
def test_longest_first_and_keys_that_fit_into_the_cache(host, name, heads):
    lengths, (num_heads, num_key_heads, head_dim) = LENGTHS[name], heads
    items = scheduled_items(host, lengths, heads, True)
    assert (np.diff(items[:, 1]) <= 0).all()  # samples from long to short
    for first in np.unique(items[:, 0]):
        sample = items[items[:, 0] == first]
        cuts = np.flatnonzero(np.diff(sample[:, 2]) > 0) + 1  # tiles rise: the next heads
        for run in np.split(sample, cuts):
            assert (np.diff(run[:, 2]) <= 0).all()
            key_heads = len(np.unique(run[:, 3] // (num_heads // num_key_heads)))
            held = key_heads * run[0, 1] * head_dim * 4  # bytes of keys and values
            assert key_heads == 1 or held <= 24 << 20
            assert len(np.unique(run[:, 3])) % (num_heads // num_key_heads) == 0


@pytest.mark.parametrize(
    "lengths", ([300 + 37 * i for i in range(24)], [4096] * 2, LENGTHS["long beside short"])
)
def test_workers_that_draw_items_share_the_work(host, lengths):
    """Whoever is free takes the next: the busiest has hardly more than an even share."""
    cost = scheduled_items(host, lengths, (32, 32, 128), True)[:, 4]
    busy = np.zeros(132)
    for item in cost:
        busy[busy.argmin()] += item
    assert busy.max() <= 1.01 * busy.mean()


def bf16(x):
    bits = torch.from_numpy(np.ascontiguousarray(x, np.float32)).bfloat16().view(torch.int16)
    return bits.numpy().view(np.uint16)


def from_bits(bits):
    return torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)


def run_block(host, case, num_workers=1, seed=0):
    """The kernel's threads on the host: out (total_tokens, columns) bf16 and logsumexp."""
    qkv = bf16(case.qkv.detach().numpy())
    bounds, num_tokens = bounds_of(case.lengths), len(qkv)
    out = np.full((num_tokens, case.num_heads * case.head_dim), 0x7FC0, np.uint16)  # NaN
    logsumexp = np.full((num_tokens, case.num_heads), np.nan, np.float32)
    tables = (case.cos.numpy(), case.sin.numpy(), case.position_ids.int().numpy(), bounds)
    sizes = (num_tokens, len(case.lengths), case.num_heads, case.num_kv, case.head_dim)
    failed = host.attention(qkv, *tables, *sizes, case.causal, num_workers, seed, out, logsumexp)
    assert not failed
    return from_bits(out), torch.from_numpy(logsumexp)


def true_logsumexp(case, qkv):
    """In fp64, with the rotation spelled as complex numbers."""
    x = qkv.detach().double().unflatten(1, (-1, 2, case.head_dim // 2))
    angles = torch.complex(case.cos.double(), case.sin.double())[case.position_ids.long()]
    rotated = torch.complex(x[:, :, 0], x[:, :, 1]) * angles[:, None]
    found = []
    for rows in rotated.split(case.lengths):
        q, k = rows[:, : case.num_heads], rows[:, case.num_heads : case.num_heads + case.num_kv]
        k = k.repeat_interleave(case.num_heads // case.num_kv, 1)
        scores = torch.einsum("qhd,khd->hqk", q, k.conj()).real / case.head_dim**0.5
        if case.causal:
            hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
            scores = scores.masked_fill(hidden, -torch.inf)
        found.append(scores.logsumexp(2).T)
    return torch.cat(found)


@pytest.mark.parametrize(
    ("lengths", "heads", "causal", "num_workers"),
    [  # one token, nothing, one row less and more than a tile; more tiles than stages
        ([1, 37, 0, 127, 129, 128, 1], (2, 1, 128), True, 2),
        ([520], (1, 1, 128), True, 1),
        ([800, 130], (1, 1, 64), True, 1),
        ([1, 300, 256], (2, 2, 128), False, 2),
        ([5, 650], (2, 1, 64), False, 1),
    ],
)
def test_block_is_attention(host, lengths, heads, causal, num_workers):
    """Load, rotate and multiply threads in a random order, against transformers in fp64."""
    torch.manual_seed(0)
    case = Case(lengths, heads, causal)
    case.qkv = case.qkv.bfloat16().float()
    case.position_ids = case.position_ids + torch.arange(len(case.qkv)) % 2  # any positions
    out, logsumexp = run_block(host, case, num_workers)
    expected = case.hugging_face(case.qkv.detach().double())
    error = (out.double() - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert error <= RATIOS[torch.bfloat16] / 2
    wanted = true_logsumexp(case, case.qkv)
    assert (logsumexp - wanted).square().mean().sqrt() <= 4e-3 * wanted.square().mean().sqrt()
    again = run_block(host, case, 3, seed=1)  # other workers in another order: the same bits
    assert torch.equal(out.view(torch.int16), again[0].view(torch.int16))
    assert torch.equal(logsumexp, again[1])


def test_block_keeps_samples_apart(host):
    """NaN in a sample reaches neither the one before it nor the one after it."""
    torch.manual_seed(0)
    lengths = [130, 90, 61]
    case = Case(lengths, (2, 1, 64), True)
    clean, _ = run_block(host, case)
    case.qkv = case.qkv.detach().clone()
    case.qkv[130:220] = torch.nan
    found, _ = run_block(host, case)
    assert torch.equal(found[:130], clean[:130]) and torch.equal(found[220:], clean[220:])
    assert found[130:220].isnan().all()


# -- the library


@pytest.fixture
def library(cuda_library_file, monkeypatch):
    monkeypatch.setenv("MMALIGN_CUDA_LIBRARY", str(cuda_library_file))
    cuda_library.load()
    return cuda_library_file


KERNELS = [(t, d) for t in ("__half", "__nv_bfloat16") for d in (64, 128)]


def test_no_stack_no_spills(cuda_library_file):
    names = ("rotate_keys_kernel", "rotary_attention_kernel")
    kernels = [x for x in machine_code.kernels(cuda_library_file) if x.name.startswith(names)]
    assert len(kernels) == 2 * len(KERNELS) * len(ARCHITECTURES)
    assert not [x for x in kernels if x.stack_bytes or x.local_bytes]
    # Warpgroups hand registers over: 72 + 2 * 216 can not exceed 3 * what the launch gives.
    hopper = [x for x in kernels if "rotary" in x.name and x.architecture == "sm_90a"]
    assert len(hopper) == len(KERNELS) and all(x.registers == 168 for x in hopper)


@pytest.fixture(scope="module")
def hopper(cuda_library_file):
    return machine_code.programs(cuda_library_file, "sm_90a")


@pytest.mark.parametrize(("name", "head_dim"), KERNELS)
def test_hopper_instructions(hopper, name, head_dim):
    opcodes = Counter(hopper[f"rotary_attention_kernel<{name}, {head_dim}>"])
    steps = {
        "keys": 2 * head_dim // 16,
        "values": 2 * TILE // 16,
    }  # before or after, and in, a loop
    if head_dim == 64:
        assert count(opcodes, "HGMMA", "64x64x16") == steps["values"]
        assert count(opcodes, "HGMMA", "64x128x16") == steps["keys"]
    else:
        assert count(opcodes, "HGMMA", "64x128x16") == sum(steps.values())
    assert count(opcodes, "UTMALDG") == head_dim // 64 * 4  # queries at two places, keys, values
    assert count(opcodes, "USETMAXREG") == 2
    assert count(opcodes, "LDL") + count(opcodes, "STL") == 0
    assert count(opcodes, "STG", "128") == 2 * head_dim // 32
    keys = Counter(hopper[f"rotate_keys_kernel<{name}, {head_dim}>"])
    assert count(keys, "LDG", "128") >= 4 + 2 * 8 and count(keys, "STG", "128") >= 2 * 8


@pytest.mark.parametrize(("name", "head_dim"), KERNELS)
def test_softmax_while_products_are_under_way(hopper, name, head_dim):
    """In the loop: both products, the wait for the first, all powers, the wait for the second."""
    opcodes = hopper[f"rotary_attention_kernel<{name}, {head_dim}>"]
    kinds = {"HGMMA": "product", "WARPGROUP.DEPBAR": "wait", "MUFU.EX2": "power"}
    events = [kinds[x] for opcode in opcodes for x in kinds if opcode.startswith(x)]
    order = [(kind, len(list(run))) for kind, run in groupby(events)]
    keys, powers = head_dim // 16, TILE // 2 + 2  # of a thread: 64 columns of 2 rows, 2 shrinks
    first = [("product", keys), ("wait", 1), ("power", powers)]
    loop = [("product", keys + TILE // 16), ("wait", 1), ("power", powers), ("wait", 1)]
    assert order == [*first, *loop, ("product", TILE // 16), ("wait", 1)]


def arguments(num_tokens=6, heads=(4, 2, 64), dtype=torch.bfloat16, **changes):
    num_heads, num_kv, head_dim = heads
    cos, sin = rotary_table(16, head_dim)
    whole = {
        "qkv": torch.ones(num_tokens, (num_heads + 2 * num_kv) * head_dim, dtype=dtype),
        "cos": cos,
        "sin": sin,
        "position_ids": torch.zeros(num_tokens, dtype=torch.int32),
        "cu_seqlens": torch.tensor([0, num_tokens], dtype=torch.int32),
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv,
        "causal": True,
    }
    return whole | changes


def test_schema_has_the_arguments_of_the_operation(library):
    schema = torch.ops.mmalign_cuda.rotary_attention_fwd.default._schema
    function = rotary_cuda.rotary_attention_fwd.__code__
    names = list(function.co_varnames[: function.co_argcount])
    names.remove("max_seqlen")
    assert [x.name for x in schema.arguments] == names


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_fake_promises_what_the_family_declares(library, dtype):
    with FakeTensorMode(), torch.device("cuda"):
        call = arguments(dtype=dtype)
        found = cuda_library.operation("rotary_attention_fwd")(**call)
        declared = torch.ops.mmalign.rotary_attention_fwd(max_seqlen=6, **call)
        for ours, theirs in zip(found, declared, strict=True):
            assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
            assert ours.device == theirs.device


@pytest.mark.parametrize(
    ("words", "changes"),
    [
        ("qkv is not on a CUDA device", {}),
        ("qkv is Float, expected BFloat16 or Half", {"dtype": torch.float32}),
        (r"qkv has shape \(3,\), expected 2 dim", {"qkv": torch.ones(3).half()}),
        (r"qkv of shape .* is not contiguous", {"qkv": torch.ones(512, 6).bfloat16().t()}),
        ("qkv has 800 columns for 8 heads, expected 64 or 128.*triton", {"heads": (4, 2, 100)}),
        ("qkv has 514 columns", {"qkv": torch.ones(6, 514).bfloat16()}),
        ("3 heads do not share 2 key heads", {"num_attention_heads": 3}),
        ("4 heads do not share 0 key heads", {"num_key_value_heads": 0}),
        (r"cos has shape \(16, 31\), expected \(16, 32\) beside", {"cos": torch.ones(16, 31)}),
        ("cos is BFloat16, expected Float", {"cos": torch.ones(16, 32).bfloat16()}),
        (r"sin has shape \(15, 32\), expected \(16, 32\)", {"sin": torch.ones(15, 32)}),
        ("sin of shape .* is not contiguous", {"sin": torch.ones(32, 16).t()}),
        (r"position_ids has shape \(5,\)", {"position_ids": torch.zeros(5).int()}),
        ("position_ids is Long, expected Int", {"position_ids": torch.zeros(6).long()}),
        ("cu_seqlens is Long, expected Int", {"cu_seqlens": torch.tensor([0, 6])}),
        (r"cu_seqlens has shape \(1, 2\)", {"cu_seqlens": torch.tensor([[0, 6]]).int()}),
    ],
)
def test_wrong_arguments(library, words, changes):
    with pytest.raises(RuntimeError, match=f"rotary_attention_fwd: {words}"):
        cuda_library.operation("rotary_attention_fwd")(**arguments(**changes))
