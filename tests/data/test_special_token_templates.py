"""Templates with special tokens, and the tokenizer's own, against apply_chat_template."""

import json

import pytest
import tokenizers
import transformers

from mmalign.batch import IGNORE_INDEX
from mmalign.config import DataConfig
from mmalign.data.chat_template import chat_template
from mmalign.data.dataset import ConversationDataset
from mmalign.data.samples import Turn
from mmalign.data.segments import IMAGE_SENTINEL
from mmalign.data.templates import TEMPLATES, encode_conversation, encode_prompt, end_ids
from mmalign.errors import UserError
from mmalign.tokenizer import Tokenizer
from mmalign.tokenizer.chat_template import ChatTemplate

# the published templates, shortened to user and assistant
LLAMA_3 = """{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = \
'<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + \
'<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}\
{{ content }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant\
<|end_header_id|>\n\n' }}{% endif %}"""
QWEN_2 = """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}\
{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + \
message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
MISTRAL = """{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}\
{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}{{ ' ' + message['content'] + \
eos_token }}{% endif %}{% endfor %}"""
# with generation marks, which here leave the end of the turn out
MARKED = """{% for message in messages %}<|im_start|>{{ message['role'] }}
{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}{% endgeneration %}\
{% else %}{{ message['content'] }}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
SUMMARY = "{% for m in messages %}{{ m.content | upper }}<|im_end|>{% endfor %}"
SPECIAL = {
    "llama_3": ("<|bos|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"),
    "chatml": (None, "<|im_end|>", "<|im_start|>"),
    "marked": (None, "<|im_end|>", "<|im_start|>"),
    "summary": (None, "<|im_end|>", "<|im_start|>"),
    "mistral": ("<s>", "</s>"),
    "silent": ("<s>", "</s>"),
    "trims answers": ("<s>", "</s>"),
    "trims the end": ("<s>", "</s>"),
    "mistral-v3": ("<s>", "</s>", "[INST]", "[/INST]"),
}
TEXTS = {"llama_3": LLAMA_3, "chatml": QWEN_2, "mistral": MISTRAL, "mistral-v3": MISTRAL}
# leaves out what is neither question nor answer
SILENT = MISTRAL.replace("{% else %}", "{% elif message['role'] == 'assistant' %}")
# as Mistral's third version and Llama 2's do
TRIMS_ANSWERS = MISTRAL.replace("' ' + message['content']", "' ' + message['content'] | trim")
TRIMS_THE_END = MISTRAL.replace(
    "'[INST] ' + message['content']", "('[INST] ' + message['content']).rstrip()"
)
OWN = TEXTS | {"marked": MARKED, "summary": SUMMARY, "silent": SILENT}
OWN |= {"trims answers": TRIMS_ANSWERS, "trims the end": TRIMS_THE_END}
CONVERSATIONS = {
    "one turn": [("What is  this?", "A boat.")],
    "three turns": [("Hi", "Hello\nthere"), ("And so", "so"), ("why?\n\nWhy?", "assistant")],
    "special tokens in a text": [("<s> is", "an end")],
}
SPEAKERS = ("human", "gpt")


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """A byte-level tokenizer with the special tokens of one family and its chat template."""

    def make(name: str):
        folder = tmp_path_factory.mktemp("tokenizer")
        bos, eos, *_ = special = SPECIAL[name]
        model = tokenizers.Tokenizer(tokenizers.models.BPE())
        model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        model.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=[token for token in special if token],
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        model.train_from_iterator(["what is this a boat hello there assistant user"] * 9, trainer)
        model.save(str(folder / "tokenizer.json"))
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos}
        settings |= {"eos_token": eos, "unk_token": None}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        (folder / "chat_template.jinja").write_text(OWN[name])
        return folder

    return make


def turns_of(pairs) -> list[Turn]:
    return [Turn(s, text) for pair in pairs for s, text in zip(SPEAKERS, pair, strict=True)]


def messages_of(turns: list[Turn], in_parts: bool = False) -> list[dict]:
    roles = {"human": "user", "gpt": "assistant"}
    return [
        {"role": roles[turn.speaker], "content": parts_of(turn.text) if in_parts else turn.text}
        for turn in turns
    ]


def parts_of(text: str) -> list[dict]:
    first, *rest = ({"type": "text", "text": x} for x in text.split("<image>"))
    return [first, *(x for part in rest for x in ({"type": "image"}, part))]


def their_ids(folder, messages: list[dict], prompt: bool) -> list[int]:
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    return theirs(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("case", ("one turn", "three turns"))
@pytest.mark.parametrize("name", ("llama_3", "chatml", "mistral", "mistral-v3", "marked"))
def test_own_template_equals_apply_chat_template(folder_of, name, case):
    folder, turns = folder_of(name), turns_of(CONVERSATIONS[case])
    tokenizer = Tokenizer.from_pretrained(folder)
    ids, labels = encode_conversation(turns, TEMPLATES["chat"], tokenizer, False)
    assert ids == their_ids(folder, messages_of(turns), False)
    prompt = encode_prompt(turns[:-1], TEMPLATES["chat"], tokenizer, False)
    assert prompt == their_ids(folder, messages_of(turns[:-1]), True)
    end = "" if name == "marked" else SPECIAL[name][1]
    answers = "".join(f"{turn.text}{end}" for turn in turns if turn.speaker == "gpt")
    supervised = [i for i in labels if i != IGNORE_INDEX]
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    # the template's blank before an answer counts where the tokenizer joins it to the answer
    assert theirs.decode(supervised).replace(" ", "") == answers.replace(" ", "")


@pytest.mark.parametrize("name", ("llama_3", "trims answers", "trims the end"))
def test_white_space_that_a_template_takes_away(folder_of, name):
    folder, turns = folder_of(name), turns_of([(" What \n", "  A boat. "), ("so ", "so")])
    tokenizer = Tokenizer.from_pretrained(folder)
    ids, _ = encode_conversation(turns, TEMPLATES["chat"], tokenizer, False)
    assert ids == their_ids(folder, messages_of(turns), False)


@pytest.mark.parametrize("case", ("one turn", "three turns"))
@pytest.mark.parametrize("name", ("llama_3", "chatml", "marked"))
def test_a_system_turn_is_written_as_by_apply_chat_template(folder_of, name, case):
    """And changes nothing of what is supervised."""
    folder, turns = folder_of(name), turns_of(CONVERSATIONS[case])
    tokenizer = Tokenizer.from_pretrained(folder)
    system = Turn("system", "You are  a boat.\nBe brief.")
    messages = [{"role": "system", "content": system.text}, *messages_of(turns)]
    expected = their_ids(folder, messages, False)
    end = tokenizer.encode("\n") if name == "chatml" else []
    for template in ("chat", name) if name in TEMPLATES else ("chat",):
        ids, labels = encode_conversation([system, *turns], TEMPLATES[template], tokenizer, False)
        assert ids + (end if template == "chatml" else []) == expected
        _, plain = encode_conversation(turns, TEMPLATES[template], tokenizer, False)
        kept, before = ([i for i in x if i != IGNORE_INDEX] for x in (labels, plain))
        assert kept == before


def test_a_template_that_leaves_out_a_system_turn_is_refused(folder_of):
    tokenizer = Tokenizer.from_pretrained(folder_of("silent"))
    turns = [Turn("system", "Be brief."), *turns_of(CONVERSATIONS["one turn"])]
    with pytest.raises(UserError, match="leaves out the system turn"):
        encode_conversation(turns, TEMPLATES["chat"], tokenizer, False)
    strict = "{% if messages[0].role != 'user' %}{{ raise_exception('must alternate') }}{% endif %}"
    (tokenizer.path.parent / "chat_template.jinja").write_text(strict + SILENT)
    tokenizer = Tokenizer.from_pretrained(tokenizer.path.parent)
    with pytest.raises(UserError, match="jinja, given a system turn: must alternate"):
        encode_conversation(turns, TEMPLATES["chat"], tokenizer, False)


@pytest.mark.parametrize("case", ("one turn", "three turns"))
def test_mask_equals_that_of_generation_marks(folder_of, case):
    folder, turns = folder_of("marked"), turns_of(CONVERSATIONS[case])
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    expected = theirs.apply_chat_template(
        messages_of(turns), return_dict=True, return_assistant_tokens_mask=True
    )
    tokenizer = Tokenizer.from_pretrained(folder)
    ids, labels = encode_conversation(turns, TEMPLATES["chat"], tokenizer, False)
    assert ids == expected["input_ids"]
    assert [int(label != IGNORE_INDEX) for label in labels] == expected["assistant_masks"]


@pytest.mark.parametrize("case", ("one turn", "three turns"))
@pytest.mark.parametrize("name", ("llama_3", "chatml", "mistral", "mistral-v3"))
def test_named_templates_equal_the_published_ones(folder_of, name, case):
    folder, turns = folder_of(name), turns_of(CONVERSATIONS[case])
    tokenizer, template = Tokenizer.from_pretrained(folder), TEMPLATES[name.removesuffix("-v3")]
    ids, labels = encode_conversation(turns, template, tokenizer, False)
    expected = their_ids(folder, messages_of(turns), False)
    end = tokenizer.encode("\n") if name == "chatml" else []  # which no answer needs
    assert ids + end == expected
    own_ids, own_labels = encode_conversation(turns, TEMPLATES["chat"], tokenizer, False)
    differing = {i for i, a, b in zip(ids, labels, own_labels, strict=False) if a != b}
    assert own_ids == expected
    assert differing <= ({*tokenizer.encode(" ")} if name.startswith("mistral") else set())
    prompt = encode_prompt(turns[:-1], template, tokenizer, False)
    assert prompt == their_ids(folder, messages_of(turns[:-1]), True)
    assert set(end_ids(template, tokenizer)) <= set(end_ids(TEMPLATES["chat"], tokenizer))


@pytest.mark.parametrize("name", ("llama_3", "chatml", "mistral-v3"))
def test_exported_template_gives_the_ids_of_training(folder_of, name, tmp_path):
    tokenizer = Tokenizer.from_pretrained(folder_of(name))
    template, turns = TEMPLATES[name.removesuffix("-v3")], turns_of(CONVERSATIONS["three turns"])
    tokenizer.save(tmp_path, 0, chat_template(template, tokenizer, False))
    ids, _ = encode_conversation(turns, template, tokenizer, False)
    assert their_ids(tmp_path, messages_of(turns), False) == ids
    assert Tokenizer.from_pretrained(tmp_path).bos_token_id == tokenizer.bos_token_id


@pytest.mark.parametrize("name", ("llama_3", "chatml", "chat"))
def test_an_image_stands_at_the_front_of_its_turn(folder_of, name):
    tokenizer = Tokenizer.from_pretrained(folder_of("chatml" if name == "chat" else name))
    turns = turns_of([("What is it? <image>", "A boat"), ("Is it red?", "no")])
    ids, labels = encode_conversation(turns, TEMPLATES[name], tokenizer, True)
    at = ids.index(IMAGE_SENTINEL)
    assert ids[at - 1 : at + 2 : 2] == [tokenizer.im_start_id, tokenizer.im_end_id]
    assert ids.count(IMAGE_SENTINEL) == 1 and labels[at] == IGNORE_INDEX
    question = tokenizer.encode("What is it?")  # <im_end> strips the line end behind it
    assert ids[at + 2 : at + 2 + len(question)] == question


@pytest.mark.parametrize("name", ("llama_3", "chatml", "chat"))
def test_several_images_stand_at_their_places(folder_of, name):
    """The template of the folder writes the text around <image> as it writes any other."""
    folder = folder_of("chatml" if name == "chat" else name)
    tokenizer, question = Tokenizer.from_pretrained(folder), "Is <image> like <image>?"
    turns = turns_of([(question, "A boat"), ("<image>\nand it?", "no")])
    ids, labels = encode_conversation(turns, TEMPLATES[name], tokenizer, False)
    assert ids.count(IMAGE_SENTINEL) == 3
    assert all(labels[i] == IGNORE_INDEX for i, x in enumerate(ids) if x == IMAGE_SENTINEL)
    config = json.loads((folder / "tokenizer.json").read_text())
    image = {"id": 10**4, "content": "<image>", "special": True, "normalized": False}
    config["added_tokens"].append(image | dict.fromkeys(("single_word", "lstrip", "rstrip"), False))
    (folder / "tokenizer.json").write_text(json.dumps(config))
    theirs = their_ids(folder, messages_of(turns), False)
    image_id = transformers.AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids("<image>")
    expected = [IMAGE_SENTINEL if i == image_id else i for i in theirs]
    assert expected[: len(ids)] == ids


@pytest.mark.parametrize("marks", (True, False))
@pytest.mark.parametrize("name", ("llama_3", "chatml"))
def test_the_own_template_takes_messages_in_parts_once_exported(folder_of, name, marks, tmp_path):
    """As processors pass them, and as before where an export is exported again."""
    tokenizer, template = Tokenizer.from_pretrained(folder_of(name)), TEMPLATES["chat"]
    assert chat_template(template, tokenizer, marks, takes_images=False) == OWN[name]
    pairs = [("Hi <image>\n", "A boat"), ("Is <image> like <image>?", "so"), ("why?", "so")]
    ids, _ = encode_conversation(turns_of(pairs), template, tokenizer, marks)
    expected = [tokenizer.image_token_id if i == IMAGE_SENTINEL else i for i in ids]
    for folder in (tmp_path / "export", tmp_path / "again"):
        chat = chat_template(template, tokenizer, marks)
        tokenizer.save(folder, tokenizer.im_end_id + 1, chat)
        tokenizer = Tokenizer.from_pretrained(folder)
        assert their_ids(folder, messages_of(turns_of(pairs), in_parts=True), False) == expected
        assert encode_conversation(turns_of(pairs), template, tokenizer, marks)[0] == ids
    assert chat == chat_template(template, tokenizer, marks)


def test_a_special_token_in_a_text_is_text(folder_of):
    tokenizer = Tokenizer.from_pretrained(folder_of("mistral-v3"))
    turns = turns_of([("<s>[INST] x", "</s>")])
    for name in ("mistral", "chat"):
        ids, _ = encode_conversation(turns, TEMPLATES[name], tokenizer, False)
        assert ids.count(tokenizer.bos_token_id) == ids.count(tokenizer.eos_token_id) == 1


def test_templates_that_cannot_be_used_are_refused(folder_of, tmp_path):
    turns = turns_of(CONVERSATIONS["one turn"])
    tokenizer = Tokenizer.from_pretrained(folder_of("summary"))
    with pytest.raises(UserError, match="writes more or less of a turn than its text"):
        encode_conversation(turns, TEMPLATES["chat"], tokenizer, False)
    with pytest.raises(UserError, match=r"needs the special token <\|start_header_id\|>"):
        encode_conversation(turns, TEMPLATES["llama_3"], tokenizer, False)
    (tokenizer.path.parent / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="has no chat template"):
        other = Tokenizer.from_pretrained(tokenizer.path.parent)
        encode_conversation(turns, TEMPLATES["chat"], other, False)


LOOPS = "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3


@pytest.mark.parametrize(
    "text, said",
    [
        (LOOPS, "its loops and calls take more than 1,000,000 steps"),
        ("{{ 'a' * 10**10 }}", "a product in it is larger than 1,000,000"),
        ("{{ eos_token * 999999 }}", "a product in it is larger than 1,000,000"),
        ("{% for m in messages %}", "Unexpected end of template"),
    ],
)
def test_a_template_that_is_at_fault_itself_is_named_before_a_sample(folder_of, text, said):
    folder = Tokenizer.from_pretrained(folder_of("summary")).path.parent
    (folder / "chat_template.jinja").write_text(text)
    data = DataConfig(template="chat", text_only=True)
    with pytest.raises(UserError, match=f"--data.template chat: .*chat_template.jinja: {said}"):
        ConversationDataset([], Tokenizer.from_pretrained(folder), data, None)


def test_of_several_named_templates_the_default_is_taken(folder_of):
    tokenizer = Tokenizer.from_pretrained(folder_of("summary"))
    folder, text = tokenizer.path.parent, "{% for m in messages %}{{ m.content }}{% endfor %}"
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": text}]
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": named}))
    assert ChatTemplate(folder, tokenizer).text == text
