"""The language-model head: with its loss in training, with log-probabilities in evaluation.

"loss only" is a forward pass without gradients, as an evaluation takes it. There is no row for the
backward pass of the loss alone: most of the libraries, and mmalign, form the gradients in the
forward pass.
"""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from mmalign_kernels import costs, linear_cross_entropy, target_logprobs

from bench.comparison import BOTH, LOSS_ONLY, MATMUL, SCORE, each
from bench.operation import Case, Operation
from bench.peers import Layout, Variant, library, liger, ours, peer, torch_variants
from bench.shapes import (
    DECODER_SHAPES,
    DEVICE,
    DTYPE,
    DTYPE_NAME,
    NAMES,
    ON_GPU,
    SUPERVISED,
    head_inputs,
)
from mmalign.model.config import DecoderConfig

TARGETS_PER_ROW = 2  # two answers that share their context


def fp32_logits(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    logits = F.linear(rows, weight)
    return logits.float() if logits.dtype == torch.bfloat16 else logits


# ---- the loss ----


def eager_loss(i: SimpleNamespace) -> torch.Tensor:
    logits = fp32_logits(i.hidden_states, i.weight)
    return F.cross_entropy(logits, i.target_ids, ignore_index=-100, reduction="sum")


def supervised(i: SimpleNamespace) -> torch.Tensor:
    """Eager, on the supervised rows only; finding them waits for the device."""
    rows = (i.target_ids != -100).nonzero()[:, 0]
    logits = fp32_logits(i.hidden_states[rows], i.weight)
    return F.cross_entropy(logits, i.target_ids[rows], reduction="sum")


def transformers_loss(i: SimpleNamespace) -> torch.Tensor:
    """LlamaForCausalLM: logits of every row, in fp32 for the loss."""
    logits = F.linear(i.hidden_states, i.weight).float()
    loss = library("transformers.loss.loss_utils").fixed_cross_entropy
    return loss(logits, i.target_ids, num_items_in_batch=1)


def cce(rows: torch.Tensor, weight: torch.Tensor, target_ids: torch.Tensor, reduction: str):
    loss = library("cut_cross_entropy").linear_cross_entropy
    return loss(rows, weight, target_ids, reduction=reduction)


EAGER_LOSS = torch_variants(eager_loss)
LINEAR_CROSS_ENTROPY = Operation(
    "linear_cross_entropy",
    [
        *ours(
            "linear_cross_entropy",
            lambda i: linear_cross_entropy(i.hidden_states, i.weight, i.target_ids),
        ),
        *EAGER_LOSS,
        Variant("torch eager, supervised rows", supervised),
        peer("transformers", transformers_loss),
        peer(
            "liger-kernel",
            lambda i: liger().liger_fused_linear_cross_entropy(
                i.hidden_states, i.weight, i.target_ids, reduction="sum"
            ),
        ),
        peer(
            "quack",
            lambda i: library("quack.linear_cross_entropy").chunked_linear_cross_entropy(
                i.hidden_states, i.weight, i.target_ids, reduction="sum"
            ),
        ),
        peer("cut-cross-entropy", lambda i: cce(i.hidden_states, i.weight, i.target_ids, "sum")),
    ],
    EAGER_LOSS[0],
    MATMUL,
    (BOTH, LOSS_ONLY),
)


def loss_case(
    config: DecoderConfig, tokens: int, stage: str, vocab_size: int | None = None
) -> Case:
    vocab_size = vocab_size or config.vocab_size
    num_supervised = int(tokens * SUPERVISED[stage])
    shape = (tokens, num_supervised, config.hidden_size, vocab_size, DTYPE.itemsize)
    passes = costs.linear_cross_entropy(*shape)
    return Case(
        f"{NAMES[config]}, {num_supervised} of {tokens} tokens supervised, "
        f"{vocab_size} columns, {DTYPE_NAME}",
        lambda: head_inputs(tokens, num_supervised, config.hidden_size, vocab_size),
        ("hidden_states", "weight"),
        {BOTH: passes.both, LOSS_ONLY: passes.forward},
    )


FIRST, *OTHERS = DECODER_SHAPES
LOSS_CASES = [loss_case(*FIRST, stage) for stage in ("finetune", "pretrain")]
LOSS_CASES += [loss_case(*shape, "finetune") for shape in OTHERS]
if ON_GPU:  # the three tokens that a LLaVA model adds: no longer a round number
    LOSS_CASES.append(loss_case(*FIRST, "finetune", vocab_size=FIRST[0].vocab_size + 3))


# ---- log-probabilities; several targets may be read from one row ----


def eager_logprobs(i: SimpleNamespace) -> torch.Tensor:
    """Rows first, then one log-softmax of each of them."""
    logprobs = fp32_logits(i.rows, i.weight).log_softmax(1)
    return logprobs.gather(1, i.target_ids[:, None])[:, 0]


def every_row(i: SimpleNamespace) -> torch.Tensor:
    """As lm-evaluation-harness: logits and a log-softmax at every position, then the targets."""
    logits = F.linear(i.hidden_states, i.weight)
    logprobs = F.log_softmax(logits, dim=-1, dtype=torch.promote_types(DTYPE, torch.float32))
    return logprobs[i.target_rows, i.target_ids]


def from_logits(i: SimpleNamespace, cross_entropy) -> torch.Tensor:
    return -cross_entropy(F.linear(i.rows, i.weight), i.target_ids, reduction="none")


def _rows(i: SimpleNamespace) -> SimpleNamespace:
    i.rows = i.hidden_states[i.target_rows]
    return i


ROWS = Layout(enter=_rows)
EAGER_LOGPROBS = torch_variants(eager_logprobs, ROWS)
TARGET_LOGPROBS = Operation(
    "target_logprobs",
    [
        *ours(
            "target_logprobs",
            lambda i: target_logprobs(i.hidden_states, i.weight, i.target_ids, i.target_rows),
        ),
        *EAGER_LOGPROBS,
        Variant("lm_eval's way", every_row),
        peer("liger-kernel", lambda i: from_logits(i, liger().liger_cross_entropy), ROWS),
        peer("quack", lambda i: from_logits(i, library("quack").cross_entropy), ROWS),
        peer("cut-cross-entropy", lambda i: -cce(i.rows, i.weight, i.target_ids, "none"), ROWS),
    ],
    EAGER_LOGPROBS[0],
    MATMUL,
    (SCORE,),
)


def logprobs_case(config: DecoderConfig, tokens: int) -> Case:
    num_rows = tokens // 4
    num_targets = num_rows * TARGETS_PER_ROW

    def make() -> SimpleNamespace:
        inputs = head_inputs(tokens, tokens, config.hidden_size, config.vocab_size)
        rows = torch.randperm(tokens, device=DEVICE)[:num_rows].sort().values
        inputs.target_rows = rows.repeat_interleave(TARGETS_PER_ROW)
        inputs.target_ids = torch.randint(config.vocab_size, (num_targets,), device=DEVICE)
        return inputs

    cost = costs.target_logprobs(
        num_rows, num_targets, config.hidden_size, config.vocab_size, DTYPE.itemsize
    )
    return Case(
        f"{NAMES[config]}, {num_targets} targets in {num_rows} of {tokens} rows, {DTYPE_NAME}",
        make,
        (),
        {SCORE: cost},
    )


COMPARISONS = [
    *LINEAR_CROSS_ENTROPY.comparisons(LOSS_CASES),
    *TARGET_LOGPROBS.comparisons([logprobs_case(*shape) for shape in DECODER_SHAPES]),
]
test_lm_head = each(COMPARISONS)
