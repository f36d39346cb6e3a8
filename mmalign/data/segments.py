"""Segments of a conversation to ids and labels.

A segment is a stretch of text or one special token, each marked as supervised or not. Text between
two special tokens is tokenised once, with character offsets, and an id is supervised where its
characters touch a supervised segment. Nothing is tokenised twice and no lengths are compared, so no
tokenizer can shift a mask.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from mmalign.batch import IGNORE_INDEX
from mmalign.errors import UserError
from mmalign.tokenizer import Tokenizer

IMAGE = "<image>"  # the image's place in the text of a published conversation
IMAGE_SENTINEL = -200  # id of the whole image until it is expanded to its patches

Segment = tuple[str | int, bool]  # text or the id of a special token; supervised


@dataclass(frozen=True, slots=True)
class SpecialIds:
    """The ids that templates write, and whether an image is wrapped in im_start / im_end."""

    bos: int | None
    eos: int
    im_start: int
    im_end: int
    use_im_start_end: bool
    tokenizer: Tokenizer | None = None  # of templates with special tokens or text of its own

    def named(self, name: str) -> int:
        """Id of a special token; UserError where the tokenizer has none of this name."""
        found = None if self.tokenizer is None else self.tokenizer.special_id(name)
        if found is None:
            path = "it" if self.tokenizer is None else self.tokenizer.path
            raise UserError(
                f"the template needs the special token {name}, which {path} does not have. Choose "
                "another --data.template, such as chat, the tokenizer's own"
            )
        return found


def special_ids(tokenizer: Tokenizer, use_im_start_end: bool) -> SpecialIds:
    return SpecialIds(
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        tokenizer.im_start_id,
        tokenizer.im_end_id,
        use_im_start_end,
        tokenizer,
    )


def encode_segments(
    segments: Iterable[Segment], tokenizer: Tokenizer
) -> tuple[list[int], list[int]]:
    """Ids and labels (unshifted)."""
    ids, labels = [], []
    for item, spans in _join_text(segments, tokenizer.im_start_id, tokenizer.im_end_id):
        if isinstance(item, int):
            ids.append(item)
            labels.append(item if spans else IGNORE_INDEX)
            continue
        text_ids, offsets = tokenizer.encode_with_offsets(item)
        ids += text_ids
        labels += [
            token_id if _touches(begin, end, spans) else IGNORE_INDEX
            for token_id, (begin, end) in zip(text_ids, offsets, strict=True)
        ]
    return ids, labels


def _touches(begin: int, end: int, spans: list[tuple[int, int]]) -> bool:
    end = max(end, begin + 1)  # an id without characters belongs to the character after it
    return any(begin < span_end and span_begin < end for span_begin, span_end in spans)


def _join_text(
    segments: Iterable[Segment], im_start_id: int, im_end_id: int
) -> Iterator[tuple[str | int, list[tuple[int, int]]]]:
    """Stretches of text with their supervised spans, and special ids (spans: empty or not).

    White space before <im_start> and after <im_end> is stripped, as in transformers before 4.34.
    """
    text, spans, last = "", [], None
    for item, supervised in segments:
        if isinstance(item, int):
            text = text.rstrip() if item == im_start_id else text
            if text:
                yield text, spans
            yield item, [(0, 1)] if supervised else []
            text, spans, last = "", [], item
            continue
        if not text and last == im_end_id:
            item = item.lstrip()
        if supervised:
            spans.append((len(text), len(text) + len(item)))
        text += item
    if text:
        yield text, spans
