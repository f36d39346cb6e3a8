"""The forms in which people write conversations, each as a record of LLaVA's form.

    LLaVA       "conversations": [{"from": "human" or "gpt", "value": text}, ...]
    ShareGPT    the same with other names of the speakers, such as user and assistant
    Alpaca      "instruction", "input" (may be empty) and "output": text, a conversation of one turn
    messages    "messages" or "conversations": [{"role": "user" or "assistant", "content": x}, ...]
                where x is text, or a list of {"type": "text", "text": ...} and {"type": "image"}

A first turn may be the system's; it can also stand in a field of its own. Pictures are in `image`,
in `images`, or in the parts of a message, in the order of their places.
"""

from collections.abc import Iterator

from mmalign.data.json_records import REPEATED
from mmalign.data.segments import IMAGE

LLAVA, SHAREGPT, MESSAGES, ALPACA = "LLaVA", "ShareGPT", "messages", "Alpaca"
SYSTEM_FIELDS = ("system", "system_prompt", "system_message")
_SPEAKERS = {
    **dict.fromkeys(("human", "user"), "human"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "model"), "gpt"),
    "system": "system",
}
_TURNS, _ALPACA = {"conversations", "messages"}, {"instruction", "output"}
_IMAGE_KEYS = ("image", "image_url", "path", "url")  # of a part: where its picture is


class FormError(ValueError):
    """A record that follows none of the forms; says what is wrong with it."""


def form_of(record: dict) -> str:
    """LLaVA, ShareGPT, messages or Alpaca, by structure; LLaVA's where it cannot be told."""
    if record.keys() >= _ALPACA and not record.keys() & _TURNS:
        return ALPACA
    turns = _turns(record)
    if any(isinstance(turn, dict) and "role" in turn for turn in turns):
        return MESSAGES
    if record.get("messages") == []:
        return MESSAGES
    names = [turn.get("from") for turn in turns if isinstance(turn, dict)]
    others = _SPEAKERS.keys() - {"human", "gpt", "system"}
    return SHAREGPT if any(isinstance(x, str) and x in others for x in names) else LLAVA


def as_llava(record: dict) -> dict:
    """The record with `conversations` from human and gpt, or first from system, and `image`.

    Fields that no form knows stay. Raises FormError.
    """
    written = [x for x in ("messages", "conversations") if x in record]
    written += ["instruction and output"] if record.keys() >= _ALPACA else []
    if len(written) > 1:
        raise FormError(f"it has both {' and '.join(written)}")
    if form_of(record) == ALPACA:
        record = _from_alpaca(record)
    record = _with_system_turn(_with_image(record))
    form = form_of(record)
    if form == LLAVA:
        return record
    turns, parts = _turns(record), []
    if form == MESSAGES:
        turns, parts = _from_messages(turns)
    named = [_with_known_speaker(turn) for turn in turns]
    record = {key: x for key, x in record.items() if key != "messages"} | {"conversations": named}
    if parts and record.get("image"):
        raise FormError("it has pictures both in its messages and in a field of its own")
    return record | {"image": parts} if parts else record


def _from_alpaca(record: dict) -> dict:
    if record.get("history"):
        raise FormError("it has a history, whose turns are not read; write all turns as messages")
    for name in ("instruction", "input", "output"):
        _require_text(record.get(name, ""), f"its {name}")
    question = "\n".join(x for x in (record["instruction"], record.get("input")) if x)
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": record["output"]}]
    rest = {key: x for key, x in record.items() if key not in ("instruction", "input", "output")}
    return rest | {"conversations": turns}


def _require_text(value: object, where: str) -> None:
    if not isinstance(value, str):
        raise FormError(f"{where} is {type(value).__name__}, expected text")


def _turns(record: dict) -> list:
    turns = record.get("messages", record.get("conversations"))
    return turns if isinstance(turns, list) else []


def _with_image(record: dict) -> dict:
    """`images` as `image`; a picture that is {"path": ...}, as Hugging Face has it, as its path."""
    name = "image" if record.get("image") is not None else "images"
    found = record.get(name)
    rest = {key: x for key, x in record.items() if key != name}
    if name == "images" and found == []:
        return rest
    if not isinstance(found, (list, dict, str)) or not found:
        return record
    return rest | {"image": [_path(x) for x in found] if isinstance(found, list) else _path(found)}


def _path(picture: object) -> object:
    if isinstance(picture, dict) and picture.get("path") and not picture.get("bytes"):
        return picture["path"]
    return picture


def _with_system_turn(record: dict) -> dict:
    texts = {name: record[name] for name in SYSTEM_FIELDS if record.get(name)}
    if not texts:
        return record
    (name, text), *more = texts.items()
    turns = _turns(record)
    speakers = [turn.get("from", turn.get("role")) for turn in turns if isinstance(turn, dict)]
    if more or "system" in speakers:
        raise FormError(f"it has several system prompts, one of them in its field {name!r}")
    if not isinstance(text, str):
        raise FormError(f"its field {name!r} is {type(text).__name__}, expected text")
    first = {"from": "system", "value": text}
    if form_of(record) == MESSAGES:
        first = {"role": "system", "content": text}
    key = "messages" if "messages" in record else "conversations"
    return {k: x for k, x in record.items() if k != name} | {key: [first, *turns]}


def _with_known_speaker(turn: object) -> object:
    if not isinstance(turn, dict):
        return turn
    speaker = turn.get("from")
    known = _SPEAKERS.get(speaker, speaker) if isinstance(speaker, str) else speaker
    return turn | {"from": known}


def _from_messages(messages: list) -> tuple[list, list]:
    """Turns, and the pictures of their parts."""
    turns, pictures = [], []
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict):
            raise FormError("a message is not an object with role and content")
        if calls := [x for x in ("tool_calls", "function_call") if message.get(x)]:
            raise FormError(f"a message has {calls[0]}, which no template writes")
        if both := [x for x in ("from", "value") if x in message and "role" in message]:
            raise FormError(f"message {number} has {both[0]} beside role and content")
        content = message.get("content")
        if isinstance(content, list):
            parts = [_part(part) for part in content]
            pictures += [picture for _, picture in parts if picture is not None]
            content = "".join(_joined([text for text, _ in parts]))
        _require_text(message.get("role"), f"role of message {number}")
        _require_text(content, f"content of message {number}")
        rest = {key: x for key, x in message.items() if key not in ("role", "content")}
        turns.append({"from": message.get("role"), "value": content} | rest)
    return turns, pictures


def _part(part: object) -> tuple[str, object]:
    """Its text, and where its picture is, if it says so."""
    if isinstance(part, dict) and REPEATED in part:
        raise FormError(f"the key {part[REPEATED]!r} stands twice in a part of a message")
    kind = part.get("type") if isinstance(part, dict) else None
    if isinstance(part, dict) and kind == "text":
        _require_text(part.get("text"), "text of a part of a message")
        return part["text"], None
    if not isinstance(part, dict) or kind not in ("image", "image_url"):
        raise FormError(f"a part of a message is of type {kind!r}, expected text or image")
    named = [key for key in _IMAGE_KEYS if part.get(key)]
    if len(named) > 1:
        raise FormError(f"an image of a message has both {named[0]!r} and {named[1]!r}")
    found = part[named[0]] if named else None
    return IMAGE, found.get("url", _path(found)) if isinstance(found, dict) else found


def _joined(texts: list[str]) -> Iterator[str]:
    """An image stands on a line of its own."""
    for before, text in zip(["", *texts], texts, strict=False):
        apart = IMAGE in (before, text) and before and not before.endswith("\n")
        yield "\n" if apart and not text.startswith("\n") else ""
        yield text
