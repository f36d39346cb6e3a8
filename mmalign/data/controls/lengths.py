"""The control of lengths: other text with as many supervised tokens."""

from collections import Counter
from dataclasses import replace

import numpy as np

from mmalign.batch import IGNORE_INDEX
from mmalign.config import DataConfig
from mmalign.data.controls.control import FIX, Controlled, CountTokens, Source, parse_samples
from mmalign.data.dataset import ConversationDataset
from mmalign.data.lengths import draw_lengths, kolmogorov_smirnov, wasserstein
from mmalign.data.samples import Sample
from mmalign.errors import SampleError, UserError
from mmalign.tokenizer import Tokenizer


def length_matched(source: Source) -> Controlled:
    if source.count_tokens is None:
        raise ValueError("length-matched needs count_tokens")
    count, candidates = source.count_tokens, parse_samples(source.second)
    for sample in candidates:
        if sample.images:
            raise SampleError(sample.id, "has an image; length-matched draws text alone", FIX)
    wanted = np.array([count(sample) for sample in source.samples])
    lengths = np.array([_count_or_0(count, sample) for sample in candidates])
    usable = np.flatnonzero(lengths)
    if not len(usable):
        raise UserError("the second file has no sample that could be trained on")
    drawn = usable[draw_lengths(wanted, lengths[usable], source.random)]
    found = lengths[drawn]
    about = {
        "supervised_tokens": [int(wanted.sum()), int(found.sum())],
        "wasserstein": wasserstein(wanted, found),
        "kolmogorov_smirnov": kolmogorov_smirnov(wanted, found),
        "unusable": len(candidates) - len(usable),  # of the second file, as Alpaca's empty answers
        "most_often_drawn": max(Counter(drawn.tolist()).values()),
    }
    return Controlled([source.second[i] for i in drawn], about)


def _count_or_0(count: CountTokens, sample: Sample) -> int:
    try:
        return count(sample)
    except SampleError:
        return 0


def supervised_tokens(data: DataConfig, tokenizer: Tokenizer) -> CountTokens:
    """Counts what a sample trains on in this template; the image has no part in it."""
    text = replace(data, text_only=True)

    def count(sample: Sample) -> int:
        dataset = ConversationDataset([sample], tokenizer, text, None)
        return int(np.count_nonzero(dataset.encode(0).labels[1:] != IGNORE_INDEX))

    return count
