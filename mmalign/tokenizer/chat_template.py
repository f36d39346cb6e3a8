"""The chat template of a model's folder, written as transformers writes it, span by span."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, cycle
from pathlib import Path

from mmalign.errors import UserError
from mmalign.files import read_json, read_text
from mmalign.tokenizer.bounded_jinja import BEGIN, END, BoundedEnvironment
from mmalign.tokenizer.tokenizer import Tokenizer

_FIRST_MARK = 0xE000  # private use: stand for the turns while the template's own text is looked up


@dataclass(frozen=True)
class Span:
    """A stretch of the written conversation."""

    text: str
    supervised: bool
    is_content: bool  # of a turn; else the template's own, in which special tokens are parsed


class ChatTemplate:
    """chat_template.jinja, or chat_template in tokenizer_config.json, as older folders have it.

    A template that asks for today's date gets none, so that the same conversation is always the
    same text.
    """

    def __init__(self, folder: Path, tokenizer: Tokenizer):
        jinja, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
        self.path = jinja if jinja.exists() else config
        text = None
        if self.path.exists():
            text = read_text(jinja) if jinja.exists() else read_json(config).get("chat_template")
        if isinstance(text, list):  # several with names, of which transformers takes this one
            named = [x for x in text if isinstance(x, dict) and x.get("name") == "default"]
            text = named[0].get("template") if named else None
        if not isinstance(text, str):
            raise UserError(
                f"{folder} has no chat template: expected {jinja.name}, which every exported run "
                "has. Run without it (--apply_chat_template, or --data.template chat), or add the "
                "file"
            )
        self.text, self._names = text, {}
        for role in ("bos", "eos", "unk", "pad"):
            token_id = getattr(tokenizer, f"{role}_token_id")
            if token_id is not None:
                self._names[f"{role}_token"] = tokenizer.token(token_id)
        self._special = re.compile("|".join(map(re.escape, tokenizer.special_names())) or "(?!)")

    def render(self, messages: Sequence[dict], add_generation_prompt: bool) -> str:
        """The text; without a generation prompt it ends with the last message, to be continued."""
        text = _without_marks(self._write(messages, add_generation_prompt))
        if not add_generation_prompt:
            last = messages[-1]["content"].strip()
            text = text[: text.rindex(last) + len(last)]
        return text

    def spans(
        self, contents: Sequence[str], add_generation_prompt: bool = False, system: str = ""
    ) -> Iterator[Span]:
        """Of question, answer, question ...: all of it, in order, as apply_chat_template writes it.

        system: the message before them; empty: none, and the template's own prompt if it has one.
        Supervised is what {% generation %} marks; without such marks every answer and the special
        token that ends it. Raises UserError for a template that changes what the turns say.
        """
        contents, first = [*([system] if system else []), *contents], bool(system)
        shape = self._shape(len(contents), add_generation_prompt, first)
        plain = [_without_marks(piece) for piece in shape]
        text = _without_marks(self._write(_messages(contents, first), add_generation_prompt))
        if (written := _find_contents(text, plain, contents)) is None:
            raise UserError(
                f"{self.path} writes more or less of a turn than its text, so its answers cannot "
                "be told apart. Choose another --data.template"
            )
        has_marks, inside = any(BEGIN in piece for piece in shape), False
        for i, piece in enumerate(shape):
            for part in re.split(f"({BEGIN}|{END})", piece):
                if part in (BEGIN, END):
                    inside = part == BEGIN
                    continue
                is_after_answer = i > first and (i - first) % 2 == 0
                end = self._end_of_turn(part) if is_after_answer and not has_marks else 0
                yield Span(part[:end], True, False)
                yield Span(part[end:], inside, False)
            if i < len(written):
                is_answer = i > first and (i - first) % 2 == 1
                yield Span(written[i], inside if has_marks else is_answer, True)

    def split(self, text: str) -> list[str]:
        """The template's own text, with special tokens apart: each is one of special_names."""
        return [part for part in re.split(f"({self._special.pattern})", text) if part]

    @cached_property
    def end_of_turn(self) -> str | None:
        """The special token that ends an answer."""
        piece = _without_marks(self._shape(2, False)[2])
        return piece[: self._end_of_turn(piece)].strip() or None

    def _end_of_turn(self, piece: str) -> int:
        """Where the special token ends with which the piece begins; 0: with none."""
        found = re.match(rf"\s*(?:{self._special.pattern})", piece)
        return found.end() if found else 0

    def _shape(
        self, num_turns: int, add_generation_prompt: bool, has_system: bool = False
    ) -> list[str]:
        """The template's own text before, between and after the turns."""
        marks = [chr(_FIRST_MARK + i) for i in range(num_turns)]
        rest, pieces = self._write(_messages(marks, has_system), add_generation_prompt), []
        for mark in marks:
            piece, found, rest = rest.partition(mark)
            if not found:
                left_out = "the system turn" if has_system and not pieces else "turns"
                raise UserError(
                    f"{self.path} leaves out {left_out} of a conversation of {num_turns}. Choose "
                    "another --data.template"
                )
            pieces.append(piece)
        return [*pieces, rest]

    def _write(self, messages: Sequence[dict], add_generation_prompt: bool) -> str:
        names = self._names | {"add_generation_prompt": add_generation_prompt}
        self._environment.start()
        try:
            return self._compiled.render(messages=messages, **names)
        except Exception as error:  # a template can raise anything
            has_system = any(message.get("role") == "system" for message in messages)
            given = ", given a system turn" if has_system else ""
            raise UserError(f"{self.path}{given}: {error}") from error

    @cached_property
    def _environment(self) -> BoundedEnvironment:
        return BoundedEnvironment()

    @cached_property
    def _compiled(self):
        return self._environment.compiled(self.text)


def _messages(contents: Sequence[str], has_system: bool) -> list[dict]:
    roles = chain(("system",) if has_system else (), cycle(("user", "assistant")))
    return [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]


def _find_contents(text: str, pieces: Sequence[str], contents: Sequence[str]) -> list[str] | None:
    """The turns as they stand between the pieces, some without white space at an end, or None.

    Templates trim turns of one role (Mistral's answers), or one end (Llama 2's first question).
    """
    rest, written = text, []
    for content, piece in zip(("", *contents), pieces, strict=True):
        trimmed = (content, content.rstrip(), content.lstrip(), content.strip())
        if (found := next((x for x in trimmed if rest.startswith(x + piece)), None)) is None:
            return None
        written.append(found)
        rest = rest[len(found + piece) :]
    return None if rest else written[1:]


def _without_marks(text: str) -> str:
    return text.replace(BEGIN, "").replace(END, "")
