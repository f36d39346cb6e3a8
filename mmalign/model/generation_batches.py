"""Which prompts run together, which of their tokens are computed once, and their cache rows.

cache rows of a batch: [what all prompts share] [what the prompts about one picture share] ...
                       [each prompt's own tokens and what is generated after them] ...
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from mmalign.model.generation_cache import Segment
from mmalign.model.tiles import Pixels


@dataclass
class PromptRows:
    """A prompt and its cache rows."""

    index: int  # in the list of prompts
    ids: np.ndarray  # (num_tokens,) int64
    pixels: Pixels | None
    picture: int  # equal numbers: the same pixels; -1: none
    before_images: int  # number of tokens before the first image
    through_images: int  # number of tokens up to the end of the last one
    spans: list[tuple[int, int]] = field(default_factory=list)  # of its prefixes, then its own

    @property
    def key(self) -> tuple[bytes, int, bytes]:
        """In this order prompts that begin alike, and then those about one picture, are neighbours.

        Behind an image equal tokens may mean different pictures.
        """
        ids = self.ids.astype(">i8")
        before, after = ids[: self.before_images], ids[self.before_images :]
        return before.tobytes(), self.picture, after.tobytes()

    def segment(self, token_ids: Sequence[int]) -> Segment:
        """The last of the new tokens so far."""
        begin = self.spans[-1][0]
        num_shared = sum(last - first for first, last in self.spans[:-1])
        end = begin + len(self.ids) - num_shared + len(token_ids)
        return Segment(np.array(token_ids[-1:]), [*self.spans[:-1], (begin, end)])


@dataclass
class Group:
    """Prompts about one picture that are equal up to its end, or one prompt."""

    prompts: list[PromptRows]
    num_shared: int = 0  # first tokens of all of them, the picture's among these


@dataclass
class Batch:
    groups: list[Group]
    num_shared: int  # first tokens of every prompt
    num_rows: int  # of the cache

    @property
    def prompts(self) -> list[PromptRows]:
        return [x for group in self.groups for x in group.prompts]

    def segments(self, max_new_tokens: int) -> Iterator[Segment]:
        """Prefixes and prompts, each after what it shares; gives every prompt its rows."""
        row, shared = self.num_shared, []
        if self.num_shared:
            shared = [(0, self.num_shared)]
            ids = self.groups[0].prompts[0].ids[: self.num_shared]
            yield Segment(ids, shared, is_read=False)
        for group in self.groups:
            spans, num_shared = shared, max(group.num_shared, self.num_shared)
            if num_shared > self.num_shared:
                first = group.prompts[0]
                new = first.ids[self.num_shared : num_shared]
                spans = [*shared, (row, row + len(new))]
                yield Segment(new, spans, first.pixels, is_read=False)
                row += len(new)
            for x in group.prompts:
                own = x.ids[num_shared:]
                x.spans = [*spans, (row, row + len(own))]
                pixels = x.pixels if num_shared < x.through_images else None
                yield Segment(own, x.spans, pixels)
                row += len(own) + max_new_tokens - 1  # the last new token is not fed back


def cut_batches(
    prompts: Sequence[PromptRows], max_new_tokens: int, cache_tokens: int
) -> Iterator[Batch]:
    """Neighbours, which share the longest prefixes, as many as the cache holds; at least one."""
    order, begin = sorted(prompts, key=lambda x: x.key), 0
    most = cache_tokens // max_new_tokens + 1  # each has at least so many rows of its own
    while begin < len(order):
        left = order[begin : begin + most]
        counts = range(1, len(left) + 1)
        num_chosen = bisect_right(
            counts, cache_tokens, key=lambda n: _batch(left[:n], max_new_tokens).num_rows
        )
        chosen = left[: max(1, num_chosen)]
        yield _batch(chosen, max_new_tokens)
        begin += len(chosen)


def _batch(chosen: list[PromptRows], max_new_tokens: int) -> Batch:
    """chosen: in the order of their keys."""
    groups: list[Group] = []
    for x in chosen:
        if groups and _belong_together(groups[-1].prompts[-1], x):
            groups[-1].prompts.append(x)
        else:
            groups.append(Group([x]))
    num_shared = _num_shared(chosen, before_images=True)
    rows = sum(len(x.ids) + max_new_tokens - 1 - num_shared for x in chosen) + num_shared
    for group in groups:
        group.num_shared = _num_shared(group.prompts, before_images=False)
        if group.num_shared < group.prompts[0].through_images:  # a prompt ends with its picture
            group.num_shared = 0
        rows -= (len(group.prompts) - 1) * max(0, group.num_shared - num_shared)
    return Batch(groups, num_shared, rows)


def _belong_together(a: PromptRows, b: PromptRows) -> bool:
    through = a.through_images
    return (
        a.picture == b.picture >= 0
        and through == b.through_images
        and np.array_equal(a.ids[:through], b.ids[:through])
    )


def _num_shared(chosen: list[PromptRows], before_images: bool) -> int:
    """Tokens that all prompts begin with: those of the first and the last, which differ most.

    Each keeps a token of its own. before_images: at most those before the images.
    """
    if len(chosen) == 1:
        return 0
    first, last = chosen[0], chosen[-1]
    most = min(len(x.ids) for x in chosen) - 1
    if before_images:
        most = min(most, first.before_images, last.before_images)
    apart = np.flatnonzero(first.ids[:most] != last.ids[:most])
    return int(apart[0]) if len(apart) else most
