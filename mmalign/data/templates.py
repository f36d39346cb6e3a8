"""Conversations to ids and labels, template by template.

A template renders a conversation to segments: a stretch of text or one special token, each marked
as supervised or not. Text between two special tokens is tokenised once, with character offsets,
and an id is supervised where its characters touch a supervised segment. Nothing is tokenised twice
and no lengths are compared, so no tokenizer can shift a mask.

To add a template, write a function that yields its segments and enter it in TEMPLATES, at the end.

Prompts, ids and labels are those of LLaVA v1.0.1 with transformers before 4.34, which trained the
released models: white space around <im_start> and <im_end> is stripped (later versions keep it).
Special tokens come from the template only; "</s>" in a question or an answer is text.

Supervised text (everything else has the label IGNORE_INDEX):
    plain                   answer, newline (no end-of-sequence id; the question is dropped)
    v0                      " " answer, newline, "###": the stop string of generation. Of the "###"
                            that open turns only those that end an answer count. The reference also
                            trains on the first "###", on "### Assistant:" and on the last blank
    v1                      " " answer, </s>
    llama_2, llava_llama_2  " " answer " ", </s>
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from mmalign.batch import IGNORE_INDEX
from mmalign.config import TrainConfig
from mmalign.data.samples import Turn
from mmalign.errors import UserError
from mmalign.tokenizer import Tokenizer

IMAGE = "<image>"  # the image's place in the text of a published conversation
IMAGE_SENTINEL = -200  # id of the whole image until it is expanded to its patches

Segment = tuple[str | int, bool]  # text or the id of a special token; supervised


@dataclass(frozen=True, slots=True)
class SpecialIds:
    """The ids that templates write, and whether an image is wrapped in im_start / im_end."""

    bos: int
    eos: int
    im_start: int
    im_end: int
    use_im_start_end: bool


@dataclass(frozen=True, slots=True)
class Template:
    """How a conversation is written, and what else depends on that."""

    render: Callable[[Sequence[Turn], SpecialIds], Iterator[Segment]]
    stop: tuple[str, ...] = ()  # generation ends at one of these, or at end-of-sequence
    single_turn: bool = False  # takes one question and one answer
    drops_question: bool = False  # of the question only the image is rendered
    writes_image_tokens: bool = True  # <im_start> and <im_end>, unless data.use_im_start_end is off


def find_template(name: str) -> Template:
    """The entry of TEMPLATES; UserError with the known names where there is none."""
    if name not in TEMPLATES:
        raise UserError(f"unknown template {name!r}: --data.template takes {', '.join(TEMPLATES)}")
    return TEMPLATES[name]


def trains_image_tokens(config: TrainConfig) -> bool:
    """Whether stage 1 trains the rows of <im_start> and <im_end>: its template writes them."""
    written = find_template(config.data.template).writes_image_tokens
    return config.stage == "pretrain" and config.data.use_im_start_end and written


def encode_conversation(
    turns: Sequence[Turn], template: Template, tokenizer: Tokenizer, use_im_start_end: bool
) -> tuple[list[int], list[int]]:
    """Ids and labels (unshifted) of question, answer, question, answer ...

    The image is one id, IMAGE_SENTINEL, at the front of the turn that contains "<image>".
    """
    special = special_ids(tokenizer, use_im_start_end)
    return _encode(template.render(turns, special), tokenizer)


def encode_prompt(
    turns: Sequence[Turn], template: Template, tokenizer: Tokenizer, use_im_start_end: bool
) -> list[int]:
    """Ids up to the model's answer to the last question, with which `turns` end."""
    special = special_ids(tokenizer, use_im_start_end)
    segments = list(template.render([*turns, Turn("gpt", "")], special))
    while segments[-1][1] or segments[-1][0] == " ":  # the empty answer and what follows it
        segments.pop()
    return _encode(segments, tokenizer)[0]


def special_ids(tokenizer: Tokenizer, use_im_start_end: bool) -> SpecialIds:
    return SpecialIds(
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        tokenizer.im_start_id,
        tokenizer.im_end_id,
        use_im_start_end,
    )


def _encode(segments: Iterable[Segment], tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
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


def _question(text: str, special: SpecialIds) -> Iterator[Segment]:
    """The question, its image (if any) at the front and on a line of its own."""
    if IMAGE not in text:
        yield text, False
        return
    text = text.replace(IMAGE, "").strip()
    if special.use_im_start_end:
        yield special.im_start, False
    yield IMAGE_SENTINEL, False
    if special.use_im_start_end:
        yield special.im_end, False
    if text:
        yield "\n" + text, False


def _plain(turns: Sequence[Turn], special: SpecialIds) -> Iterator[Segment]:
    question, answer = turns
    yield special.bos, False
    if IMAGE in question.text:
        yield IMAGE_SENTINEL, False
    yield answer.text + "\n", True


def _v0(turns: Sequence[Turn], special: SpecialIds, system: str) -> Iterator[Segment]:
    yield special.bos, False
    yield f"{system}\n\n###", False
    for question, answer in zip(turns[::2], turns[1::2], strict=True):
        yield " Human: ", False
        yield from _question(question.text, special)
        yield "\n### Assistant:", False
        yield f" {answer.text}\n###", True
    yield " ", False


def _v1(turns: Sequence[Turn], special: SpecialIds, system: str) -> Iterator[Segment]:
    yield special.bos, False
    yield f"{system} ", False
    for question, answer in zip(turns[::2], turns[1::2], strict=True):
        yield "USER: ", False
        yield from _question(question.text, special)
        yield " ASSISTANT:", False
        yield f" {answer.text}", True
        yield special.eos, True


def _llama_2(turns: Sequence[Turn], special: SpecialIds, system: str) -> Iterator[Segment]:
    opening = f"[INST] <<SYS>>\n{system}\n<</SYS>>\n\n"
    for question, answer in zip(turns[::2], turns[1::2], strict=True):
        yield special.bos, False
        yield opening, False
        yield from _question(question.text, special)
        yield " [/INST]", False
        yield f" {answer.text} ", True
        yield special.eos, True
        opening = "[INST] "


_V0_SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
_V1_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
_LLAMA_2_SYSTEM = (
    "You are a helpful, respectful and honest assistant. "
    "Always answer as helpfully as possible, while being safe.  "
    "Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, "
    "or illegal content. "
    "Please ensure that your responses are socially unbiased and positive in nature.\n\n"
    "If a question does not make any sense, or is not factually coherent, explain why instead of "
    "answering something not correct. "
    "If you don't know the answer to a question, please don't share false information."
)
_LLAVA_LLAMA_2_SYSTEM = (
    "You are a helpful language and vision assistant. "
    "You are able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
)

TEMPLATES: dict[str, Template] = {
    "plain": Template(_plain, single_turn=True, drops_question=True, writes_image_tokens=False),
    "v0": Template(partial(_v0, system=_V0_SYSTEM), stop=("###",)),
    "v1": Template(partial(_v1, system=_V1_SYSTEM)),
    "llama_2": Template(partial(_llama_2, system=_LLAMA_2_SYSTEM)),
    "llava_llama_2": Template(partial(_llama_2, system=_LLAVA_LLAMA_2_SYSTEM)),
}
