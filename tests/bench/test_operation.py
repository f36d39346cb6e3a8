"""The check before the timing: a variant that computes something else is refused."""

from types import SimpleNamespace

import pytest
import torch
from mmalign_kernels import dispatch
from mmalign_kernels.costs import Cost, Passes

from bench.comparison import COPY, CannotRun, WrongResult
from bench.operation import ALL, Case, Operation, costs_of
from bench.peers import Layout, Variant, ours
from bench.shapes import activations

ROWS = 8


def square(inputs):
    return inputs.x * inputs.x


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0]  # a factor of 2 is missing


def _overwrites(inputs):
    """As some libraries do: the backward pass leaves the gradient in the input."""
    inputs.x.register_hook(lambda grad: inputs.x.data.copy_(grad))
    return square(inputs)


def _refuse(inputs):
    raise RuntimeError("head_dim 100 is not supported")


TRANSPOSED = Layout(
    ("columns",),
    lambda inputs: SimpleNamespace(columns=inputs.x.t().contiguous()),
    lambda inputs, output: output.t(),
)
EAGER = Variant("torch eager", square)


def comparisons(*variants: Variant):
    def make():
        return SimpleNamespace(x=activations(ROWS, 4))

    cost = Cost(100, 10, 100, 10)
    case = Case("8 rows", make, ("x",), costs_of(Passes(cost, cost)))
    operation = Operation("square", variants, EAGER, COPY)
    return dict(zip(ALL, operation.comparisons([case]), strict=True))


@pytest.mark.parametrize(
    ("function", "what"),
    [
        (lambda inputs: square(inputs) * 1.1, "output 0"),
        (lambda inputs: square(inputs) * float("nan"), "output 0"),
        (lambda inputs: square(inputs)[:-1], "shape"),
        (lambda inputs: WrongGradient.apply(inputs.x), "gradient of x"),
    ],
)
def test_a_wrong_variant_is_refused_in_every_direction(function, what):
    for comparison in comparisons(Variant("other", function)).values():
        with pytest.raises(WrongResult, match=what) as raised:
            comparison.calls(["other"])
        assert raised.value.variant == "other"


@pytest.mark.parametrize(
    ("name", "error"), [("library", CannotRun), ("mmalign triton", WrongResult)]
)
def test_what_a_library_refuses_is_skipped_but_what_we_refuse_fails(name, error):
    with pytest.raises(error, match="RuntimeError: head_dim 100"):
        comparisons(Variant(name, _refuse))["forward"].calls([name])


def test_every_direction_runs_what_it_says():
    found = comparisons(EAGER, Variant("columns", lambda i: i.columns**2, layout=TRANSPOSED))
    names = ["torch eager", "columns"]
    outputs = found["forward"].calls(names).calls
    forward = {name: call() for name, call in outputs.items()}
    torch.testing.assert_close(forward["columns"].t(), forward["torch eager"])
    for direction in ("backward", "both"):
        work = found[direction].calls(names)
        grads = {name: work.calls[name](work.prepare[name]())[0] for name in names}
        torch.testing.assert_close(grads["columns"].t(), grads["torch eager"])


def test_data_that_a_backward_pass_overwrites_is_made_anew():
    work = comparisons(Variant("overwrites", _overwrites))["both"].calls(["overwrites"])
    call, prepare = work.calls["overwrites"], work.prepare["overwrites"]
    first, second = (call(prepare())[0].clone() for _ in range(2))
    torch.testing.assert_close(first, second)


def test_the_check_sees_the_backend_that_is_forced():
    seen = []

    def function(inputs):
        seen.append(dispatch.forced_backend())
        return square(inputs)

    variants = ours("swiglu", function)
    comparisons(*variants)["forward"].calls(["mmalign reference"])
    assert seen == ["reference"]


def test_figures_are_of_comparable_variants():
    figures = comparisons(EAGER)["both"].figures("torch eager", 1.0)
    assert figures == {"bytes": 200, "flops": 20, "bound": "copy"}
    other = Variant("other bytes", square, comparable=False)
    assert comparisons(other)["both"].figures("other bytes", 1.0) == {}


def test_a_variant_is_verified_once_for_all_directions():
    seen = []
    function = lambda inputs: (seen.append(1), square(inputs))[1]  # noqa: E731
    found = comparisons(Variant("counted", function))
    for comparison in found.values():
        comparison.calls(["counted"])
    assert len(seen) == 1
