"""How each library takes one step of AdamW, in place, on its own copy of the parameters."""

from collections.abc import Callable

import torch
from torch import Tensor

from bench.peers import Inputs, library
from bench.variants import Layout

FP32, SPLIT, STOCHASTIC = "fp32", "split", "stochastic"  # how weights are kept
SETTINGS = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def formula(inputs: Inputs) -> tuple[Tensor, ...]:
    """The textbook step from zero moments: what a compiler is given, and the oracle."""
    (beta1, beta2), rate = SETTINGS["betas"], SETTINGS["lr"]
    for p, g, m, v in zip(inputs.params, inputs.grads, *inputs.moments, strict=True):
        g = g.to(m.dtype)
        m.lerp_(g, 1 - beta1)
        v.lerp_(g * g, 1 - beta2)
        wide = p.to(m.dtype) * (1 - rate * SETTINGS["weight_decay"])
        denominator = (v / (1 - beta2)).sqrt() + SETTINGS["eps"]
        p.copy_(wide - rate / (1 - beta1) * m / denominator)
    return tuple(inputs.params)


def fresh(inputs: Inputs) -> Inputs:
    """A step writes: every variant has its own tensors."""
    own = Inputs(**vars(inputs))
    source = inputs.master if inputs.mode == SPLIT else inputs.params
    own.params = [x.clone() for x in source]
    own.grads = [x.clone() for x in inputs.grads]
    zeros = [torch.zeros_like(x, dtype=inputs.moment_type) for x in own.params]
    own.moments = [zeros, [x.clone() for x in zeros]]
    return own


FRESH = Layout(enter=fresh)


def _optimizer(make: Callable[[list[Tensor]], torch.optim.Optimizer], master: bool) -> Layout:
    """master: the optimizer keeps fp32 parameters, which are copied to bf16 after the step."""

    def enter(inputs: Inputs) -> Inputs:
        own = Inputs(**vars(inputs))
        source = inputs.master if master else inputs.params
        own.params = [x.clone() for x in source]
        own.weights = [x.clone() for x in inputs.params] if master else None
        for param, grad in zip(own.params, inputs.grads, strict=True):
            param.grad = grad.to(param.dtype, copy=True)
        own.optimizer = make(own.params)
        return own

    return Layout(enter=enter)


def step(inputs: Inputs) -> tuple[Tensor, ...]:
    inputs.optimizer.step()
    if inputs.weights is not None:
        torch._foreach_copy_(inputs.weights, inputs.params)
    return tuple(inputs.params)


def torch_adamw(master: bool = False, **how: bool) -> Layout:
    return _optimizer(lambda params: torch.optim.AdamW(params, **SETTINGS, **how), master)


def apex_adam() -> Layout:
    def make(params: list[Tensor]) -> torch.optim.Optimizer:
        return library("apex.optimizers").FusedAdam(params, adam_w_mode=True, **SETTINGS)

    return _optimizer(make, master=False)


def torchao(name: str) -> Layout:
    """_AdamW: moments in bf16. AdamW8bit: moments in 8 bits. Weights rounded at random."""

    def make(params: list[Tensor]) -> torch.optim.Optimizer:
        optimizers = library("torchao.optim.adam")
        return getattr(optimizers, name)(params, bf16_stochastic_round=True, **SETTINGS)

    return _optimizer(make, master=False)
