"""A conversation template as the Jinja text that transformers and lm_eval read."""

import json
from itertools import takewhile

from mmalign.data.samples import Turn
from mmalign.data.segments import IMAGE, IMAGE_SENTINEL, Segment, special_ids
from mmalign.data.templates import Template, own_template, question_segments
from mmalign.tokenizer import Tokenizer

_MARKS = ("\ue000", "\ue001", "\ue002", "\ue003")  # question, answer, question, answer

_WRITTEN = """\
{%- macro written(content) -%}
  {%- if content is string -%}{{ content }}
  {%- else -%}
    {%- for part in content -%}
      {%- if part.type == "image" -%}{{ IMAGE }}{%- else -%}{{ part.text }}{%- endif -%}
    {%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
"""
_CHAT = """\
{%- for message in messages -%}
  {%- if message.role != ["user", "assistant"][loop.index0 % 2] -%}
    {{ raise_exception("user and assistant must alternate, user first; the template has its own "
                       ~ "system prompt") }}
  {%- endif -%}
  {%- set text = written(message.content) -%}
  {%- if message.role == "user" -%}
    {{ OPENING if loop.first else NEXT }}
    {%- if text.split(IMAGE) | length == 2 -%}
      {%- set text = text.replace(IMAGE, "") | trim -%}
      {{ MARKS }}{{ "\\n" ~ text if text else "" }}
    {%- else -%}{{ text.replace(IMAGE, MARKS) }}
    {%- endif -%}
  {%- else -%}{{ ANSWER }}{{ text }}{{ END if loop.last else "" }}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ PROMPT }}{%- endif -%}
"""

# before a template that takes strings alone: messages in parts become the strings of training
_STRINGS = """\
{%- if messages | rejectattr("content", "string") | list -%}
  {%- set strings = namespace(messages=[]) -%}
  {%- for message in messages -%}
    {%- set text = written(message.content) -%}
    {%- if text.split(IMAGE) | length == 2 -%}
      {%- set rest = text.replace(IMAGE, "") | trim -%}
      {%- set text = MARKS ~ ("\\n" ~ rest if rest else "") -%}
    {%- endif -%}
    {%- set one = {"role": message.role, "content": text.replace(IMAGE, MARKS)} -%}
    {%- set strings.messages = strings.messages + [one] -%}
  {%- endfor -%}
  {%- set messages = strings.messages -%}
{%- endif %}
"""
_CAPTION = """\
{%- for message in messages -%}
  {%- set text = written(message.content) -%}
  {%- if loop.index0 == 0 and message.role == "user" and IMAGE in text -%}
    {{ OPENING }}{{ MARKS * (text.split(IMAGE) | length - 1) }}
  {%- elif loop.index0 == 1 and message.role == "assistant" -%}{{ text }}{{ "\\n" }}
  {%- else -%}
    {{ raise_exception("the template is that of captions: one message of the user with an image, "
                       ~ "whose text is left out, and one of the assistant") }}
  {%- endif -%}
{%- endfor -%}
"""


def chat_template(
    template: Template, tokenizer: Tokenizer, use_im_start_end: bool, takes_images: bool = True
) -> str:
    """Jinja that writes what `template` renders; the tokenizer's own as it is, without images.

    The exported tokenizer gives the text exactly the ids of encode_conversation, or with
    add_generation_prompt those of encode_prompt.
    """
    if template.drops_question:
        bos = tokenizer.bos_token_id
        names = {
            "OPENING": "" if bos is None else tokenizer.token(bos),
            "MARKS": tokenizer.token(tokenizer.image_token_id),
            "IMAGE": IMAGE,
        }
        return _with_names(_CAPTION, names)
    special = special_ids(tokenizer, use_im_start_end)

    def text(segments) -> str:
        return "".join(_text(segment, tokenizer) for segment in segments)

    if template.is_own:
        own = own_template(tokenizer).text
        names = {"MARKS": text(question_segments(IMAGE, special)), "IMAGE": IMAGE}
        strings = _with_names(_STRINGS, names) if takes_images else ""
        return strings + own.removeprefix(strings)

    def render(*texts: str) -> list[Segment]:
        turns = [Turn(("human", "gpt")[i % 2], text) for i, text in enumerate(texts)]
        return list(template.render(turns, special))

    rest = text(render(*_MARKS))
    pieces = []
    for mark in _MARKS:
        piece, _, rest = rest.partition(mark)
        pieces.append(piece)
    opening, answer, following, _ = pieces
    asked = takewhile(lambda segment: not segment[1], render(*_MARKS[:2]))
    prompt = text(asked).partition(_MARKS[0])[2]
    marks = text(render(IMAGE, _MARKS[1])).removeprefix(opening).partition(answer)[0]
    names = {"OPENING": opening, "NEXT": following, "ANSWER": answer, "END": rest}
    names |= {"PROMPT": prompt, "MARKS": marks, "IMAGE": IMAGE}
    return _with_names(_CHAT, names)


def _with_names(text: str, names: dict[str, str]) -> str:
    values = [f"{{%- set {name} = {json.dumps(value)} -%}}" for name, value in names.items()]
    return "\n".join([*values, _WRITTEN + text])


def _text(segment: Segment, tokenizer: Tokenizer) -> str:
    item = segment[0]
    if isinstance(item, str):
        return item
    return tokenizer.token(tokenizer.image_token_id if item == IMAGE_SENTINEL else item)
