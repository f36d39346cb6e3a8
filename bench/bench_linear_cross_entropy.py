"""The language-model head and its loss.

"loss only" is a forward pass without gradients, as an evaluation takes it. There is no row for the
backward pass alone: most of the libraries, and mmalign, form the gradients in the forward pass.
"""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from mmalign_kernels import costs, linear_cross_entropy

from bench import peers
from bench.comparison import each_row
from bench.operation import MATRIX, Case, Operation
from bench.shapes import LLAMA2_7B, NAMES, SUPERVISED, decoder_shapes
from bench.variants import (
    BOTH,
    DEVICE,
    DTYPE,
    LOSS_ONLY,
    TYPE_NAME,
    Variant,
    head_inputs,
    ours,
    torch_variants,
)
from mmalign.model.config import DecoderConfig


def eager(inputs: SimpleNamespace) -> torch.Tensor:
    logits = F.linear(inputs.hidden_states, inputs.weight)
    wide = logits.float() if logits.dtype == torch.bfloat16 else logits
    return F.cross_entropy(wide, inputs.target_ids, ignore_index=-100, reduction="sum")


def supervised(inputs: SimpleNamespace) -> torch.Tensor:
    """Eager, on the supervised rows only; finding them waits for the device."""
    rows = (inputs.target_ids != -100).nonzero()[:, 0]
    logits = F.linear(inputs.hidden_states[rows], inputs.weight)
    wide = logits.float() if logits.dtype == torch.bfloat16 else logits
    return F.cross_entropy(wide, inputs.target_ids[rows], reduction="sum")


EAGER = torch_variants(eager)
LINEAR_CROSS_ENTROPY = Operation(
    "linear_cross_entropy",
    [
        *ours(
            "linear_cross_entropy",
            lambda i: linear_cross_entropy(i.hidden_states, i.weight, i.target_ids),
        ),
        *EAGER,
        Variant("torch eager, supervised rows", supervised),
        Variant("transformers", peers.transformers_loss, peers.missing("transformers")),
        Variant("liger-kernel", peers.liger_loss, peers.missing("liger-kernel")),
        Variant("liger-kernel, fp32 sums", peers.liger_loss_fp32, peers.missing("liger-kernel")),
        Variant("quack", peers.quack_loss, peers.missing("quack")),
        Variant("cut-cross-entropy", peers.cce_loss, peers.missing("cut-cross-entropy")),
    ],
    EAGER[0],
    MATRIX,
    (BOTH, LOSS_ONLY),
)


def case(config: DecoderConfig, tokens: int, stage: str, vocab_size: int | None = None) -> Case:
    vocab_size = vocab_size or config.vocab_size
    num_supervised = int(tokens * SUPERVISED[stage])
    shape = (tokens, num_supervised, config.hidden_size, vocab_size, DTYPE.itemsize)
    forward = costs.linear_cross_entropy_forward(*shape)
    return Case(
        f"{NAMES[config]}, {num_supervised} of {tokens} tokens supervised, "
        f"{vocab_size} columns, {TYPE_NAME}",
        lambda device, dtype: head_inputs(
            tokens, num_supervised, config.hidden_size, vocab_size, device, dtype
        ),
        ("hidden_states", "weight"),
        {BOTH: forward + costs.linear_cross_entropy_backward(*shape), LOSS_ONLY: forward},
    )


FIRST, *OTHERS = decoder_shapes(DEVICE)
CASES = [case(*FIRST, stage) for stage in ("finetune", "pretrain")]
CASES += [case(*shape, "finetune") for shape in OTHERS]
if DEVICE.type == "cuda":  # the three tokens that a LLaVA model adds: no longer a round number
    CASES.append(case(*FIRST, "finetune", vocab_size=LLAMA2_7B.vocab_size + 3))


@each_row(LINEAR_CROSS_ENTROPY.comparisons(CASES))
def test_linear_cross_entropy(row, compare):
    compare(row)
