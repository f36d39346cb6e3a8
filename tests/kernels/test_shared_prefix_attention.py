"""Attention after a shared prefix, against dense masks in fp64, forward and backward."""

import pytest
import torch
from mmalign_kernels import rotary_attention, shared_prefix_attention
from torch import Tensor

from .accuracy import assert_same_bits, compare
from .packed_samples import block_mask, offsets, plain_attention, positions, rotary_table

LENGTHS = [40, 1, 17, 70]
HEADS = ((2, 2, 64), (4, 2, 100), (2, 1, 128), (3, 1, 16))
DTYPES = (torch.float64, torch.float32, torch.bfloat16)


class Case:
    def __init__(self, heads=(3, 1, 16), lengths=LENGTHS, prefix_length=35):
        self.num_heads, self.num_kv_heads, self.head_dim = heads
        self.lengths, self.prefix_length = lengths, prefix_length
        columns = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        self.qkv = torch.randn(sum(lengths), columns, requires_grad=True)
        prefix = (prefix_length, self.num_kv_heads, self.head_dim)
        self.keys, self.values = torch.randn(prefix), torch.randn(prefix)
        self.cos, self.sin = rotary_table(256, self.head_dim)
        self.position_ids = positions(lengths) + prefix_length
        self.cu_seqlens, self.max_seqlen = offsets(lengths), max(lengths, default=0)

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.qkv, self.keys, self.values

    def ours(self, qkv: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return shared_prefix_attention(
            qkv, self.cos, self.sin, self.position_ids, self.cu_seqlens, self.max_seqlen,
            keys, values, self.num_heads,
        )  # fmt: skip

    def dense(self, qkv: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Rotation as a complex product; one matrix of all rows by prefix and all rows."""
        sizes = (self.num_heads, self.num_kv_heads, self.num_kv_heads)
        q, k, v = qkv.unflatten(1, (-1, self.head_dim)).split(sizes, 1)
        dtype = torch.promote_types(qkv.dtype, torch.float32)
        rotations = torch.complex(self.cos, self.sin)[self.position_ids.long()]
        rotations = rotations.to(dtype.to_complex())[:, None]

        def rotated(x):
            rotated = torch.complex(*x.to(dtype).chunk(2, -1)) * rotations
            return torch.cat((rotated.real, rotated.imag), -1).to(x.dtype)

        keys, values = torch.cat((keys, rotated(k))), torch.cat((values, v))
        own = block_mask(self.lengths, True, qkv.dtype)[0, 0]
        mask = torch.cat((own.new_zeros(len(own), self.prefix_length), own), 1)
        return plain_attention(*(x[None].transpose(1, 2) for x in (rotated(q), keys, values)), mask)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", HEADS)
def test_equals_dense_attention(heads, dtype):
    case = Case(heads)
    compare(case.ours, case.dense, case.inputs, dtype)


@pytest.mark.parametrize("prefix_length", (1, 64, 130))
def test_prefixes_of_any_length(prefix_length):
    case = Case(prefix_length=prefix_length)
    compare(case.ours, case.dense, case.inputs, torch.float32)


def test_equals_whole_samples():
    """The rows after the prefix, as if every sample carried it; gradients of these rows too."""
    case, length = Case(), 35
    heads = (case.num_heads, case.num_kv_heads)
    prefix = torch.randn(length, case.qkv.shape[1])
    rotated = rotated_keys(case, prefix)
    values = prefix.unflatten(1, (-1, case.head_dim))[:, -case.num_kv_heads :]
    whole = [length + n for n in LENGTHS]
    rows = torch.cat([torch.arange(n) >= length for n in whole])

    def plain(qkv):
        packed = torch.cat([torch.cat((prefix, x)) for x in qkv.split(LENGTHS)])
        attended = rotary_attention(
            packed, case.cos, case.sin, positions(whole), offsets(whole), max(whole), *heads
        )
        return attended[rows]

    compare(lambda qkv: case.ours(qkv, rotated, values), plain, (case.qkv,), torch.float32)


def rotated_keys(case: Case, prefix: Tensor) -> Tensor:
    keys = prefix.unflatten(1, (-1, case.head_dim))[:, case.num_heads : -case.num_kv_heads]
    first, second = keys.chunk(2, -1)
    cos, sin = case.cos[: len(prefix), None], case.sin[: len(prefix), None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def test_without_prefix_it_is_rotary_attention():
    case = Case(prefix_length=0)
    heads = (case.num_heads, case.num_kv_heads)
    plain = rotary_attention(
        case.qkv, case.cos, case.sin, case.position_ids, case.cu_seqlens, case.max_seqlen, *heads
    )
    assert torch.equal(case.ours(*case.inputs), plain)


def test_no_tokens():
    case = Case(lengths=[])
    out = case.ours(*case.inputs)
    assert out.shape == (0, case.num_heads * case.head_dim)
    out.sum().backward()
    assert case.qkv.grad.shape == case.qkv.shape


def test_same_bits():
    case = Case()
    assert_same_bits(case.ours, case.inputs)


def test_what_does_not_fit_is_refused():
    case = Case()
    qkv, keys, values = case.inputs
    with pytest.raises(ValueError, match="qkv has shape"):
        case.ours(qkv[:, 1:], keys, values)
    with pytest.raises(ValueError, match="prefix_values has shape"):
        case.ours(qkv, keys, values[1:])
    with pytest.raises(ValueError, match="constant"):
        case.ours(qkv, keys.clone().requires_grad_(), values)
