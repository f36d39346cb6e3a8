"""A step of AdamW on the parameters of one decoder layer, in the three ways to keep weights.

Variants with other state (bf16 or 8-bit moments, a whole fp32 master) move other bytes: they have a
time, but no rate.
"""

from collections.abc import Callable
from types import SimpleNamespace

import torch
from mmalign_kernels import adamw_step, costs
from mmalign_kernels.adamw import join_master, split_master
from torch import Tensor

from bench.comparison import COPY, STEP, each
from bench.operation import Case, Operation
from bench.peers import Layout, Variant, library, missing, on_gpu, ours
from bench.shapes import DECODER_SHAPES, DEVICE, NAMES
from mmalign.model.config import DecoderConfig

Inputs = SimpleNamespace
FP32: costs.Weights = "fp32"
SPLIT: costs.Weights = "split"
STOCHASTIC: costs.Weights = "stochastic"
LEARNING_RATE, (BETA1, BETA2), EPS, WEIGHT_DECAY = 1e-3, (0.9, 0.95), 1e-8, 0.1


# ---- ours ----


def our_step(i: Inputs) -> tuple[Tensor, ...]:
    adamw_step(
        i.params,
        i.grads,
        *i.moments,
        step=1,
        learning_rate=LEARNING_RATE,
        beta1=BETA1,
        beta2=BETA2,
        eps=EPS,
        weight_decay=WEIGHT_DECAY,
        remainders=i.remainders,
        seed=i.seed,
    )
    return tuple(i.params)


def _ours(inputs: Inputs) -> Inputs:
    own = fresh(inputs)
    own.remainders, own.seed = None, 1 if inputs.mode == STOCHASTIC else None
    if inputs.mode == SPLIT:
        halves = [split_master(master) for master in inputs.master]
        own.params, own.remainders = ([half[i] for half in halves] for i in (0, 1))
    own.index = iter(range(len(own.params)))
    return own


def _joined(inputs: Inputs, output: Tensor) -> Tensor:
    """The exact fp32 master, where it is split."""
    if inputs.remainders is None:
        return output
    return join_master(output, inputs.remainders[next(inputs.index)])


# ---- the formula: the oracle, and what a compiler is given ----


def formula(i: Inputs) -> tuple[Tensor, ...]:
    """The textbook step from zero moments."""
    for p, g, m, v in zip(i.params, i.grads, *i.moments, strict=True):
        g = g.to(m.dtype)
        m.lerp_(g, 1 - BETA1)
        v.lerp_(g * g, 1 - BETA2)
        decayed = p.to(m.dtype) * (1 - LEARNING_RATE * WEIGHT_DECAY)
        denominator = (v / (1 - BETA2)).sqrt() + EPS
        p.copy_(decayed - LEARNING_RATE / (1 - BETA1) * m / denominator)
    return tuple(i.params)


def fresh(inputs: Inputs) -> Inputs:
    """A step writes: every variant has its own tensors."""
    own = Inputs(**vars(inputs))
    source = inputs.master if inputs.mode == SPLIT else inputs.params
    own.params = [x.clone() for x in source]
    own.grads = [x.clone() for x in inputs.grads]
    own.moments = [[torch.zeros_like(x, dtype=torch.float32) for x in own.params] for _ in "mv"]
    if own.params[0].dtype == torch.float64:  # the oracle of fp32
        own.moments = [[x.double() for x in moment] for moment in own.moments]
    return own


FRESH = Layout(enter=fresh)


# ---- PyTorch's and the libraries' optimizers ----


def optimizer(make: Callable[..., torch.optim.Optimizer], master: bool = False, **how) -> Layout:
    """master: the optimizer keeps fp32 parameters, which are copied to bf16 after the step."""
    settings = {"lr": LEARNING_RATE, "betas": (BETA1, BETA2), "eps": EPS}

    def enter(inputs: Inputs) -> Inputs:
        own = Inputs(**vars(inputs))
        source = inputs.master if master else inputs.params
        own.params = [x.clone() for x in source]
        own.weights = [x.clone() for x in inputs.params] if master else None
        for param, grad in zip(own.params, inputs.grads, strict=True):
            param.grad = grad.to(param.dtype, copy=True)
        own.optimizer = make(own.params, weight_decay=WEIGHT_DECAY, **settings, **how)
        return own

    return Layout(enter=enter)


def step(i: Inputs) -> tuple[Tensor, ...]:
    i.optimizer.step()
    if i.weights is not None:
        torch._foreach_copy_(i.weights, i.params)
    return tuple(i.params)


def torch_rows(mode: str) -> list[Variant]:
    """PyTorch's moments have the type of its parameters."""
    suffix = {FP32: "", SPLIT: ", fp32 master", STOCHASTIC: ", bf16 moments"}[mode]
    return [
        Variant(
            name + suffix,
            step,
            layout=optimizer(torch.optim.AdamW, master=mode == SPLIT, **how),
            comparable=mode == FP32,
        )
        for name, how in {
            "torch eager, foreach": {"foreach": True},
            "torch fused": {"fused": True},
        }.items()
    ]


def torchao(name: str) -> Variant:
    """_AdamW: moments in bf16. AdamW8bit: moments in 8 bits. Stochastic rounding of weights."""

    def make(params: list[Tensor], **settings) -> torch.optim.Optimizer:
        optimizers = library("torchao.optim.adam")
        return getattr(optimizers, name)(params, bf16_stochastic_round=True, **settings)

    shown = f"torchao {name}{', bf16 moments' if name == '_AdamW' else ''}"
    return Variant(shown, step, missing("torchao"), optimizer(make), comparable=False)


OURS = ours("adamw", our_step, Layout(enter=_ours, exit=_joined))
FORMULA = Variant("formula", formula, layout=FRESH)
COMPILED = Variant("torch.compile", formula, on_gpu, FRESH, compiled=True)
PEERS: dict[costs.Weights, list[Variant]] = {
    FP32: [*torch_rows(FP32), COMPILED],
    SPLIT: torch_rows(SPLIT),
    STOCHASTIC: [*torch_rows(STOCHASTIC), COMPILED, torchao("_AdamW"), torchao("AdamW8bit")],
}
# a weight that is rounded stochastically is off by up to 2^-8
ERRORS = {FP32: (1e-4, 1e-4), SPLIT: (1e-4, 1e-4), STOCHASTIC: (1e-2, 1e-2)}


def case(config: DecoderConfig, mode: costs.Weights) -> Case:
    size, inner = config.hidden_size, config.intermediate_size
    shapes = [(sum(config.qkv_sizes), size), (size, size), (2 * inner, size), (size, inner)]
    numel = sum(rows * columns for rows, columns in shapes)

    def make() -> Inputs:
        master = [0.02 * torch.randn(shape, device=DEVICE) for shape in shapes]
        grads = [1e-3 * torch.randn(shape, device=DEVICE) for shape in shapes]
        kept = torch.float32 if mode == FP32 else torch.bfloat16
        params, grads = ([x.to(kept) for x in tensors] for tensors in (master, grads))
        return Inputs(mode=mode, master=master, params=params, grads=grads)

    name = f"{NAMES[config]}, one layer, {numel / 1e6:.1f} M parameters"
    return Case(name, make, (), {STEP: costs.adamw_step(numel, mode)})


COMPARISONS = [
    comparison
    for mode, variants in PEERS.items()
    for comparison in Operation(
        f"adamw {mode}", [*OURS, *variants], FORMULA, COPY, (STEP,), ERRORS[mode]
    ).comparisons([case(DECODER_SHAPES[0][0], mode)])
]
test_adamw = each(COMPARISONS)
