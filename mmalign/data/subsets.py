"""Parts of a file for studies of amount and type: nested, matched in samples or in tokens."""

import numpy as np

from mmalign.data.controls import CountTokens, Records, parse_samples
from mmalign.errors import UserError


def take_samples(rows: Records, num_samples: int, seed: int) -> list[dict]:
    """A part in random order; with one seed, a smaller part is the beginning of a larger one."""
    if num_samples > len(rows):
        raise UserError(f"{len(rows):,} samples, expected at least {num_samples:,}. Take fewer")
    order = np.random.RandomState(seed).permutation(len(rows))
    return [rows[i] for i in order[:num_samples]]


def take_tokens(rows: Records, num_tokens: int, seed: int, count: CountTokens) -> list[dict]:
    """The first of take_samples' order that together have at least num_tokens supervised ones."""
    order, taken, total = take_samples(rows, len(rows), seed), [], 0
    for row, sample in zip(order, parse_samples(order), strict=True):
        if total >= num_tokens:
            return taken
        taken.append(row)
        total += count(sample)
    if total < num_tokens:
        raise UserError(
            f"{len(rows):,} samples with {total:,} supervised tokens, expected at least "
            f"{num_tokens:,}. Take fewer"
        )
    return taken
