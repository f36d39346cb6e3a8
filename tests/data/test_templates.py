"""Templates against the recorded output of the reference code."""

import json
from collections import Counter

import pytest
import tokenizers

from mmalign.batch import IGNORE_INDEX
from mmalign.data.samples import Turn
from mmalign.data.segments import IMAGE_SENTINEL, SpecialIds
from mmalign.data.templates import TEMPLATES, encode_conversation, encode_prompt
from mmalign.tokenizer import Tokenizer

# the others need special tokens of their own: test_special_token_templates.py
OF_TEXT = {x: y for x, y in TEMPLATES.items() if not y.end_of_turn and not y.is_own}
TURNS = [Turn("human", "<image>\nwhat is it"), Turn("gpt", "a boat"), Turn("human", "is it red")]
TURNS += [Turn("gpt", "it looks green\n\nor blue")]


@pytest.fixture(scope="module")
def gold(shared_data) -> list[dict]:
    samples = json.loads((shared_data / "formats/conversations.json").read_text())["samples"]
    assert Counter(s["template"] for s in samples)["v1"] > 20
    return [s for s in samples if not s["mismatch"] and "reference_mask_wrong" not in s]


def turns_of(sample: dict) -> list[Turn]:
    return [Turn(turn["from"], turn["value"]) for turn in sample["conversations"]]


def encode(sample: dict, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    template, use_im_start_end = TEMPLATES[sample["template"]], sample["mm_use_im_start_end"]
    return encode_conversation(turns_of(sample), template, tokenizer, use_im_start_end)


@pytest.mark.parametrize("template", ["plain", "v1", "llama_2", "llava_llama_2"])
def test_ids_and_labels_equal_the_reference(gold, llama_tokenizer, template):
    for sample in (s for s in gold if s["template"] == template):
        ids, labels = encode(sample, llama_tokenizer)
        assert ids == sample["input_ids"], sample["id"]
        assert labels == sample["labels"], sample["id"]


def test_v0_equals_the_reference_on_answers_and_end_markers(gold, llama_tokenizer):
    for sample in (s for s in gold if s["template"] == "v0"):
        ids, labels = encode(sample, llama_tokenizer)
        assert ids == sample["input_ids"], sample["id"]
        runs = supervised_runs(ids, labels)
        answers = [turn.text for turn in turns_of(sample) if turn.speaker == "gpt"]
        # as the file writes them: " " + answer, newline, and the "###" that generation stops at
        expected = [f" {answer}\n###" for answer in answers]
        assert [text_of(run, llama_tokenizer) for run in runs] == expected
        pairs = list(zip(labels, sample["labels"], strict=True))
        assert all(ours in (IGNORE_INDEX, theirs) for ours, theirs in pairs)
        left_out = [theirs for ours, theirs in pairs if ours != theirs]
        assert text_of(left_out, llama_tokenizer) == "###" + "### Assistant:" * len(answers) + " "


def test_tokenizer_json_gives_the_same_ids_and_labels(gold, llama_tokenizer, tmp_path):
    llama_tokenizer.save(tmp_path)
    from_json = Tokenizer.from_pretrained(tmp_path / "tokenizer.json")
    for sample in gold:
        assert encode(sample, from_json) == encode(sample, llama_tokenizer), sample["id"]


def test_prompts_equal_the_reference(gold, llama_tokenizer):
    tokenizer = llama_tokenizer
    names = {1: "<s>", 2: "</s>", IMAGE_SENTINEL: "<image>"}
    names |= {tokenizer.im_start_id: "<im_start>", tokenizer.im_end_id: "<im_end>"}
    for sample in gold:
        special = SpecialIds(1, 2, 32001, 32002, sample["mm_use_im_start_end"])
        segments = TEMPLATES[sample["template"]].render(turns_of(sample), special)
        text = "".join(item if isinstance(item, str) else names[item] for item, _ in segments)
        assert text.removeprefix("<s>") == sample["prompt"], (sample["id"], sample["template"])


def supervised_runs(ids: list[int], labels: list[int]) -> list[list[int]]:
    runs, open_run = [], False
    for token_id, label in zip(ids, labels, strict=True):
        assert label in (IGNORE_INDEX, token_id)
        if label != IGNORE_INDEX:
            runs = runs if open_run else [*runs, []]
            runs[-1].append(token_id)
        open_run = label != IGNORE_INDEX
    return runs


def text_of(ids: list[int], tokenizer: Tokenizer) -> str:
    """With the blanks that a decoder drops at the beginning of a text."""
    anchor = tokenizer.encode("x")
    return tokenizer.decode(anchor + ids).removeprefix("x")


def test_supervised_ids_decode_to_the_answers(gold, llama_tokenizer):
    ends = {"plain": "\n", "v0": "\n###", "v1": "", "llama_2": " ", "llava_llama_2": " "}
    for sample in gold:
        ids, labels = encode(sample, llama_tokenizer)
        runs = supervised_runs(ids, labels)
        answers = [turn.text for turn in turns_of(sample) if turn.speaker == "gpt"]
        end = ends[sample["template"]]
        assert [text_of(run, llama_tokenizer) for run in runs] == [f" {a}{end}" for a in answers]
        if sample["template"] in ("v1", "llama_2", "llava_llama_2"):
            assert all(run[-1] == llama_tokenizer.eos_token_id for run in runs)


def test_special_tokens_in_a_text_stay_text(llama_tokenizer):
    turns = [Turn("human", "What does </s> mean?"), Turn("gpt", "</s> ends a text; <s> begins it.")]
    ids, labels = encode_conversation(turns, TEMPLATES["v1"], llama_tokenizer, True)
    assert ids.count(2) == 1 and ids.count(1) == 1
    assert labels[-1] == 2


@pytest.mark.parametrize("use_im_start_end", [True, False])
@pytest.mark.parametrize("template", OF_TEXT.values(), ids=OF_TEXT)
def test_prompt_is_where_the_last_answer_begins(tokenizer, template, use_im_start_end):
    turns = TURNS[:2] if template.single_turn else TURNS
    ids, labels = encode_conversation(turns, template, tokenizer, use_im_start_end)
    prompt = encode_prompt(turns[:-1], template, tokenizer, use_im_start_end)
    assert ids[: len(prompt)] == prompt
    last_run = supervised_runs(ids, labels)[-1]
    assert ids[len(prompt) : len(prompt) + len(last_run)] == last_run


@pytest.mark.parametrize("template", OF_TEXT.values(), ids=OF_TEXT)
def test_the_fields_of_a_template_are_true_of_its_text(template):
    special = SpecialIds(bos=1, eos=2, im_start=3, im_end=4, use_im_start_end=True)
    turns = TURNS[:2] if template.single_turn else TURNS
    segments = list(template.render(turns, special))
    items = [item for item, _ in segments]
    text = "".join(item for item in items if isinstance(item, str))
    assert ({3, 4} <= set(items)) == template.writes_image_tokens
    assert ("what is it" in text) != template.drops_question
    last_supervised = [item for item, supervised in segments if supervised][-1]
    if template.stop:
        assert last_supervised.endswith(template.stop)
    elif not template.single_turn:  # in a conversation the model learns to stop
        assert last_supervised == special.eos


def test_an_id_across_a_boundary_is_supervised(tmp_path):
    """A byte-level tokenizer that joins the blank, a word and the newline after it."""
    merges = [("b", "o"), ("bo", "at"), ("a", "t"), ("boat", "\u010a"), ("\u0120", "boat\u010a")]
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    pieces = [*alphabet, "<s>", "</s>", "at", "bo", "boat", "boat\u010a", "\u0120boat\u010a"]
    merges.sort(key=lambda pair: pieces.index("".join(pair)))
    vocab = {piece: i for i, piece in enumerate(pieces)}
    model = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges))
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(False, use_regex=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    model.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    turns = [Turn("human", "q"), Turn("gpt", "boat")]
    ids, labels = encode_conversation(turns, TEMPLATES["v0"], tokenizer, False)
    supervised = [tokenizer.token(i) for i in supervised_runs(ids, labels)[0]]
    assert supervised == ["\u0120boat\u010a", "#", "#", "#"]
