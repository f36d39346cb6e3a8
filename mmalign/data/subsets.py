"""Parts of a file for studies of amount and type: nested, matched in samples or in tokens."""

from collections.abc import Sequence

import numpy as np

from mmalign.data.controls.control import CountTokens
from mmalign.data.samples import Sample
from mmalign.errors import UserError


def take_samples(num_samples: int, wanted: int, seed: int) -> list[int]:
    """Indices in random order; with one seed, a smaller part is the beginning of a larger one."""
    if wanted > num_samples:
        raise UserError(f"{num_samples:,} samples, expected at least {wanted:,}. Take fewer")
    return np.random.RandomState(seed).permutation(num_samples)[:wanted].tolist()


def take_tokens(
    samples: Sequence[Sample], num_tokens: int, seed: int, count: CountTokens
) -> list[int]:
    """The first of take_samples' order that together have at least num_tokens supervised ones."""
    taken, total = [], 0
    for index in take_samples(len(samples), len(samples), seed):
        if total >= num_tokens:
            return taken
        taken.append(index)
        total += count(samples[index])
    if total < num_tokens:
        raise UserError(
            f"{len(samples):,} samples with {total:,} supervised tokens, expected at least "
            f"{num_tokens:,}. Take fewer"
        )
    return taken
