"""Log-probabilities of the tokens that an evaluation scores; several may be read from one row."""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from mmalign_kernels import costs, target_logprobs

from bench import peers
from bench.comparison import each_row
from bench.operation import MATRIX, Case, Operation
from bench.shapes import NAMES, decoder_shapes
from bench.variants import (
    DEVICE,
    DTYPE,
    SCORE,
    TYPE_NAME,
    Layout,
    Variant,
    head_inputs,
    ours,
    torch_variants,
)
from mmalign.model.config import DecoderConfig

TARGETS_OF_A_ROW = 2  # two answers that share their context


def eager(inputs: SimpleNamespace) -> torch.Tensor:
    """Rows first, then one log-softmax of each of them."""
    logits = F.linear(inputs.rows, inputs.weight)
    wide = logits.float() if logits.dtype == torch.bfloat16 else logits
    return wide.log_softmax(1).gather(1, inputs.target_ids[:, None])[:, 0]


def every_row(inputs: SimpleNamespace) -> torch.Tensor:
    """As lm-evaluation-harness: logits and a log-softmax at every position, then the targets."""
    logits = F.linear(inputs.hidden_states, inputs.weight)
    logprobs = F.log_softmax(logits, dim=-1, dtype=torch.promote_types(DTYPE, torch.float32))
    return logprobs[inputs.target_rows, inputs.target_ids]


def _rows(inputs: SimpleNamespace) -> SimpleNamespace:
    inputs.rows = inputs.hidden_states[inputs.target_rows]
    return inputs


ROWS = Layout(enter=_rows)
EAGER = torch_variants(eager, ROWS)
TARGET_LOGPROBS = Operation(
    "target_logprobs",
    [
        *ours(
            "target_logprobs",
            lambda i: target_logprobs(i.hidden_states, i.weight, i.target_ids, i.target_rows),
        ),
        *EAGER,
        Variant("lm_eval's way", every_row),
        Variant("liger-kernel", peers.liger_logprobs, peers.missing("liger-kernel"), ROWS),
        Variant("quack", peers.quack_logprobs, peers.missing("quack"), ROWS),
        Variant("cut-cross-entropy", peers.cce_logprobs, peers.missing("cut-cross-entropy"), ROWS),
    ],
    EAGER[0],
    MATRIX,
    (SCORE,),
)


def case(config: DecoderConfig, tokens: int) -> Case:
    num_rows = tokens // 4
    num_targets = num_rows * TARGETS_OF_A_ROW

    def make(device: torch.device, dtype: torch.dtype) -> SimpleNamespace:
        size, vocab_size = config.hidden_size, config.vocab_size
        inputs = head_inputs(tokens, tokens, size, vocab_size, device, dtype)
        rows = torch.randperm(tokens, device=device)[:num_rows].sort().values
        inputs.target_rows = rows.repeat_interleave(TARGETS_OF_A_ROW)
        inputs.target_ids = torch.randint(vocab_size, (num_targets,), device=device)
        return inputs

    cost = costs.target_logprobs_forward(
        num_rows, num_targets, config.hidden_size, config.vocab_size, DTYPE.itemsize
    )
    return Case(
        f"{NAMES[config]}, {num_targets} targets in {num_rows} of {tokens} rows, {TYPE_NAME}",
        make,
        (),
        {SCORE: cost},
    )


@each_row(TARGET_LOGPROBS.comparisons([case(*shape) for shape in decoder_shapes(DEVICE)]))
def test_target_logprobs(row, compare):
    compare(row)
