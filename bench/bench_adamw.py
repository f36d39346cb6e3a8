"""A step of AdamW on the parameters of one decoder layer, in the three ways to keep weights.

Variants with other state (bf16 or 8-bit moments, a whole fp32 master) move other bytes: they have a
time, but no rate.
"""

from types import SimpleNamespace

import torch
from mmalign_kernels import adamw_step, costs
from mmalign_kernels.adamw import join_master, split_master

from bench import peers_optimizer as peers
from bench.comparison import each_row
from bench.operation import COPY, Case, Operation
from bench.peers import missing
from bench.peers_optimizer import FP32, SPLIT, STOCHASTIC
from bench.shapes import LLAMA2_7B, NAMES, SMALL_DECODER
from bench.variants import DEVICE, STEP, Layout, Variant, on_gpu, ours
from mmalign.model.config import DecoderConfig


def our_step(i: SimpleNamespace) -> tuple[torch.Tensor, ...]:
    beta1, beta2 = peers.SETTINGS["betas"]
    adamw_step(
        i.params,
        i.grads,
        *i.moments,
        step=1,
        learning_rate=peers.SETTINGS["lr"],
        beta1=beta1,
        beta2=beta2,
        eps=peers.SETTINGS["eps"],
        weight_decay=peers.SETTINGS["weight_decay"],
        remainders=i.remainders,
        seed=i.seed,
    )
    return tuple(i.params)


def _ours(inputs: SimpleNamespace) -> SimpleNamespace:
    own = peers.fresh(inputs)
    own.remainders, own.seed = None, 1 if inputs.mode == STOCHASTIC else None
    if inputs.mode == SPLIT:
        halves = [split_master(master) for master in inputs.master]
        own.params, own.remainders = ([half[i] for half in halves] for i in (0, 1))
    own.index = iter(range(len(own.params)))
    return own


def _joined(inputs: SimpleNamespace, output: torch.Tensor) -> torch.Tensor:
    """The exact master, where it lies in two halves."""
    if inputs.remainders is None:
        return output
    return join_master(output, inputs.remainders[next(inputs.index)])


OURS = ours("adamw", our_step, Layout(enter=_ours, exit=_joined))
FORMULA = Variant("formula", peers.formula, layout=peers.FRESH)
COMPILED = Variant("torch.compile", peers.formula, on_gpu, peers.FRESH, compiled=True)


def torch_rows(mode: str) -> list[Variant]:
    """PyTorch's moments have the type of its parameters."""
    beside = {FP32: "", SPLIT: ", fp32 master", STOCHASTIC: ", bf16 moments"}[mode]
    same = mode == FP32
    layouts = {
        "torch eager, foreach": peers.torch_adamw(mode == SPLIT, foreach=True),
        "torch fused": peers.torch_adamw(mode == SPLIT, fused=True),
    }
    return [
        Variant(name + beside, peers.step, layout=layout, comparable=same)
        for name, layout in layouts.items()
    ]


APEX = Variant("apex", peers.step, missing("apex optimizers"), peers.apex_adam())
AO = [
    Variant(name, peers.step, missing("torchao"), peers.torchao(kind), comparable=False)
    for name, kind in {
        "torchao _AdamW, bf16 moments": "_AdamW",
        "torchao AdamW8bit": "AdamW8bit",
    }.items()
]
ROUNDED = (1e-2, 1e-2)  # a weight that is rounded at random is off by up to 2^-8


def operation(mode: str, variants: list[Variant], errors: tuple[float, float] | None) -> Operation:
    return Operation(f"adamw {mode}", [*OURS, *variants], FORMULA, COPY, (STEP,), errors)


OPERATIONS = {
    FP32: operation(FP32, [*torch_rows(FP32), COMPILED, APEX], (1e-4, 1e-4)),
    SPLIT: operation(SPLIT, torch_rows(SPLIT), (1e-4, 1e-4)),
    STOCHASTIC: operation(STOCHASTIC, [*torch_rows(STOCHASTIC), COMPILED, *AO], ROUNDED),
}


def case(config: DecoderConfig, mode: str) -> Case:
    size, wide = config.hidden_size, config.intermediate_size
    shapes = [(sum(config.qkv_sizes), size), (size, size), (2 * wide, size), (size, wide)]
    numel = sum(rows * columns for rows, columns in shapes)

    def make(device: torch.device, dtype: torch.dtype) -> SimpleNamespace:
        master = [0.02 * torch.randn(shape, device=device) for shape in shapes]
        grads = [1e-3 * torch.randn(shape, device=device) for shape in shapes]
        kept = torch.float32 if mode == FP32 else torch.bfloat16
        return SimpleNamespace(
            mode=mode,
            master=master,
            params=[x.to(kept) for x in master],
            grads=[x.to(kept) for x in grads],
            moment_type=torch.float32,
        )

    return Case(
        f"{NAMES[config]}, one layer, {numel / 1e6:.1f} M parameters",
        make,
        (),
        {STEP: costs.adamw_step(numel, mode)},
    )


CONFIG = LLAMA2_7B if DEVICE.type == "cuda" else SMALL_DECODER
COMPARISONS = [
    comparison
    for mode, operation in OPERATIONS.items()
    for comparison in operation.comparisons([case(CONFIG, mode)])
]


@each_row(COMPARISONS)
def test_adamw(row, compare):
    compare(row)
