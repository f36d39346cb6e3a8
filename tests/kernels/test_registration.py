"""Every operation is registered: opcheck, torch.compile, export, fake and meta tensors."""

import sys
from contextlib import contextmanager

import mmalign_kernels
import pytest
import torch
from mmalign_kernels import dispatch
from mmalign_kernels.operation import Operation
from torch._subclasses.fake_tensor import FakeTensorMode

from .packed_samples import offsets, positions, rotary_table

LENGTHS = [3, 1, 5, 5]
TOKENS = sum(LENGTHS)


def operations() -> dict[str, Operation]:
    """Of every family: the package imports them all."""
    modules = [sys.modules[name] for name in sys.modules if name.startswith("mmalign_kernels.")]
    members = (value for module in modules for value in vars(module).values())
    return {value.name: value for value in members if isinstance(value, Operation)}


def rand(*shape, dtype=torch.float32):
    return torch.randn(shape, dtype=dtype, requires_grad=True)


def arguments() -> dict[str, list[tuple]]:
    """Sample arguments of every registered operation, by name."""
    ids, rows = torch.tensor([1, -100, 4, 0]), torch.tensor([2, 0, 2])
    packed = (offsets(LENGTHS), max(LENGTHS))
    rotary = (*rotary_table(16, 4), positions(LENGTHS), *packed, 4, 2, True)
    bounds = offsets(LENGTHS, "cpu")  # every segment sees itself alone
    segments = (*rotary[:3], bounds, max(LENGTHS), bounds[:-1], bounds[1:])
    spans = torch.arange(len(LENGTHS) + 1, device="cpu")
    caches = (torch.rand(TOKENS, 2, 4), torch.rand(TOKENS, 2, 4))
    prefix = (torch.rand(3, 2, 4), torch.rand(3, 2, 4))
    projected = (rand(3, 5), rand(8, 5), rand(8), rand(6, 8), torch.tensor([1, 2, 5]), rand(8))
    feature_grads = (rand(6, 8), rand(6, 8))
    states = [[torch.rand(5) for _ in range(2)] for _ in range(4)]
    bf16_state = [[torch.rand(5).bfloat16()], *([torch.rand(5)] for _ in range(3))]
    remainder = torch.zeros(5, dtype=torch.int16)
    codes = [[torch.zeros(5, dtype=torch.uint8)] for _ in range(2)]
    settings = (1, 1e-3, 0.9, 0.999, 1e-8, 0.1)
    samples = {
        "rms_norm_fwd": [(rand(6, 8), rand(8), 1e-5)],
        "add_rms_norm_fwd": [(rand(6, 8), rand(6, 8), rand(8), 1e-5)],
        "rms_norm_bwd": [
            (rand(6, 8), None, rand(6, 8), rand(8), rand(6, 1), True),
            (rand(6, 8), rand(6, 8), rand(6, 8), rand(8), rand(6, 1), False),
        ],
        "project_image_features_fwd": [(*projected, 1e-5)],
        "project_image_features_bwd": [
            (*projected[:2], *projected[3:], rand(6, 1), *grads, needs)
            for grads, needs in (
                (feature_grads, [True] * 5),
                ((None, feature_grads[1]), [False, True, True, False, False]),
            )
        ],
        "rotary_attention_fwd": [(rand(TOKENS, 32), *rotary)],
        "rotary_attention_bwd": [
            (rand(TOKENS, 16), rand(TOKENS, 32), rand(TOKENS, 16), rand(TOKENS, 4), *rotary)
        ],
        "full_attention_fwd": [(rand(TOKENS, 24), *packed, 2)],
        "full_attention_bwd": [
            (rand(TOKENS, 8), rand(TOKENS, 24), rand(TOKENS, 8), rand(TOKENS, 2), *packed, 2)
        ],
        "prefix_attention_update": [
            (torch.rand(TOKENS, 32), *segments, spans, *caches, 4),
        ],
        "shared_prefix_attention_fwd": [(rand(TOKENS, 32), *rotary[:5], *prefix, 4)],
        "shared_prefix_attention_bwd": [
            (
                *(rand(TOKENS, 16), rand(TOKENS, 32), rand(TOKENS, 16), rand(TOKENS, 4)),
                *(*rotary[:4], *prefix, max(LENGTHS), 4),
            )
        ],
        "swiglu_fwd": [(rand(5, 6),)],
        "swiglu_bwd": [(rand(5, 3), rand(5, 6))],
        "swiglu_bwd_in_place": [(torch.rand(5, 3), torch.rand(5, 6))],
        "linear_cross_entropy_fwd": [
            (rand(4, 8), rand(11, 8), ids, *needs) for needs in ((True, True), (True, False))
        ],
        "linear_cross_entropy_bwd": [(rand(4, 8), rand(11, 8), rand())],
        "target_logprobs_fwd": [
            (rand(4, 8), rand(11, 8), rows, rows),
            (rand(3, 8), rand(11, 8), rows, None),
        ],
        "target_logprobs_bwd": [(rand(3), rand(4, 8), rand(11, 8), rows, rows)],
        "pack_rows_fwd": [(rand(4, 3), rows)],
        "pack_rows_bwd": [(rand(3, 3), rows, 4)],
        "unpack_rows_fwd": [(rand(2, 3), rows[:2], 4)],
        "unpack_rows_bwd": [(rand(4, 3), rows)],
        "layer_norm_fwd": [(rand(6, 8), rand(8), rand(8), 1e-5)],
        "layer_norm_bwd": [(rand(6, 8), rand(6, 8), rand(8), 1e-5)],
        "quick_gelu_fwd": [(rand(6, 8),)],
        "quick_gelu_bwd": [(rand(6, 8), rand(6, 8))],
        "adamw_update": [
            (*states, [], [], [], None, *settings, None),
            (*bf16_state, [remainder], [], [], torch.tensor(0.5), *settings, None),
            (*bf16_state, [], [], [], None, *settings, 3),
            (*bf16_state[:2], *codes, [], [torch.zeros(1)], [torch.zeros(1)], None, *settings, 3),
        ],
    }
    for name, calls in samples.items():
        if name.endswith("_bwd"):  # they have no gradient of their own
            samples[name] = [
                tuple(x.detach() if isinstance(x, torch.Tensor) else x for x in call)
                for call in calls
            ]
    return samples


def test_every_operation_is_tested():
    assert arguments().keys() == operations().keys()


@pytest.mark.parametrize("name", sorted(operations()))
def test_opcheck(name):
    for sample in arguments()[name]:
        torch.library.opcheck(operations()[name].registered, sample)


@pytest.mark.parametrize("name", sorted(operations()))
def test_opcheck_in_half_precision(name):
    """Fake kernels must also promise the right types: bf16 rows, fp32 statistics."""
    if name == "adamw_update":
        pytest.skip("its samples are bf16 already")
    wide = {"cos", "sin", "rstd", "logsumexp", "grad_weight", "grad_loss"}
    registered = operations()[name].registered
    wide |= {"grad"} if name.startswith("target_logprobs") else set()
    names = [argument.name for argument in registered._opoverload._schema.arguments]
    for sample in arguments()[name]:
        sample = [
            x.detach().bfloat16().requires_grad_(x.requires_grad)
            if isinstance(x, torch.Tensor) and x.is_floating_point() and argument not in wide
            else x
            for argument, x in zip(names, sample, strict=True)
        ]
        torch.library.opcheck(registered, sample, test_utils=("test_schema", "test_faketensor"))


class Block(torch.nn.Module):
    """All differentiable operations in one small model."""

    def __init__(self):
        super().__init__()
        names = {"norm": (8,), "qkv": (16, 8), "gate_up": (12, 8), "down": (8, 6), "head": (11, 8)}
        for name, shape in names.items():
            setattr(self, name, torch.nn.Parameter(torch.randn(shape) / 2))
        self.weight, self.bias = (torch.nn.Parameter(torch.randn(s)) for s in ((8, 5), (8,)))
        cos, sin = rotary_table(16, 4)
        self.register_buffer("cos", cos)
        self.register_buffer("sin", sin)
        self.register_buffer("keys", torch.randn(3, 1, 4))
        self.register_buffer("values", torch.randn(3, 1, 4))

    def forward(self, images, hidden, rows, position_ids, cu_seqlens, targets):
        k = mmalign_kernels
        hidden = k.layer_norm(hidden, self.norm, self.bias, 1e-5)
        hidden, normed = k.project_image_features(
            images, self.weight, self.bias, hidden, rows, self.norm, 1e-5
        )
        heads = normed @ self.qkv.t()
        attended = k.rotary_attention(heads, self.cos, self.sin, position_ids, cu_seqlens, 5, 2, 1)
        attended = attended + k.shared_prefix_attention(
            heads, self.cos, self.sin, position_ids, cu_seqlens, 5, self.keys, self.values, 2
        )
        attended = attended + k.full_attention(normed.repeat(1, 3), cu_seqlens, 5, 2)
        normed, hidden = k.add_rms_norm(attended, hidden, self.norm, 1e-5)
        hidden = hidden + k.swiglu(normed @ self.gate_up.t()) @ self.down.t()
        hidden = k.quick_gelu(k.rms_norm(hidden, self.norm, 1e-5))
        some = k.unpack_rows(k.pack_rows(hidden, rows), rows, hidden.shape[0])
        loss = k.linear_cross_entropy(hidden + some, self.head, targets)
        return loss, k.target_logprobs(hidden, self.head, targets.clamp(min=0))


def block_inputs(lengths):
    num_tokens = sum(lengths)
    targets = torch.arange(num_tokens) % 11
    targets[::3] = -100
    return (
        torch.randn(3, 5),
        torch.randn(num_tokens, 8),
        torch.tensor([1, 2, 4]),
        positions(lengths),
        offsets(lengths),
        targets,
    )


@pytest.mark.parametrize("dynamic", (False, True))
def test_compiled_equals_eager(dynamic):
    block = Block()
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for lengths in (LENGTHS, [2, 5, 2, 1]):
        inputs = block_inputs(lengths)
        found = []
        for model in (block, compiled):
            loss, logprobs = model(*inputs)
            grads = torch.autograd.grad(loss / 7 + logprobs.sum(), list(block.parameters()))
            found.append((loss, logprobs, *grads))
        for eager, traced in zip(*found, strict=True):
            torch.testing.assert_close(traced, eager)


def test_export_sees_the_operations():
    block = Block()
    program = torch.export.export(block, block_inputs(LENGTHS))
    seen = {str(node.target) for node in program.graph.nodes if "mmalign" in str(node.target)}
    expected = {name for name in operations() if name.endswith("_fwd")}
    assert seen == {f"mmalign.{name}.default" for name in expected}
    inputs = block_inputs(LENGTHS)
    torch.testing.assert_close(program.module()(*inputs), block(*inputs))


def test_shapes_without_data():
    """Fake and meta tensors run no kernel: memory planning of models that do not fit."""
    inputs = block_inputs(LENGTHS)
    with torch.device("meta"):
        loss, logprobs = Block()(*(x.to("meta") for x in inputs))
    assert loss.is_meta and loss.shape == () and logprobs.shape == (TOKENS,)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        block = Block()
        loss, logprobs = block(*(mode.from_tensor(x) for x in inputs))
        loss.backward()
    assert block.head.grad.shape == (11, 8)


@pytest.mark.parametrize("backend", ("reference",), indirect=True)
@pytest.mark.parametrize("current, expected", ((0, 1), (1, 1)))
def test_kernels_are_launched_on_the_tensors_device(current, expected, monkeypatch):
    """A GPU that is not the current one; fake tensors stand for its tensors."""
    devices = [current]

    @contextmanager
    def device(other):
        devices.append(other.index)
        yield
        devices.pop()

    monkeypatch.setattr(torch.cuda, "current_device", lambda: devices[-1])
    monkeypatch.setattr(torch.cuda, "device", device)
    seen = []
    monkeypatch.setattr(dispatch, "implementation", lambda *_: lambda *_: seen.append(devices[-1]))
    with FakeTensorMode():
        operations()["rms_norm_fwd"].run(torch.empty(2, 8, device="cuda:1"))
    assert seen == [expected] and devices == [current]
