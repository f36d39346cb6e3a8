"""Conversations to ids and labels, template by template.

A template renders a conversation to segments (segments.py): a stretch of text or one special
token, each marked as supervised or not.

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
    llama_3                 answer, <|eot_id|>
    chatml                  answer, <|im_end|>
    mistral                 " " answer, </s>
    chat                    what the chat template in the tokenizer's folder marks as generated, or
                            else every answer and the special token that ends it
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

from mmalign.config import TrainConfig
from mmalign.data.samples import Turn
from mmalign.data.segments import (
    IMAGE,
    IMAGE_SENTINEL,
    Segment,
    SpecialIds,
    encode_segments,
    special_ids,
)
from mmalign.errors import UserError
from mmalign.tokenizer import Tokenizer
from mmalign.tokenizer.chat_template import ChatTemplate, Span


@dataclass(frozen=True, slots=True)
class Template:
    """How a conversation is written, and what else depends on that."""

    render: Callable[[Sequence[Turn], SpecialIds], Iterator[Segment]]
    stop: tuple[str, ...] = ()  # generation ends at one of these, or at end-of-sequence
    single_turn: bool = False  # takes one question and one answer
    drops_question: bool = False  # of the question only the image is rendered
    writes_system: bool = True  # a system turn, in place of its own prompt where it has one
    writes_image_tokens: bool = True  # <im_start> and <im_end>, unless data.use_im_start_end is off
    end_of_turn: str = ""  # special token that ends an answer, where it is not end-of-sequence
    is_own: bool = False  # the tokenizer's chat template


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
    """Ids and labels (unshifted) of question, answer, question ..., after a system turn or none.

    An image is one id, IMAGE_SENTINEL. The only one of a turn stands at its front, as LLaVA trains;
    several stand where "<image>" does, as in LLaVA-NeXT-Interleave.
    """
    special = special_ids(tokenizer, use_im_start_end)
    return encode_segments(template.render(turns, special), tokenizer)


def encode_prompt(
    turns: Sequence[Turn], template: Template, tokenizer: Tokenizer, use_im_start_end: bool
) -> list[int]:
    """Ids up to the model's answer to the last question, with which `turns` end."""
    special = special_ids(tokenizer, use_im_start_end)
    if template.is_own:
        return encode_segments(_chat(turns, special), tokenizer)[0]
    segments = list(template.render([*turns, Turn("gpt", "")], special))
    while segments[-1][1] or segments[-1][0] == " ":  # the empty answer and what follows it
        segments.pop()
    return encode_segments(segments, tokenizer)[0]


def end_ids(template: Template, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Ids besides end-of-sequence that end an answer."""
    name = own_template(tokenizer).end_of_turn if template.is_own else template.end_of_turn
    found = tokenizer.special_id(name) if name else None
    return () if found is None else (found,)


@lru_cache(maxsize=8)
def own_template(tokenizer: Tokenizer) -> ChatTemplate:
    """The chat template beside the tokenizer's file."""
    return ChatTemplate(tokenizer.path.parent, tokenizer)


def question_segments(text: str, special: SpecialIds) -> Iterator[Segment]:
    """The question with its images; a single one at the front and on a line of its own."""
    for i, part in enumerate(with_image_in_front(text).split(IMAGE)):
        if i:
            if special.use_im_start_end:
                yield special.im_start, False
            yield IMAGE_SENTINEL, False
            if special.use_im_start_end:
                yield special.im_end, False
        if part:
            yield part, False


def with_image_in_front(text: str) -> str:
    """The question with its image, where it has a single one, at the front."""
    if text.count(IMAGE) != 1:
        return text
    text = text.replace(IMAGE, "").strip()
    return f"{IMAGE}\n{text}" if text else IMAGE


def _system(turns: Sequence[Turn], own: str) -> tuple[str, Sequence[Turn]]:
    """The system prompt, and the turns after it."""
    has_one = bool(turns) and turns[0].speaker == "system"
    return (turns[0].text, turns[1:]) if has_one else (own, turns)


def _bos(special: SpecialIds) -> Iterator[Segment]:
    if special.bos is not None:
        yield special.bos, False


def _plain(turns: Sequence[Turn], special: SpecialIds) -> Iterator[Segment]:
    question, answer = turns
    yield from _bos(special)
    yield from [(IMAGE_SENTINEL, False)] * question.text.count(IMAGE)
    yield answer.text + "\n", True


def _v0(turns: Sequence[Turn], special: SpecialIds, system: str) -> Iterator[Segment]:
    system, turns = _system(turns, system)
    yield from _bos(special)
    yield f"{system}\n\n###", False
    for question, answer in zip(turns[::2], turns[1::2], strict=True):
        yield " Human: ", False
        yield from question_segments(question.text, special)
        yield "\n### Assistant:", False
        yield f" {answer.text}\n###", True
    yield " ", False


def _v1(turns: Sequence[Turn], special: SpecialIds, system: str) -> Iterator[Segment]:
    system, turns = _system(turns, system)
    yield from _bos(special)
    yield f"{system} ", False
    for question, answer in zip(turns[::2], turns[1::2], strict=True):
        yield "USER: ", False
        yield from question_segments(question.text, special)
        yield " ASSISTANT:", False
        yield f" {answer.text}", True
        yield special.eos, True


def _llama_2(turns: Sequence[Turn], special: SpecialIds, system: str) -> Iterator[Segment]:
    system, turns = _system(turns, system)
    opening = f"[INST] <<SYS>>\n{system}\n<</SYS>>\n\n"
    for question, answer in zip(turns[::2], turns[1::2], strict=True):
        yield from _bos(special)
        yield opening, False
        yield from question_segments(question.text, special)
        yield " [/INST]", False
        yield f" {answer.text} ", True
        yield special.eos, True
        opening = "[INST] "


def _llama_3(turns: Sequence[Turn], special: SpecialIds) -> Iterator[Segment]:
    yield from _bos(special)
    header, end, eot = (special.named(f"<|{x}|>") for x in _LLAMA_3_TOKENS)
    for turn in turns:
        yield header, False
        yield _ROLES[turn.speaker], False
        yield end, False
        yield "\n\n", False
        asks, learns = turn.speaker == "human", turn.speaker == "gpt"
        yield from question_segments(turn.text, special) if asks else [(turn.text, learns)]
        yield eot, learns


def _chatml(turns: Sequence[Turn], special: SpecialIds, system: str) -> Iterator[Segment]:
    system, turns = _system(turns, system)
    start, end = special.named("<|im_start|>"), special.named("<|im_end|>")
    yield start, False
    yield f"system\n{system}", False
    yield end, False
    for turn in turns:
        asks = turn.speaker == "human"
        yield "\n", False
        yield start, False
        yield "user\n" if asks else "assistant\n", False
        yield from question_segments(turn.text, special) if asks else [(turn.text, True)]
        yield end, not asks


def _mistral(turns: Sequence[Turn], special: SpecialIds) -> Iterator[Segment]:
    begin, end = (_special_or_text(x, special) for x in ("[INST]", "[/INST]"))
    yield from _bos(special)
    for question, answer in zip(turns[::2], turns[1::2], strict=True):
        yield begin, False
        yield " ", False
        yield from question_segments(question.text, special)
        yield " ", False
        yield end, False
        yield f" {answer.text}", True
        yield special.eos, True


def _special_or_text(name: str, special: SpecialIds) -> str | int:
    """Mistral's marks are text in its first tokenizers, and special tokens in later ones."""
    found = None if special.tokenizer is None else special.tokenizer.special_id(name)
    return name if found is None else found


def _chat(turns: Sequence[Turn], special: SpecialIds) -> Iterator[Segment]:
    """As apply_chat_template of the questions that _question writes."""
    assert special.tokenizer is not None
    template = own_template(special.tokenizer)
    system, turns = _system(turns, "")
    contents = [with_image_in_front(turn.text) for turn in turns]
    asks = turns[-1].speaker == "human"
    for span in template.spans(contents, add_generation_prompt=asks, system=system):
        yield from _segments_of(span, template, special)


def _segments_of(span: Span, template: ChatTemplate, special: SpecialIds) -> Iterator[Segment]:
    if not span.is_content:
        for part in template.split(span.text):
            token_id = special.tokenizer.special_id(part) if special.tokenizer else None
            yield part if token_id is None else token_id, span.supervised
        return
    if IMAGE in span.text:
        yield from question_segments(span.text, special)
    else:
        yield span.text, span.supervised


_ROLES = {"system": "system", "human": "user", "gpt": "assistant"}
_LLAMA_3_TOKENS = ("start_header_id", "end_header_id", "eot_id")
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
_CHATML_SYSTEM = "You are a helpful assistant."  # Qwen's

TEMPLATES: dict[str, Template] = {
    "plain": Template(
        _plain,
        single_turn=True,
        drops_question=True,
        writes_system=False,
        writes_image_tokens=False,
    ),
    "v0": Template(partial(_v0, system=_V0_SYSTEM), stop=("###",)),
    "v1": Template(partial(_v1, system=_V1_SYSTEM)),
    "llama_2": Template(partial(_llama_2, system=_LLAMA_2_SYSTEM)),
    "llava_llama_2": Template(partial(_llama_2, system=_LLAVA_LLAMA_2_SYSTEM)),
    "llama_3": Template(_llama_3, end_of_turn="<|eot_id|>"),
    "chatml": Template(partial(_chatml, system=_CHATML_SYSTEM), end_of_turn="<|im_end|>"),
    "mistral": Template(_mistral, writes_system=False),
    "chat": Template(_chat, is_own=True),
}
