"""Attention through spans of a cache, against dense masks in fp64."""

import pytest
import torch
from mmalign_kernels import prefix_attention, rotary_attention
from torch import Tensor

from .accuracy import compare
from .packed_samples import offsets, plain_attention, rotary_table

KEPT, SPARE = 70, 3  # cache rows before the new ones, and after them
LENGTHS = [40, 1, 17, 2, 33, 5, 130, 3]
PARENTS = [None, 0, 0, 2, 0, None, 5, 5]  # the segment that each one continues
KEPT_ROWS = [70, 70, 70, 70, 70, 0, 0, 0]  # of the cache that each one sees
HEADS = ((2, 2, 64), (4, 2, 100), (2, 1, 128), (3, 1, 16))
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Case:
    """A forest of segments behind a kept path; all spans are whole segments."""

    def __init__(self, heads=(2, 1, 16), lengths=LENGTHS, parents=PARENTS, kept_rows=KEPT_ROWS):
        self.num_heads, self.num_kv_heads, self.head_dim = heads
        self.lengths, self.bounds = lengths, offsets(lengths, "cpu")
        num_tokens, columns = sum(lengths), (self.num_heads + 2 * self.num_kv_heads)
        self.qkv = torch.randn(num_tokens, columns * self.head_dim) * 2
        cache = (KEPT + num_tokens + SPARE, self.num_kv_heads, self.head_dim)
        self.keys, self.values = torch.randn(cache) * 2, torch.randn(cache)
        pairs = zip(lengths, kept_rows, strict=True)
        position_ids = [i + kept for length, kept in pairs for i in range(length)]
        self.position_ids = torch.tensor(position_ids, dtype=torch.int32)
        self.cos, self.sin = rotary_table(256, self.head_dim)
        self.spans: list[list[tuple[int, int]]] = []
        starts = [KEPT + bound for bound in self.bounds.tolist()]
        for i, (parent, kept) in enumerate(zip(parents, kept_rows, strict=True)):
            before = self.spans[parent] if parent is not None else [(0, kept)] if kept else []
            self.spans.append([*before, (starts[i], starts[i + 1])])

    def ours(self, qkv: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        keys, values = keys.clone(), values.clone()
        begins, ends = zip(*(span for spans in self.spans for span in spans), strict=True)
        out = prefix_attention(
            qkv,
            self.cos,
            self.sin,
            self.position_ids,
            self.bounds,
            max(self.lengths),
            torch.tensor(begins, device="cpu"),
            torch.tensor(ends, device="cpu"),
            offsets([len(spans) for spans in self.spans], "cpu"),
            keys,
            values,
            self.num_heads,
        )
        return out, keys, values

    def dense(self, qkv: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotation as a complex product, a mask of all rows by all of the cache."""
        keys, values, angle = keys.clone(), values.clone(), self.position_ids.long()
        sizes = (self.num_heads, self.num_kv_heads, self.num_kv_heads)
        q, k, v = qkv.unflatten(1, (-1, self.head_dim)).split(sizes, 1)
        dtype = torch.promote_types(qkv.dtype, torch.float32)
        rotation = torch.complex(self.cos, self.sin)[angle].to(dtype.to_complex())[:, None]

        def rotated(x):
            rotated = torch.complex(*x.to(dtype).chunk(2, -1)) * rotation
            return torch.cat((rotated.real, rotated.imag), -1).to(x.dtype)

        q, k = rotated(q), rotated(k)
        for i, spans in enumerate(self.spans):
            rows = slice(*self.bounds[i : i + 2].tolist())
            own = slice(spans[-1][1] - self.lengths[i], spans[-1][1])
            keys[own], values[own] = k[rows], v[rows]
        heads = (x[None].transpose(1, 2) for x in (q, keys, values))
        mask = torch.zeros(len(qkv), len(keys), dtype=dtype).masked_fill_(
            ~self.visible(), torch.finfo(dtype).min
        )
        return plain_attention(*heads, mask.to(qkv.dtype)), keys, values

    def visible(self) -> Tensor:
        seen = torch.zeros(sum(self.lengths), len(self.keys), dtype=torch.bool)
        for i, (*whole, (begin, end)) in enumerate(self.spans):
            rows, length = slice(*self.bounds[i : i + 2].tolist()), self.lengths[i]
            for span in whole:
                seen[rows, slice(*span)] = True
            seen[rows, begin:end] = torch.ones(length, end - begin).tril(end - begin - length) > 0
        return seen

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.qkv, self.keys, self.values


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", HEADS)
def test_a_forest_behind_a_path(heads, dtype):
    case = Case(heads)
    compare(case.ours, case.dense, case.inputs, dtype)


def test_rows_that_are_not_seen_are_not_read():
    case = Case()
    expected, *_ = case.ours(*case.inputs)
    for x in (case.keys, case.values):
        x[KEPT:] = float("nan")  # the new rows are written before they are read, spare ones never
    assert torch.equal(case.ours(*case.inputs)[0], expected)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16))
def test_tokens_after_a_cache(dtype):
    """Generation: each sample continues its own rows of the cache, in one causal span."""
    case = Case(lengths=[1, 1, 4], parents=[None] * 3, kept_rows=[10, 0, 40])
    case.spans = [[(0, 11)], [(11, 12)], [(20, 64)]]
    compare(case.ours, case.dense, case.inputs, dtype)


def test_one_segment_equals_rotary_attention():
    case = Case(lengths=[300], parents=[None], kept_rows=[0])
    case.cos, case.sin = rotary_table(300, case.head_dim)
    expected = rotary_attention(
        case.qkv, case.cos, case.sin, case.position_ids, offsets([300]), 300, 2, 1
    )
    torch.testing.assert_close(case.ours(*case.inputs)[0], expected)


def test_in_two_calls_equals_in_one():
    """A segment and its child, the keys of the first call left in the cache."""
    whole = Case(lengths=[37, 50], parents=[None, 0], kept_rows=[0, 0])
    whole.position_ids[37:] += 37
    expected, keys, values = whole.ours(*whole.inputs)
    first = Case(lengths=[37], parents=[None], kept_rows=[0])
    second = Case(lengths=[50], parents=[None], kept_rows=[0])
    first.spans, second.spans = [[(KEPT, KEPT + 37)]], [[(KEPT, KEPT + 37), (107, 157)]]
    second.position_ids += 37
    out, found_keys, found_values = first.ours(whole.qkv[:37], whole.keys, whole.values)
    torch.testing.assert_close(out, expected[:37])
    out, found_keys, found_values = second.ours(whole.qkv[37:], found_keys, found_values)
    torch.testing.assert_close(out, expected[37:])
    assert torch.equal(found_keys, keys) and torch.equal(found_values, values)


def test_nothing():
    case = Case(lengths=[0], parents=[None], kept_rows=[0])
    assert case.ours(*case.inputs)[0].shape == (0, 32)


def test_bad_arguments():
    case = Case()
    with pytest.raises(ValueError, match="keys .* and 2 heads"):
        case.ours(case.qkv[:, :-1], case.keys, case.values)
    with pytest.raises(ValueError, match="values is torch.float64"):
        case.ours(case.qkv, case.keys, case.values.double())
    with pytest.raises(ValueError, match="must be contiguous"):
        prefix_attention(
            case.qkv, case.cos, case.sin, case.position_ids, case.bounds, 130, case.bounds[:-1],
            case.bounds[1:], offsets([1] * 8, "cpu"), case.keys.repeat(2, 1, 1)[::2],
            case.values, 2,
        )  # fmt: skip
    case.spans[3][-1] = (0, 1)
    with pytest.raises(ValueError, match="must end with the segment's own rows"):
        case.ours(*case.inputs)
    case.spans[3][-1] = (0, 1000)
    with pytest.raises(ValueError, match="must lie within the 304 rows"):
        case.ours(*case.inputs)
