"""The next token from logits: the most likely one, or a draw from a tempered, cut distribution."""

import torch
from torch import Tensor


def sampling_probabilities(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """What tokens are drawn from: (num_sequences, vocab_size) logits -> probabilities, fp32.

    logits / temperature; then the top_k largest (0: all); of these, the fewest whose probabilities
    sum to top_p or more (1: all; above 0, so that a token stays). Equal logits at the cut by top_k
    stay together.
    """
    logits = logits.float() / temperature
    if 0 < top_k < logits.shape[1]:
        smallest = logits.topk(top_k, 1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    probabilities = logits.softmax(1)
    if top_p < 1:
        values, order = probabilities.sort(dim=1, descending=True, stable=True)
        before = values.cumsum(1) - values  # mass of what is more likely
        values = values.masked_fill(before >= top_p, 0.0)
        probabilities = torch.zeros_like(values).scatter_(1, order, values)
    return probabilities / probabilities.sum(1, keepdim=True)


def draw(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """The token at which the cumulative probability passes a number in [0, 1): (num_sequences,).

    One number a sequence decides its token, so a draw does not depend on what else is drawn.
    """
    cumulative = probabilities.double().cumsum(1)
    threshold = uniforms.to(cumulative)[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, threshold, right=True).squeeze(1)
