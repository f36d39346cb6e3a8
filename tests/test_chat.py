"""scripts/chat.py on a small random LLaVA: answers of transformers, prompts written by hand."""

import io
import json
import runpy
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
import pytest
import sentencepiece
import torch
from PIL import Image
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from mmalign.chat import Conversation
from mmalign.errors import UserError
from mmalign.model.generate import GenerationOptions
from tests.model.tiny import IMAGE_SIZE, NUM_PATCHES, clip_config, hf_pixels, randomize

ROOT = Path(__file__).resolve().parents[1]
VOCAB, IMAGE, IM_START, IM_END = 300, 300, 301, 302
WORDS = ("red", "blue", "green", "small", "large", "circle", "square", "near", "above", "below")
WORDS += ("what", "is", "the", "a", "this", "it")
SYSTEM = {
    "v0": "A chat between a curious human and an artificial intelligence assistant. The assistant "
    "gives helpful, detailed, and polite answers to the human's questions.",
    "v1": "A chat between a curious user and an artificial intelligence assistant. The assistant "
    "gives helpful, detailed, and polite answers to the user's questions.",
}


@dataclass(frozen=True)
class Run:
    folder: Path
    model: LlavaForConditionalGeneration
    pieces: sentencepiece.SentencePieceProcessor
    picture: Path

    def answer(self, parts: list, pixels=None, num_tokens: int = 12) -> str:
        """parts: texts and special ids of the prompt."""
        ids = [i for x in parts for i in ([x] if isinstance(x, int) else self.pieces.encode(x))]
        images = {} if pixels is None else {"pixel_values": hf_pixels(pixels)}
        settings = dict(do_sample=False, pad_token_id=0, max_new_tokens=num_tokens)
        found = self.model.generate(torch.tensor([ids]), **images, **settings)
        return self.pieces.decode(found[0, len(ids) :].tolist()).strip()


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    """A run folder as training leaves it, and beside it "text", a bare language model."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    seeing, blind = folder / "export" / "llava", folder / "export" / "llama"
    model = _random_llava()
    model.save_pretrained(seeing)
    language = LlamaForCausalLM(model.config.text_config)
    language.model, language.lm_head = model.model.language_model, model.lm_head
    language.save_pretrained(blind)
    _train_tokenizer(seeing)
    shutil.copy(seeing / "tokenizer.model", blind)
    shutil.copytree(blind, folder.parent / "text")
    settings = {"template": "v1", "use_im_start_end": True}
    (folder / "config.json").write_text(json.dumps({"data": settings}))
    pixels = np.random.default_rng(0).integers(0, 256, (IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    Image.fromarray(pixels).save(folder / "picture.png")
    pieces = sentencepiece.SentencePieceProcessor(str(seeing / "tokenizer.model"))
    return Run(folder, model, pieces, folder / "picture.png")


def _random_llava() -> LlavaForConditionalGeneration:
    text = LlamaConfig(
        vocab_size=VOCAB + 3,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=400,
    )
    config = LlavaConfig(
        vision_config=clip_config(),
        text_config=text,
        projector_hidden_act="linear",
        image_token_index=IMAGE,
        image_seq_length=NUM_PATCHES,
    )
    model = randomize(LlavaForConditionalGeneration(config))
    second = model.model.multi_modal_projector.linear_2
    torch.nn.init.eye_(second.weight)
    torch.nn.init.zeros_(second.bias)
    # no special token, ###, byte or image token: what it writes is words
    model.lm_head.weight.data[[*range(260), IMAGE, IM_START, IM_END]] = 0
    return model


def _train_tokenizer(folder: Path) -> None:
    random = Random(3)
    answers = ("Yes", "yes", "No", "no")  # a piece each, so that a first token tells them apart
    sentences = [" ".join([*random.sample(WORDS, 9), *answers]) for _ in range(200)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=VOCAB,
        user_defined_symbols=["###"],
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
    )


def chat(run: Run, monkeypatch, capsys, *arguments: object, stdin: str | None = None) -> str:
    """Standard output of the script."""
    command = ["chat.py", "--model", run.folder, "--max-new-tokens", 12, *arguments]
    monkeypatch.setattr(sys, "argv", [str(x) for x in command])
    if stdin is not None:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
    runpy.run_path(str(ROOT / "scripts" / "chat.py"), run_name="__main__")
    return capsys.readouterr().out


def pixels_of(path: Path) -> torch.Tensor:
    return torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)[None]


def first_question(question: str) -> list:
    picture = [IM_START, *[IMAGE] * NUM_PATCHES, IM_END]
    return [1, f"{SYSTEM['v1']} USER:", *picture, f"{question} ASSISTANT:"]


def test_one_answer_about_a_picture(run, monkeypatch, capsys):
    expected = run.answer(first_question("what is this"), pixels_of(run.picture))
    found = chat(run, monkeypatch, capsys, "--image", run.picture, "--prompt", " what is this\n")
    assert found == expected + "\n"
    assert expected != run.answer(first_question("what is this"), 255 - pixels_of(run.picture))


def test_conversation_through_a_pipe(run, monkeypatch, capsys):
    """The second question follows the first answer; after /new there is neither."""
    pixels, lines = pixels_of(run.picture), ["what is this", "is it large", "/new", "what is red"]
    first = run.answer(first_question(lines[0]), pixels)
    follows = [*first_question(lines[0])[:-1], f"{lines[0]} ASSISTANT: {first}", 2]
    second = run.answer([*follows, f"USER: {lines[1]} ASSISTANT:"], pixels)
    third = run.answer([1, f"{SYSTEM['v1']} USER: {lines[3]} ASSISTANT:"])
    found = chat(run, monkeypatch, capsys, "--image", run.picture, stdin="\n".join(lines))
    assert found.splitlines() == [first, second, third]


def test_template_of_the_command_line_comes_first(run, monkeypatch, capsys):
    prompt = [1, f"{SYSTEM['v0']}\n\n### Human: what is red\n### Assistant:"]
    expected = run.answer(prompt)
    found = chat(run, monkeypatch, capsys, "--template", "v0", "--prompt", "what is red")
    assert found == expected + "\n"


def test_v0_answers_end_at_its_separator(run):
    conversation, options = Conversation(run.folder, template="v0"), GenerationOptions(12)
    free = conversation.ask("what is red", options, lambda text: None).token_ids
    end = next(i for i in range(3, 12) if free[i] not in free[:i])
    weight, separator = conversation.llava.decoder.lm_head.weight, run.pieces.piece_to_id("###")
    weight.data[separator] = weight.data[free[end]] * 1.001  # likelier than what came there
    conversation.start()
    pieces = []
    answer = conversation.ask("what is red", options, pieces.append)
    assert answer.reason == "stop"
    assert "".join(pieces) == answer.text.strip() == run.pieces.decode(free[:end]).strip()


def test_draws_are_reproducible_and_differ_from_question_to_question(run, monkeypatch, capsys):
    settings = ("--temperature", 1, "--seed", 3)
    twice = [chat(run, monkeypatch, capsys, *settings, stdin="is it\n/new\nis it") for _ in "ab"]
    assert twice[0] == twice[1]
    other = chat(run, monkeypatch, capsys, *settings[:2], "--seed", 4, stdin="is it")
    assert other != twice[0].splitlines()[0] + "\n"


class Terminal(io.StringIO):
    """Lines typed at a terminal; Ctrl-C in place of a line's text."""

    def isatty(self) -> bool:
        return True


def test_terminal_goes_on_after_errors(run, monkeypatch, capsys):
    lines = ["/image missing.png", "/image", "/help", f'/image "{run.picture}"', "", "what is this"]
    monkeypatch.setattr(sys, "stdin", Terminal("\n".join(lines)))
    out = chat(run, monkeypatch, capsys)
    assert out.count("> ") == len(lines) + 1  # Ctrl-D ends
    assert run.answer(first_question("what is this"), pixels_of(run.picture)) in out


def test_interrupted_answer_is_forgotten(run, monkeypatch):
    conversation, options = Conversation(run.folder), GenerationOptions(12)

    def interrupt(text: str) -> None:
        raise KeyboardInterrupt

    expected = conversation.ask("what is red", options, lambda text: None).text
    conversation.start()
    with pytest.raises(KeyboardInterrupt):
        conversation.ask("is it large", options, interrupt)
    assert conversation.ask("what is red", options, lambda text: None).text == expected


ERRORS = {
    "no folder": (["--model", "nowhere"], "nowhere is not a directory"),
    "folder of runs": (["--model", "{run}/.."], "is not a run; it contains runs: name .*/run"),
    "no template": (["--model", "{text}"], "Set --template to one of v0, v1"),
    "no tower": (
        ["--model", "{text}", "--template", "v1", "--image", "{run}/picture.png"],
        "text is a language model without a vision tower",
    ),
    "no picture": (["--image", "none.png"], "no file none.png"),
    "broken picture": (["--image", "{run}/config.json"], "config.json cannot be decoded"),
    "empty": (["--prompt", " "], "the question is empty"),
    "image": (["--prompt", "<image> what"], "the question has 1 <image>, but 0 images are shown"),
    "not text": (["--prompt", "\udcff"], "not UTF-8"),
    "too long": (["--prompt", "red " * 400], r"tokens.* context of 400; ask something shorter"),
    "greedy": (["--top-p", "0.5"], "--top-p has no effect at --temperature 0"),
    "no tokens": (["--max-new-tokens", "0"], "max_new_tokens is 0"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_what_cannot_be_answered(run, monkeypatch, capsys, name):
    arguments, message = ERRORS[name]
    text = run.folder.parent / "text"
    arguments = [x.format(run=run.folder, text=text) for x in arguments]
    with pytest.raises(SystemExit, match=f"error: .*{message}"):
        chat(run, monkeypatch, capsys, "--prompt", "what", *arguments)


def test_pictures_stand_where_the_question_has_them(run, tmp_path, monkeypatch, capsys):
    pixels = torch.cat((pixels_of(run.picture), 255 - pixels_of(run.picture)))
    Image.fromarray(pixels[1].permute(1, 2, 0).numpy()).save(tmp_path / "other.png")
    picture = [IM_START, *[IMAGE] * NUM_PATCHES, IM_END]
    prompt = [1, f"{SYSTEM['v1']} USER: is", *picture, "or", *picture, "red ASSISTANT:"]
    images = ("--image", run.picture, "--image", tmp_path / "other.png")
    found = chat(run, monkeypatch, capsys, *images, "--prompt", "is <image> or <image> red")
    assert found == run.answer(prompt, pixels) + "\n"
    assert found != run.answer(prompt, pixels.flip(0)) + "\n"


def test_run_that_was_tuned_on_text_alone(run, tmp_path, monkeypatch, capsys):
    """Without export/llava; the template is the run's."""
    shutil.copytree(run.folder / "export" / "llama", tmp_path / "export" / "llama")
    shutil.copy(run.folder / "config.json", tmp_path)
    expected = run.answer([1, f"{SYSTEM['v1']} USER: what is red ASSISTANT:"])
    found = chat(run, monkeypatch, capsys, "--model", tmp_path, "--prompt", "what is red")
    assert found == expected + "\n"


def test_rows_of_padding_are_no_image_marks(run, tmp_path, monkeypatch, capsys):
    """As in the published LLaVA 1.5, whose 32,064 rows have tokens up to 32,001."""
    shutil.copytree(run.folder / "export" / "llava", tmp_path / "published")
    command = ("--model", tmp_path / "published", "--template", "v1", "--image", run.picture)
    found = chat(run, monkeypatch, capsys, *command, "--prompt", "what is this")
    picture = [*[IMAGE] * NUM_PATCHES, "\nwhat is this ASSISTANT:"]
    prompt = [1, f"{SYSTEM['v1']} USER: ", *picture]
    assert found == run.answer(prompt, pixels_of(run.picture)) + "\n"


def test_plain_is_no_template_for_questions(run, tmp_path):
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "llava").symlink_to(run.folder / "export" / "llava")
    (tmp_path / "config.json").write_text(json.dumps({"data": {"template": "plain"}}))
    with pytest.raises(UserError, match="template plain is not for conversations"):
        Conversation(tmp_path)
