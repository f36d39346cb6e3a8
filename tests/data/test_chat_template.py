"""The exported chat template against our templates, through transformers' own Jinja."""

import pytest
import transformers

from mmalign.data.chat_template import chat_template
from mmalign.data.samples import Turn
from mmalign.data.segments import IMAGE_SENTINEL
from mmalign.data.templates import TEMPLATES, encode_conversation, encode_prompt

CONVERSATIONS = {
    "one turn": [("What is  this?", "A boat.")],
    "three turns": [("Hi", "Hello\nthere"), ("And ", " so"), ("why?\n\nWhy?", "no")],
    "image": [("<image>\nWhat is it?", "A boat"), ("Is it red?", "Green")],
    "image behind": [("  What is it? <image>", "A boat")],
    "image alone": [("<image>", "A boat")],
    "image later": [("Hi", "Hello"), ("<image> And this?", "A pier")],
    "two images": [("<image>\n<image>\nWhich?", "A boat"), ("Is it red?", "Green")],
    "images between words": [(" Is <image>  like <image>, or ", "so"), ("<image> this?", "no")],
    "images alone": [("<image><image>", "A boat")],
    "quotes": [('"It\'s {{ a }} \\n {% b %}"', "c")],
}
SPEAKERS = ("human", "gpt")
NEED_TOKENS = ("llama_3", "chatml", "chat")  # test_special_token_templates.py
CHATS = [x for x, y in TEMPLATES.items() if not y.drops_question and x not in NEED_TOKENS]


def messages_of(turns: list[Turn], as_parts: bool) -> list[dict]:
    """The conversation as transformers takes it; as_parts: images as parts of their own."""
    messages = []
    for turn in turns:
        content = turn.text
        if as_parts:
            first, *rest = turn.text.split("<image>")
            content = [{"type": "text", "text": first}]
            for text in rest:
                content += [{"type": "image"}, {"type": "text", "text": text}]
        messages.append(
            {"role": "user" if turn.speaker == "human" else "assistant", "content": content}
        )
    return messages


@pytest.fixture(scope="module")
def theirs(llama_tokenizer, tmp_path_factory):
    """transformers' tokenizer of an export, by template and use_im_start_end."""

    def load(name: str, marks: bool):
        folder = tmp_path_factory.mktemp("export")
        chat = chat_template(TEMPLATES[name], llama_tokenizer, marks)
        llama_tokenizer.save(folder, num_rows=32003, chat_template=chat)
        return transformers.AutoTokenizer.from_pretrained(folder)

    return load


@pytest.mark.parametrize("marks", [True, False], ids=["marks", "no marks"])
@pytest.mark.parametrize("name", CHATS)
def test_ids_equal_ours(theirs, llama_tokenizer, name, marks):
    template, loaded = TEMPLATES[name], theirs(name, marks)

    def ids(messages, prompt: bool) -> list[int]:
        text = loaded.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        return loaded(text, add_special_tokens=False)["input_ids"]

    for case, pairs in CONVERSATIONS.items():
        turns = [Turn(s, text) for pair in pairs for s, text in zip(SPEAKERS, pair, strict=True)]
        whole, _ = encode_conversation(turns, template, llama_tokenizer, marks)
        prompt = encode_prompt(turns[:-1], template, llama_tokenizer, marks)
        image = llama_tokenizer.image_token_id
        whole, prompt = ([image if i == IMAGE_SENTINEL else i for i in x] for x in (whole, prompt))
        for as_parts in (False, True):
            messages = messages_of(turns, as_parts)
            assert ids(messages, False) == whole, case
            assert ids(messages[:-1], True) == prompt, case


def test_other_orders_are_refused(theirs):
    loaded = theirs("v1", True)
    for roles in (["system", "user"], ["user", "user"], ["assistant"]):
        messages = [{"role": role, "content": "x"} for role in roles]
        with pytest.raises(Exception, match="must alternate"):
            loaded.apply_chat_template(messages, tokenize=False)


def test_captions(theirs, llama_tokenizer):
    """Template plain leaves the question out; without an image nothing would be left of it."""
    loaded = theirs("plain", True)

    def ids(messages, prompt: bool) -> list[int]:
        text = loaded.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        return loaded(text, add_special_tokens=False)["input_ids"]

    for case in ("image behind", "image alone", "images alone"):
        turns = [Turn(s, x) for s, x in zip(SPEAKERS, CONVERSATIONS[case][0], strict=True)]
        ours, _ = encode_conversation(turns, TEMPLATES["plain"], llama_tokenizer, True)
        ours = [llama_tokenizer.image_token_id if i == IMAGE_SENTINEL else i for i in ours]
        for as_parts in (False, True):
            messages = messages_of(turns, as_parts)
            opening = 1 + turns[0].text.count("<image>")  # <s> and the images
            assert ids(messages, False) == ours and ids(messages[:1], True) == ours[:opening]
    asked = messages_of([Turn("human", "<image>")], False)
    for messages in (messages_of([Turn("human", "Hi")], False), asked * 2):
        with pytest.raises(Exception, match="is that of captions"):
            ids(messages, False)
