"""The byte and FLOP counts against the tensors of launches and torch's FLOP counter."""

import pytest
import torch
import torch.nn.functional as F
from codegen.compiler import pretend
from mmalign_kernels import costs
from mmalign_kernels.costs.cost import H100
from mmalign_kernels.triton import layer_norm, packing, quick_gelu, rms_norm, swiglu
from torch.utils.flop_counter import FlopCounterMode

ROWS, COLUMNS = 1000, 4096


@pytest.fixture
def backend():
    """Nothing runs here, so nothing runs once per backend."""


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


@pytest.fixture
def touched(monkeypatch):
    """Bytes of the tensors that a function's launches take, each tensor once per launch."""

    def count(run) -> int:
        total = 0

        def record(self, *args, **options):
            nonlocal total
            tensors = {id(x): x for x in args if isinstance(x, torch.Tensor)}
            total += sum(x.numel() * x.element_size() for x in tensors.values())

        monkeypatch.setattr(type(rms_norm._rms_norm_fwd_kernel), "run", record)
        with pretend(H100):
            run()
        return total

    return count


X, WEIGHT, RSTD = meta(ROWS, COLUMNS), meta(COLUMNS), meta(ROWS, 1, dtype=torch.float32)
GATE_UP, INDEX = meta(ROWS, 2 * COLUMNS), meta(ROWS, dtype=torch.int64)
SIZE = ROWS, COLUMNS, 2
LAUNCHES = {
    "rms_norm": (
        lambda: rms_norm.rms_norm_fwd(X, WEIGHT, 1e-5),
        costs.rms_norm(*SIZE).forward,
    ),
    "add_rms_norm": (
        lambda: rms_norm.add_rms_norm_fwd(X, meta(*X.shape), WEIGHT, 1e-5),
        costs.add_rms_norm(*SIZE).forward,
    ),
    "rms_norm backward": (
        lambda: rms_norm.rms_norm_bwd(X, None, meta(*X.shape), WEIGHT, RSTD, True),
        costs.rms_norm(*SIZE).backward,
    ),
    "add_rms_norm backward, frozen": (
        lambda: rms_norm.rms_norm_bwd(X, meta(*X.shape), meta(*X.shape), WEIGHT, RSTD, False),
        costs.add_rms_norm(*SIZE, needs_weight=False).backward,
    ),
    "swiglu": (
        lambda: swiglu.swiglu_fwd(GATE_UP),
        costs.swiglu(*SIZE).forward,
    ),
    "swiglu backward": (
        lambda: swiglu.swiglu_bwd(X, GATE_UP),
        costs.swiglu(*SIZE).backward,
    ),
    "layer_norm": (
        lambda: layer_norm.layer_norm_fwd(X, WEIGHT, meta(COLUMNS), 1e-5),
        costs.layer_norm(*SIZE).forward,
    ),
    "layer_norm backward": (
        lambda: layer_norm.layer_norm_bwd(X, meta(*X.shape), WEIGHT, 1e-5),
        costs.layer_norm(*SIZE).backward,
    ),
    "quick_gelu": (lambda: quick_gelu.quick_gelu_fwd(X), costs.quick_gelu(X.numel(), 2).forward),
    "quick_gelu backward": (
        lambda: quick_gelu.quick_gelu_bwd(X, meta(*X.shape)),
        costs.quick_gelu(X.numel(), 2).backward,
    ),
    "pack_rows": (
        lambda: packing.pack_rows_fwd(X, INDEX),
        costs.pack_rows(ROWS, *SIZE).forward,
    ),
    "unpack_rows backward": (
        lambda: packing.unpack_rows_bwd(X, INDEX),
        costs.unpack_rows(ROWS, *SIZE).backward,
    ),
}


@pytest.mark.parametrize("name", LAUNCHES)
def test_moved_bytes_are_what_launches_touch(name, touched):
    run, cost = LAUNCHES[name]
    assert cost.moved_bytes == touched(run)
    assert cost.bytes <= cost.moved_bytes


def counted(run) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def test_products_are_what_torch_counts():
    hidden, weight = meta(7, 64).requires_grad_(), meta(100, 64).requires_grad_()
    size = 20, 7, 64, 100, 2  # 13 rows are not supervised
    targets = meta(7, dtype=torch.int64)
    both = costs.linear_cross_entropy(*size).both
    loss = lambda: F.cross_entropy(hidden @ weight.t(), targets)  # noqa: E731
    assert both.flops == both.done_flops == counted(lambda: loss().backward())
    scored = costs.target_logprobs(7, 9, 64, 100, 2)
    assert scored.flops == counted(loss)


def test_attention_is_what_torch_counts():
    lengths, heads, head_dim = (5, 130), 2, 64
    flops = sum(
        counted(lambda n=n: F.scaled_dot_product_attention(*(meta(1, heads, n, head_dim),) * 3))
        for n in lengths
    )
    cu_seqlens = [0, 5, 135]
    full = costs.full_attention(cu_seqlens, heads, head_dim, 2).forward
    assert full.flops == flops
    assert full.done_flops == 4 * heads * head_dim * (128 * 64 + 2 * 128 * 192)
    causal = costs.rotary_attention(cu_seqlens, heads, heads, head_dim, 2).forward
    assert causal.flops == 4 * heads * head_dim * torch.ones(130, 130).tril().sum() + (
        4 * heads * head_dim * torch.ones(5, 5).tril().sum()
    )
